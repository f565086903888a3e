"""Fixtures for every test and every doctest: each starts from the same clean state and leaves none behind."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # before matplotlib is imported: no test may want a screen

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_pyro():
    """Clear the param store, seed every generator, and restore the default dtype and grad mode afterwards."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
