"""Samplers, flow and bound with the exact denoiser of a mixture in the plane (oracle 4), and the power of the test."""

import math

import pytest
import torch
from torch import nn

from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import (
    CosineSchedule,
    LinearSchedule,
    Noising,
    ddim,
    dpm_solver,
    flow_log_likelihood,
    probability_flow,
)
from pyro_hvae.models import vdm

WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.5], [0.8, -0.4]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.3, 0.2], [0.2, 0.25]], [[0.15, -0.1], [-0.1, 0.5]]], dtype=torch.float64)


def components(gamma):
    """Means and covariances of the noised components, (..., 2, 2) and (..., 2, 2, 2)."""
    level = Noising(gamma)
    alpha, variance = level.alpha[..., None, None], level.sigma[..., None, None, None] ** 2
    return alpha * MEANS, alpha[..., None] ** 2 * COVARIANCES + variance * torch.eye(2)


def log_parts(z, gamma):
    means, covariances = components(gamma)
    parts = torch.distributions.MultivariateNormal(means, covariances, validate_args=False)
    return WEIGHTS.log() + parts.log_prob(z.unsqueeze(-2))


def log_density(z, gamma):
    return torch.logsumexp(log_parts(z, torch.tensor(gamma)), -1)


class MixtureDenoiser(nn.Module):
    """E[x | z]; ``temper`` != 1 has the components' covariances wrong by that factor."""

    def __init__(self, temper=1.0):
        super().__init__()
        self.temper = temper

    def forward(self, z, gamma):
        means, covariances = components(gamma)
        alpha = Noising(gamma).alpha[..., None, None]
        left = torch.linalg.solve(covariances, (z.unsqueeze(-2) - means).unsqueeze(-1))
        each = MEANS + self.temper * alpha * (COVARIANCES @ left).squeeze(-1)
        return (log_parts(z, gamma).softmax(-1).unsqueeze(-1) * each).sum(-2)


def mixture(num_layers=None, schedule=None, temper=1.0):
    schedule = LinearSchedule(-13.0, 9.0) if schedule is None else schedule
    return vdm(MixtureDenoiser(temper), event_shape=2, num_layers=num_layers, schedule=schedule, parameterisation="x0")


def exact_draws(count):
    which = torch.multinomial(WEIGHTS, count, replacement=True)
    return MEANS[which] + (torch.linalg.cholesky(COVARIANCES)[which] @ torch.randn(count, 2, 1)).squeeze(-1)


COUNT = 4000
ANGLES = torch.linspace(0.0, math.pi, 7, dtype=torch.float64)[:-1]
# Two samples of this size exceed it in none of six directions but once in a thousand (Kolmogorov-Smirnov, Bonferroni)
CRITICAL = math.sqrt(-0.5 * math.log(0.001 / (2 * len(ANGLES)))) * (2 / COUNT) ** 0.5


def distance(drawn):
    """The largest two-sample Kolmogorov-Smirnov statistic, against exact draws, over six directions of the plane."""
    directions = torch.stack([ANGLES.cos(), ANGLES.sin()])
    first, second = (drawn @ directions).sort(0).values, (exact_draws(len(drawn)) @ directions).sort(0).values
    found = []
    for ours, theirs in zip(first.T.contiguous(), second.T.contiguous(), strict=True):
        both = torch.cat([ours, theirs])
        below = [torch.searchsorted(part, both, right=True) / len(drawn) for part in (ours, theirs)]
        found.append((below[0] - below[1]).abs().max())
    return float(torch.stack(found).max())


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddim, {"num_steps": 120, "eta": 0.5}),
        (probability_flow, {"num_steps": 50}),
        (dpm_solver, {"num_steps": 50}),
    ],
)
def test_samplers_reproduce_the_mixture(sampler, options):
    assert distance(sampler(mixture()[0], COUNT, **options)) < CRITICAL


def test_ancestral_sampling_reproduces_the_mixture():
    assert distance(mixture(num_layers=150)[0](size=COUNT)) < CRITICAL


@pytest.mark.parametrize(("sampler", "options"), [(dpm_solver, {"num_steps": 50}), (None, {})])
def test_a_wrong_denoiser_is_found_out(sampler, options):
    """Power: components too narrow by a tenth of their covariance, by each kind of sampler."""
    model = mixture(num_layers=150, temper=0.9)[0]
    drawn = model(size=COUNT) if sampler is None else sampler(model, COUNT, **options)
    assert distance(drawn) > 1.5 * CRITICAL


def test_a_sampler_with_too_much_noise_is_found_out():
    """Power: the noise of DDIM added without taking it from the direction back."""
    model = mixture()[0]

    def wrong(size, num_steps=80):
        z = torch.randn(size, 2)
        gammas = model.schedule(torch.linspace(1.0, 0.0, num_steps + 1))
        for upper, lower in zip(map(Noising, gammas[:-1]), map(Noising, gammas[1:]), strict=True):
            eps = model.predict(z, upper.gamma, target="eps")
            noise = 0.3 * upper.posterior_to(lower)[2].sqrt()
            z = lower.alpha * (z - upper.sigma * eps) / upper.alpha + lower.sigma * eps
            z = z + noise * torch.randn_like(z)
        return z

    assert distance(wrong(COUNT)) > 1.5 * CRITICAL


POINTS = torch.tensor([[-1.5, 0.5], [0.8, -0.4], [0.0, 0.0], [2.0, 1.0], [-2.5, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("schedule", [LinearSchedule(-13.0, 9.0), CosineSchedule(-13.0, 9.0)])
def test_flow_likelihood_is_the_exact_density(schedule):
    model = mixture(schedule=schedule)[0]
    found = flow_log_likelihood(model, POINTS, end=lambda z: log_density(z, 9.0), num_steps=100)
    torch.testing.assert_close(found.value, log_density(POINTS, -13.0), atol=1e-4, rtol=0)


def bound_at(datum, num_layers, draws=20_000):
    found = DiffusionELBO().per_datum(*mixture(num_layers), datum.expand(draws, 2))
    return float(found.mean()), float(found.std()) / draws**0.5


@pytest.mark.parametrize("datum", POINTS[1:4])
def test_the_bound_lies_below_the_density_and_reaches_it_in_continuous_time(datum):
    exact = float(log_density(datum, -30.0))  # of x itself
    few, few_error = bound_at(datum, 40)
    limit, limit_error = bound_at(datum, None)
    assert few + 4 * few_error < exact - 0.5  # the price of forty layers
    assert abs(limit - exact) < 4 * limit_error + 0.01  # with the exact denoiser, only the ends cost anything
    assert limit_error < 0.25
