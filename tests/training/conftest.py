"""Data of the Gaussian pair."""

import math

import pytest
import torch


@pytest.fixture
def data():
    return 2.0 + math.sqrt(2.0) * torch.randn(200)
