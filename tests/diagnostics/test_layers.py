"""Active units against probabilistic PCA, where they are known in closed form (oracle 7)."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.diagnostics import active_units, mean_variances
from pyro_hvae.diagnostics.layers import _OverDraws
from pyro_hvae.kernels import LinearGaussian, StandardNormal


def probabilistic_pca(eigenvalues, noise, latent_dim):
    """The maximum likelihood model and its exact posterior, for data with these principal variances."""
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)))[0]
    loading = basis[:, :latent_dim] * (eigenvalues[:latent_dim] - noise).clamp(min=0).sqrt()
    precision = loading.T @ loading + noise * torch.eye(latent_dim)
    model = TopDown(
        z1=StandardNormal(latent_dim),
        x=LinearGaussian(latent_dim, len(eigenvalues), weight=loading, bias=False, scale=noise**0.5),
    )
    guide = BottomUp(
        z1=LinearGaussian(
            len(eigenvalues),
            latent_dim,
            weight=torch.linalg.solve(precision, loading.T),
            bias=False,
            covariance=noise * torch.linalg.inv(precision),
        )
    )
    return model, guide, basis


def test_active_units_of_pca():
    eigenvalues, noise = torch.tensor([4.0, 1.0, 0.305, 0.301, 0.3, 0.3]), 0.3
    model, guide, basis = probabilistic_pca(eigenvalues, noise, latent_dim=5)
    x = torch.randn(20000, 6) * eigenvalues.sqrt()
    x = torch.linalg.qr(x - x.mean(0))[0] * (20000 - 1) ** 0.5 * eigenvalues.sqrt() @ basis.T  # exact sample moments
    expected = 1 - noise / eigenvalues[:5]
    torch.testing.assert_close(mean_variances(model, guide, x, num_draws=2)["z1"], expected, atol=1e-8, rtol=0)
    assert active_units(model, guide, x, num_draws=2) == {"z1": 3}  # 1 - .3/.305 = .016, 1 - .3/.301 = .003


def test_noise_of_the_lower_layer_is_no_activity():
    """The upper layer repeats the lower's noise but never its mean: nothing about x reaches it."""
    model = TopDown(
        z2=StandardNormal(1),
        z1=LinearGaussian(1, 1, weight=torch.ones(1, 1), bias=False),
        x=LinearGaussian(1, 1, weight=torch.ones(1, 1), bias=False),
    )
    guide = BottomUp(
        z1=LinearGaussian(1, 1, weight=torch.zeros(1, 1), bias=False),
        z2=LinearGaussian(1, 1, weight=torch.ones(1, 1), bias=False, scale=0.1),
    )
    variances = mean_variances(model, guide, torch.randn(5000, 1), num_draws=16)
    assert abs(float(variances["z2"])) < 4 * (2 / 5000) ** 0.5 / 16


def test_units_of_inner_plates_in_any_place():
    """Data in the plate on the right; z has two units, of which the second follows x and the first does not."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("units", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.tensor([[0.0], [10.0]]), 1.0))
            pyro.sample("x", dist.Normal(z[..., 1:, :], 1.0), obs=x)

    def guide(x):
        loc = torch.stack([torch.zeros_like(x), 10 + (x - 10) / 2])
        with pyro.plate("data", len(x), dim=-1), pyro.plate("units", 2, dim=-2):
            pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    x = 10 + torch.randn(500)
    found = mean_variances(model, guide, x)["z"]
    torch.testing.assert_close(found, torch.stack([torch.zeros(()), x.var() / 4]))
    assert active_units(model, guide, x) == {"z": 1}


def test_categories_are_indicators_and_a_cauchy_has_no_mean():
    """q(k|x) is certain of one of two categories, half of the data each: each indicator has variance 1/4."""

    def model(x, of):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", of(0 * x))
            pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=x)

    def sure(x, of):
        with pyro.plate("data", len(x)):
            logits = torch.stack([-50 * x, 50 * x], -1)
            pyro.sample("k", dist.Categorical(logits=logits) if of is category else of(x))

    def category(x):
        return dist.Categorical(torch.ones(2) / 2)

    def cauchy(x):
        return dist.Cauchy(x, 1.0)

    x = torch.tensor([-1.0, 1.0]).repeat(50)
    assert abs(float(mean_variances(model, sure, x, category)["k"]) - 2 * 0.25 * 100 / 99) < 1e-8
    with pytest.raises(ValueError, match=r"site 'k' \(Cauchy\) has no finite mean"):
        active_units(model, sure, x, cauchy)


def test_moments_over_draws_join_parts_of_any_length():
    draws = 100.0 + torch.randn(11, 6, 2)
    joined = _OverDraws()
    for part in draws.split([1, 4, 6]):
        joined.add(part)
    expected = draws.mean(0).var(0) - draws.var(0).mean(0) / 11
    torch.testing.assert_close(joined.variance(), expected, rtol=1e-10, atol=1e-12)
    alone = _OverDraws()
    alone.add(draws[:1])
    torch.testing.assert_close(alone.variance(), draws[0].var(0))
