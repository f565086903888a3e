"""Evidence by particles along a chain, against Kalman and importance sampling."""

import pytest
import torch

import pyro_hvae as ph
from tests.state_space import Bootstrap, Linear


def test_long_chains_where_importance_sampling_fails():
    model = Linear()
    guide, x = Bootstrap(model, wide=1.2), torch.randn(8, 60)
    truth = model.kalman(x).detach()
    found = ph.log_evidence(model, guide, x, num_samples=10000, method="smc")
    weighted = ph.log_evidence(model, guide, x, num_samples=10000)
    assert found.method == "smc"
    assert found.num_samples == 50
    assert ((found.value - truth).abs() < 5 * found.stderr).all()
    assert found.stderr.max() < 0.4
    assert (weighted.value - truth).abs().mean() > 3


def test_what_it_needs():
    model = Linear()
    with pytest.raises(ValueError, match="num_samples >= 100; got 20"):
        ph.log_evidence(model, Bootstrap(model), torch.randn(2, 3), num_samples=20, method="smc")
    with pytest.raises(ValueError, match="draws from a guide"):
        ph.log_evidence(model, None, torch.randn(2, 3), method="smc")
