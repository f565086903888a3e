"""Samplers and the flow's likelihood with the exact denoiser of a mixture (oracle 4)."""

import pytest
import torch
from torch import nn

from pyro_hvae.diffusion import LinearSchedule, Noising, ddim, dpm_solver, flow_log_likelihood, guided, probability_flow
from pyro_hvae.models import vdm

WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.8], dtype=torch.float64)
VARIANCES = torch.tensor([0.05, 0.2], dtype=torch.float64)


def log_density(z, gamma):
    """log q(z) of the noised mixture, per dim summed over none: 1-D."""
    level = Noising(gamma)
    variance = level.alpha**2 * VARIANCES + level.sigma**2
    parts = torch.distributions.Normal(level.alpha * MEANS, variance.sqrt()).log_prob(z)
    return torch.logsumexp(WEIGHTS.log() + parts, -1)


class MixtureDenoiser(nn.Module):
    """E[x | z] of the mixture."""

    def forward(self, z, gamma):
        level = Noising(gamma[..., None, None])
        value = z.unsqueeze(-1)
        variance = level.alpha**2 * VARIANCES + level.sigma**2
        parts = torch.distributions.Normal(level.alpha * MEANS, variance.sqrt()).log_prob(value)
        share = (WEIGHTS.log() + parts).softmax(-1)
        each = MEANS + level.alpha * VARIANCES / variance * (value - level.alpha * MEANS)
        return (share * each).sum(-1)


def mixture(low=-13.0, high=13.0, num_layers=None):
    return vdm(
        MixtureDenoiser(),
        event_shape=1,
        num_layers=num_layers,
        schedule=LinearSchedule(low, high),
        parameterisation="x0",
    )[0]


def exact_draws(count):
    which = torch.multinomial(WEIGHTS, count, replacement=True)
    return MEANS[which] + VARIANCES[which].sqrt() * torch.randn(count)


def distance(first, second):
    """Two-sample Kolmogorov-Smirnov statistic."""
    both = torch.cat([first, second]).sort().values
    below = [torch.searchsorted(part.sort().values, both, right=True) / len(part) for part in (first, second)]
    return float((below[0] - below[1]).abs().max())


COUNT = 6000
CRITICAL = 1.95 * (2 / COUNT) ** 0.5  # the level .001 of two samples of this size


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddim, {"num_steps": 150, "eta": 0.0}),
        (ddim, {"num_steps": 300, "eta": 1.0}),
        (probability_flow, {"num_steps": 80}),
        (probability_flow, {"rtol": 1e-4}),
        (dpm_solver, {"num_steps": 100}),
    ],
)
def test_samplers_reproduce_the_mixture(sampler, options):
    drawn = sampler(mixture(), COUNT, **options).squeeze(-1)
    assert distance(drawn, exact_draws(COUNT)) < CRITICAL


def test_ancestral_sampling_is_the_program_itself():
    drawn = mixture(num_layers=300)(size=COUNT).squeeze(-1)
    assert distance(drawn, exact_draws(COUNT)) < CRITICAL


def test_a_wrong_sampler_fails_the_same_test():
    """Power: three steps of the first-order map, and a denoiser for other variances, are told from the mixture."""
    crude = ddim(mixture(), COUNT, num_steps=3).squeeze(-1)
    assert distance(crude, exact_draws(COUNT)) > 2 * CRITICAL


def test_flow_likelihood_is_the_exact_density():
    model = mixture(-13.0, 13.0)
    z = torch.linspace(-2.0, 2.0, 9)[:, None]
    high = torch.tensor(13.0)
    found = flow_log_likelihood(model, z, end=lambda value: log_density(value, high), num_steps=400)
    exact = log_density(z, torch.tensor(-13.0))
    torch.testing.assert_close(found.value, exact, atol=1e-4, rtol=0)
    normal = flow_log_likelihood(model, z, num_steps=400)
    assert (normal.value - exact).abs().max() < 3e-3


def test_hutchinson_agrees_within_its_error():
    class Rotated(nn.Module):
        def forward(self, z, gamma):
            level = Noising(gamma.unsqueeze(-1))
            mixed = z @ torch.tensor([[1.0, 0.4], [0.4, 1.0]], dtype=z.dtype)
            return level.alpha / (level.alpha**2 + level.sigma**2) * mixed * 0.5

    model = vdm(Rotated(), event_shape=2, num_layers=None, schedule=LinearSchedule(-5.0, 5.0), parameterisation="x0")[0]
    z = torch.randn(3, 2)
    exact = flow_log_likelihood(model, z, num_steps=60)
    found = flow_log_likelihood(model, z, num_steps=60, num_probes=64)
    assert ((found.value - exact.value).abs() < 4 * found.stderr + 1e-9).all()
    assert (exact.stderr == 0).all()


def test_adaptive_solver_agrees():
    pytest.importorskip("torchdiffeq")
    model = mixture(-8.0, 8.0)
    z = torch.linspace(-1.0, 1.0, 3)[:, None]
    fixed = flow_log_likelihood(model, z, num_steps=300)
    adaptive = flow_log_likelihood(model, z, rtol=1e-7)
    torch.testing.assert_close(adaptive.value, fixed.value, atol=1e-4, rtol=0)


def test_guidance():
    class Conditional(nn.Module):
        def forward(self, z, gamma, context):
            return z + context

    z, gamma, context = torch.randn(3, 1), torch.zeros(3), torch.ones(3, 1)
    free = guided(Conditional(), torch.zeros(1), weight=2.0)
    torch.testing.assert_close(free(z, gamma, context), z + 3 * context)
    with pytest.raises(ValueError, match="at least 0"):
        guided(Conditional(), torch.zeros(1), weight=-1.0)


def test_arguments():
    with pytest.raises(ValueError, match="num_steps"):
        ddim(mixture(), 2, num_steps=0)
    with pytest.raises(ValueError, match="eta"):
        ddim(mixture(), 2, eta=2.0)


@pytest.mark.parametrize(
    ("sampler", "order"), [(ddim, 1), (dpm_solver, 2), (probability_flow, 2)], ids=["ddim", "dpm_solver", "heun"]
)
def test_order_of_the_solvers(sampler, order):
    """From the same noise all end where the flow does; twice the steps divide the error by 2 to the order."""
    model = mixture(-6.0, 6.0)

    def drawn(solver, steps):
        torch.manual_seed(4)
        return solver(model, 400, num_steps=steps, mean=True)

    exact = drawn(probability_flow, 1500)
    errors = [(drawn(sampler, steps) - exact).norm() for steps in (100, 200)]
    assert 0.75 * 2**order < errors[0] / errors[1] < 1.5 * 2**order
