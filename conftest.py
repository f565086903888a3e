"""Fixtures for every test and every doctest: each starts from the same clean state and leaves none behind."""

import importlib.util
import os

os.environ.setdefault("MPLBACKEND", "Agg")  # before matplotlib is imported: no test may want a screen

import pyro
import pytest
import torch

# The example of PairModule runs Lightning's Trainer.
collect_ignore = [] if importlib.util.find_spec("lightning") else ["pyro_hvae/training/lightning.py"]


@pytest.fixture(autouse=True)
def _clean_pyro():
    """Clear the param store, seed every generator; float32 by default and with gradients, before and afterwards."""
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
