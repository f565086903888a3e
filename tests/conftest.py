"""Tests compare with closed forms, so they run in float64 unless they say otherwise."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _double(_clean_pyro):
    """Make float64 the default dtype for one test; `_clean_pyro` puts the former one back."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Use one thread a process: pytest-xdist already occupies every core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
