"""Encoder and decoder as functions, against the closed forms of a linear-Gaussian chain with its exact posterior."""

import pytest
import torch
from torch import nn

from pyro_hvae.chains import BottomUp, TopDown, decode, encode, impute, reconstruct
from pyro_hvae.kernels import Categorical, LinearGaussian, StandardNormal
from pyro_hvae.models import hvae, vae
from tests.linear_gaussian import Oracle, linear_gaussian


def test_encode_draws_from_the_posterior():
    case = linear_gaussian(2)
    mean, cov = Oracle(case.model).posterior(case.x)
    drawn = encode(case.exact, case.x, num_draws=40_000)
    stacked = torch.cat([drawn["z1"], drawn["z2"]], -1)
    assert stacked.shape == (40_000, 5, 5)
    torch.testing.assert_close(stacked.mean(0), mean.detach(), rtol=0, atol=0.03)
    torch.testing.assert_close(stacked[:, 0].T.cov(), cov.detach(), rtol=0, atol=0.03)


def test_mean_of_a_linear_chain_is_the_posterior_mean():
    case = linear_gaussian(2)
    mean, _ = Oracle(case.model).posterior(case.x)
    found = encode(case.exact, case.x, mean=True)
    torch.testing.assert_close(torch.cat([found["z1"], found["z2"]], -1), mean.detach())
    found = encode(case.exact, case.x, mean=True, num_draws=3)
    assert found["z1"].shape == (3, 5, 2)


def test_reconstruct_is_the_mean_of_the_decoder():
    case = linear_gaussian(2)
    oracle = Oracle(case.model)
    mean, _ = oracle.posterior(case.x)
    expected = mean[:, :2] @ oracle.weight[1].T + oracle.bias[0]
    found = reconstruct(case.model, case.exact, case.x, num_draws=20_000)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0.03)
    assert reconstruct(case.model, case.exact, case.x).shape == (5, 3)


def test_impute_draws_from_the_predictive():
    """x1, x2 | z ~ N(w z, s^2): the guide of x1 alone is exact, so x2 given x1 must be."""
    w, s = torch.tensor([[1.5], [-0.8]]), torch.tensor([0.5, 0.7])
    model = TopDown(z1=StandardNormal(1), x=LinearGaussian(1, 2, weight=w, bias=False, scale=s))
    precision = 1 + w[0, 0] ** 2 / s[0] ** 2
    gain = w[0, 0] / s[0] ** 2 / precision
    guide = BottomUp(
        z1=LinearGaussian(2, 1, weight=torch.tensor([[gain, 0.0]]), bias=False, scale=precision.rsqrt().item())
    )
    x = torch.tensor([[1.2, torch.nan]])
    found = impute(model, guide, x, ~x.isnan(), num_draws=40_000)
    assert (found[..., 0] == 1.2).all()
    assert found[..., 1].mean() == pytest.approx((w[1, 0] * gain * 1.2).item(), abs=0.02)
    assert found[..., 1].var() == pytest.approx((w[1, 0] ** 2 / precision + s[1] ** 2).item(), abs=0.02)
    whole = impute(model, guide, torch.ones(3, 2), torch.tensor([True, False, True]))
    assert whole.shape == (3, 2)
    assert (whole[[0, 2]] == 1).all()
    assert not (whole[1] == 1).any()


def test_decode_from_any_depth():
    model, _ = hvae(6, (3, 2), hidden=(8,))
    z1 = torch.randn(4, 3)
    logits = decode(model, {"z1": z1}).base_dist.logits
    torch.testing.assert_close(logits, model.x.net(z1).detach())
    assert decode(model, {"z2": torch.randn(7, 4, 2)}).shape() == (7, 4, 6)
    assert decode(model, {}, size=2).shape() == (2, 6)
    with pytest.raises(ValueError, match=r"\['z3'\] are no latents of 'model'"):
        decode(model, {"z3": z1})


def test_no_gradient_is_kept():
    model, guide = vae(6, 3, hidden=(8,))
    assert not reconstruct(model, guide, model(size=2)).requires_grad


def test_context_goes_to_both():
    model, guide = vae(6, 3, hidden=(8,), context_dim=2)
    x, context = torch.zeros(4, 6), torch.randn(4, 2)
    assert reconstruct(model, guide, x, context=context, num_draws=3).shape == (4, 6)


def test_refuses():
    model = TopDown(z1=StandardNormal(2), x=Categorical(nn.Linear(2, 15), num_categories=5))
    guide = BottomUp(z1=LinearGaussian(3, 2))
    with pytest.raises(ValueError, match="has no mean: its values are categories"):
        reconstruct(model, guide, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="num_draws must be >= 1, got 0"):
        encode(guide, torch.zeros(4, 3), num_draws=0)
