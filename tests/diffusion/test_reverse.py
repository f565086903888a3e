"""What the layers do not know of the datum: their variance, the schedule's gradient, and missing entries."""

import math

import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import (
    LearnedSchedule,
    LinearSchedule,
    Noising,
    ReverseVariance,
    dequantised_log_likelihood,
    inpaint,
)
from pyro_hvae.models import vdm
from pyro_hvae.nn import DenoisingMLP

SPREAD = 0.7
COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)


class Isotropic(nn.Module):
    """The noise expected in z of data N(0, SPREAD I)."""

    def forward(self, z, gamma):
        level = Noising(gamma.unsqueeze(-1))
        return level.sigma / (level.alpha**2 * SPREAD + level.sigma**2) * z


class Correlated(nn.Module):
    """E[x | z] of data N(0, COVARIANCE)."""

    def forward(self, z, gamma):
        level = Noising(gamma[..., None, None])
        noised = level.alpha**2 * COVARIANCE + level.sigma**2 * torch.eye(2)
        gain = level.alpha * COVARIANCE @ torch.linalg.inv(noised)
        return (gain @ z.unsqueeze(-1)).squeeze(-1)


def gaussian(num_layers, variance=None):
    model, guide = vdm(Isotropic(), event_shape=3, num_layers=num_layers, schedule=LinearSchedule(-6.0, 6.0))
    model.reverse_variance = variance
    return model, guide


def exact_variance(points=400):
    """r at its closed form E(eps - eps_hat)^2 = alpha^2 c / (alpha^2 c + sigma^2)."""
    variance = ReverseVariance(-6.0, 6.0, num_points=points)
    level = Noising(torch.linspace(-6.0, 6.0, points))
    share = level.alpha**2 * SPREAD / (level.alpha**2 * SPREAD + level.sigma**2)
    with torch.no_grad():
        variance.logits.copy_(torch.logit(share))
    return variance


def test_calibrated_to_the_closed_form():
    variance = ReverseVariance(-6.0, 6.0, num_points=9)
    model, _ = gaussian(4, variance)
    variance.calibrate(model, SPREAD**0.5 * torch.randn(4000, 3), num_draws=8)
    expected = torch.sigmoid(exact_variance(9).logits)
    torch.testing.assert_close(torch.sigmoid(variance.logits), expected, rtol=0.02, atol=0)


def test_layers_are_exact_with_the_optimal_variance():
    """For Gaussian data p(z_s|z_t) = q(z_s|z_t), however few the layers: the draws have the marginals of the noise."""
    for variance, exact in ((exact_variance(), True), (None, False)):
        model, _ = gaussian(4, variance)
        lower, upper = model.schedule(torch.tensor(1 / 3)), model.schedule(torch.tensor(2 / 3))
        s, t = Noising(lower), Noising(upper)
        marginal = {level: level.alpha**2 * SPREAD + level.sigma**2 for level in (s, t)}
        z = torch.randn(1, 3)
        found = model.transition(torch.tensor(1 / 3), torch.tensor(2 / 3), z)
        alpha, _ = t.step_from(s)
        gain = alpha * marginal[s] / marginal[t]
        torch.testing.assert_close(found.mean, gain * z, rtol=1e-9, atol=1e-12)
        agrees = torch.allclose(found.variance, marginal[s] - gain * alpha * marginal[s], rtol=1e-3)
        assert agrees is exact


@pytest.mark.parametrize("sampling", ["exact", "uniform"])
def test_the_bound_with_a_variance_of_its_own(sampling):
    variance = ReverseVariance(-6.0, 6.0)
    with torch.no_grad():
        variance.logits.normal_()
    model, guide = gaussian(6, variance)
    x = torch.tensor([0.3, -1.0, 0.8]).expand(8000, 3)
    chain = ph.TraceELBO().per_datum(model, guide, x)
    bound = DiffusionELBO(1, sampling).per_datum(model, guide, x)
    error = ((chain.var() + bound.var()) / 8000).sqrt()
    assert abs(chain.mean() - bound.mean()) < 4 * error
    closed = model.matching(torch.tensor(0.2), torch.tensor(0.4), x[:5], torch.randn(5, 3))
    assert bool((closed > 0).all())


def test_the_optimum_is_where_the_bound_is():
    model, guide = gaussian(6, exact_variance(32))
    loss = -DiffusionELBO(4, "exact").per_datum(model, guide, SPREAD**0.5 * torch.randn(20000, 3)).mean()
    narrow, guide_2 = gaussian(6)
    worse = -DiffusionELBO(4, "exact").per_datum(narrow, guide_2, SPREAD**0.5 * torch.randn(20000, 3)).mean()
    entropy = 1.5 * math.log(2 * math.pi * math.e * SPREAD)
    assert entropy < loss + 0.02
    assert worse - entropy > 5 * (loss - entropy)


def test_a_learned_variance_trains():
    variance = ReverseVariance(-6.0, 6.0, num_points=8)
    model, guide = gaussian(4, variance)
    module = DiffusionELBO(2)(model, guide)
    module(torch.randn(16, 3)).backward()
    assert variance.logits.grad is not None
    assert float(variance.logits.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="gamma_min < gamma_max"):
        ReverseVariance(1.0, -1.0)


def test_the_inside_of_a_learned_schedule_gets_the_gradient_of_the_variance():
    schedule = LearnedSchedule(-6.0, 4.0)
    model, guide = vdm(DenoisingMLP(2), event_shape=2, num_layers=None, schedule=schedule)
    x, inside = torch.randn(50, 2), (schedule.slope, schedule.raw_in, schedule.bias, schedule.raw_out)

    def terms():
        torch.manual_seed(5)
        times = torch.rand(50)
        z = guide.marginal(times, x)
        noised = z.rsample()
        return model.matching(None, times, noised, x)

    layers = terms()
    plain = torch.autograd.grad((0.5 * layers**2).sum() / layers.detach().mean(), inside)
    ends = torch.autograd.grad(terms().sum(), schedule.ends)
    with schedule.variance_gradient() as tell:
        layers = terms()
        tell(layers)
    weighed = torch.autograd.grad(layers.sum(), (*inside, schedule.ends))
    for found, expected in zip(weighed, (*plain, *ends), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_learned_schedule_lowers_the_variance():
    """With a fixed denoiser the bound stays where it is, and its estimates move together."""
    schedule = LearnedSchedule(-8.0, 6.0, learn_ends=False)
    model, guide = vdm(Correlated(), event_shape=2, num_layers=None, schedule=schedule, parameterisation="x0")
    x = torch.randn(512, 2) @ torch.linalg.cholesky(COVARIANCE).mT
    bound = DiffusionELBO(1, "uniform")
    estimate = lambda: torch.stack([bound.terms(model, guide, x)["denoising_matching"] for _ in range(60)])  # noqa: E731
    before = estimate()
    module = bound(model, guide)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    after = estimate()
    assert after.var(0).mean() < 0.8 * before.var(0).mean()
    error = ((after.mean(1).var() + before.mean(1).var()) / 60).sqrt()
    assert abs(after.mean() - before.mean()) < 4 * error


@pytest.mark.parametrize(("num_particles", "right"), [(1, False), (64, True)])
def test_inpainting_draws_from_the_conditional(num_particles, right):
    model, guide = vdm(
        Correlated(), event_shape=2, num_layers=60, schedule=LinearSchedule(-9.0, 6.0), parameterisation="x0"
    )
    x = torch.tensor([1.5, math.nan]).expand(1500, 2)
    drawn = inpaint(model, guide, x, torch.tensor([True, False]).expand(1500, 2), num_particles=num_particles)
    assert bool((drawn[:, 0] == 1.5).all())
    error = (0.36 / 1500) ** 0.5
    agrees = abs(drawn[:, 1].mean() - 0.8 * 1.5) < 4 * error and abs(drawn[:, 1].var() / 0.36 - 1) < 0.2
    assert bool(agrees) is right


def test_inpainting_arguments():
    model, guide = vdm(DenoisingMLP(2), event_shape=2, num_layers=3)
    x, mask = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask must be boolean of the shape of x"):
        inpaint(model, guide, x, mask[:, 0])
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        inpaint(model, guide, x, mask, num_particles=0)
    endless, noise = vdm(DenoisingMLP(2), event_shape=2, num_layers=None)
    with pytest.raises(ValueError, match="continuous time has no layers"):
        inpaint(endless, noise, x, mask)


def test_dequantised_data():
    """Against the mean of the exact density over a bin, which lies below the log of its integral."""
    model, _ = vdm(Isotropic(), event_shape=3, num_layers=None, schedule=LinearSchedule(-13.0, 13.0))
    x = torch.tensor([[-1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    density = torch.distributions.Normal(0.0, SPREAD**0.5)
    offsets = (torch.arange(4000) + 0.5) / 4000 - 0.5
    expected = (density.log_prob(x.unsqueeze(-1) + offsets).mean(-1) + math.log(1.0)).sum(-1)
    exact = torch.log(density.cdf(x + 0.5) - density.cdf(x - 0.5)).sum(-1)
    found = dequantised_log_likelihood(model, x.repeat(150, 1), levels=3, num_draws=2, num_steps=30)
    values = found.value.reshape(150, 2)
    assert bool(((values.mean(0) - expected).abs() < 4 * values.std(0) / 150**0.5).all())
    torch.testing.assert_close(found.stderr.square().mean() * 150, values.var(0).mean() * 150, rtol=0.3, atol=0)
    assert bool((expected < exact).all())
    with pytest.raises(ValueError, match=r"must stand at one of 3 levels from -1.0 to 1.0, got -0.3"):
        dequantised_log_likelihood(model, x * 0.3, levels=3)
