"""The Gaussian identities of the noising process, and the laws of the bound in T (oracle 4)."""

import math

import pytest
import torch

from pyro_hvae.diffusion import (
    PARAMETERISATIONS,
    CosineSchedule,
    Diffusion,
    LearnedSchedule,
    LinearSchedule,
    MonotoneSchedule,
    Noising,
    convert,
)

EIGENVALUES = torch.tensor([4.0, 1.0, 0.3, 0.05, 0.01], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 0.0, 0.2, 0.0], dtype=torch.float64)


def levels(*gammas):
    return [Noising(torch.tensor(g)) for g in gammas]


def test_steps_compose_into_marginals():
    s, t, u = levels(-7.0, -2.0, 3.0)
    for lower, upper in ((s, t), (t, u), (s, u)):
        alpha, variance = upper.step_from(lower)
        torch.testing.assert_close(alpha * lower.alpha, upper.alpha, atol=1e-12, rtol=0)
        torch.testing.assert_close(alpha**2 * lower.sigma**2 + variance, upper.sigma**2, atol=1e-12, rtol=0)
    first, second, both = t.step_from(s), u.step_from(t), u.step_from(s)
    torch.testing.assert_close(first[0] * second[0], both[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(second[0] ** 2 * first[1] + second[1], both[1], atol=1e-12, rtol=0)


def test_step_times_marginal_is_posterior_times_marginal():
    guide = Diffusion(LinearSchedule(-7.0, 3.0), num_layers=5)
    s, t = torch.tensor(0.25), torch.tensor(0.5)
    x, z_s, z_t = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2)
    forward = guide.step(s, t, z_s).log_prob(z_t) + guide.marginal(s, x).log_prob(z_s)
    backward = guide.posterior(s, t, z_t, x).log_prob(z_s) + guide.marginal(t, x).log_prob(z_t)
    torch.testing.assert_close(forward, backward, atol=1e-11, rtol=1e-12)


def mmse(snr):
    return (EIGENVALUES / (1 + snr[..., None] * EIGENVALUES)).sum(-1)


@pytest.mark.parametrize(("num_layers", "expected"), [(1000, 132.273), (10_000, 131.636)])
def test_gap_of_finitely_many_layers(num_layers, expected):
    gamma = LinearSchedule(-10.0, 4.0)(torch.linspace(0, 1, num_layers))
    snr = torch.exp(-gamma)
    limit = 0.5 * torch.log((1 + snr[0] * EIGENVALUES) / (1 + snr[-1] * EIGENVALUES)).sum()
    total = 0.5 * ((snr[:-1] - snr[1:]) * mmse(snr[1:])).sum()
    law = lambda v: (torch.log(1 + v * EIGENVALUES) + 1 / (1 + v * EIGENVALUES)).sum()  # noqa: E731
    asymptote = 14.0 / 4 * (law(snr[0]) - law(snr[-1]))
    assert abs(num_layers * (total - limit) - expected) < 5e-4
    assert abs(asymptote - 131.565) < 5e-4


@pytest.mark.parametrize("source", PARAMETERISATIONS)
@pytest.mark.parametrize("target", PARAMETERISATIONS)
def test_parameterisations_convert_into_each_other(source, target):
    x, eps = torch.randn(4, 3), torch.randn(4, 3)
    gamma = torch.tensor([-8.0, -1.0, 0.5, 6.0])[:, None]
    level = Noising(gamma)
    z = level.alpha * x + level.sigma * eps
    truth = {
        "x0": x,
        "eps": eps,
        "v": level.alpha * eps - level.sigma * x,
        "score": (level.alpha * x - z) / level.sigma**2,
    }
    found = convert(truth[source], z, gamma, source=source, target=target)
    torch.testing.assert_close(found, truth[target], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "schedule",
    [
        LinearSchedule(-10.0, 4.0),
        CosineSchedule(-10.0, 4.0),
        MonotoneSchedule(lambda t: -10 + 14 * t**2 + 1e-3 * t),
        LearnedSchedule(-10.0, 4.0),
    ],
)
def test_schedules_increase_between_their_ends(schedule):
    schedule = schedule.double()
    t = torch.linspace(0, 1, 101)
    gamma = schedule(t)
    assert (gamma.diff() > 0).all()
    torch.testing.assert_close(gamma[[0, -1]].detach(), torch.tensor([-10.0, 4.0]), atol=2e-3, rtol=0)
    middle = 0.5 * (t[1:] + t[:-1])
    step = 1e-5
    numeric = (schedule(middle + step) - schedule(middle - step)) / (2 * step)
    torch.testing.assert_close(schedule.derivative(middle).detach(), numeric.detach(), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule, LearnedSchedule])
def test_ends_in_the_wrong_order(make):
    with pytest.raises(ValueError, match=r"increase .* got 4.0 and -10.0"):
        make(4.0, -10.0)


def test_a_function_that_turns_back():
    with pytest.raises(ValueError, match=r"at t = 0\.50"):
        MonotoneSchedule(lambda t: -((t - 0.5) ** 2))
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        Diffusion(LinearSchedule(), num_layers=0)


def test_closed_form_of_the_continuous_bound():
    """-ELBO less the entropy, in closed form, is what oracle 4 says it is for this spectrum."""
    gamma_0, gamma_1 = torch.tensor(-10.0), torch.tensor(4.0)
    last = Noising(gamma_1)
    kept = last.alpha**2 * EIGENVALUES + last.sigma**2
    gap = 0.5 * (last.alpha**2 * (EIGENVALUES + MEAN**2) + last.sigma**2 - 1 - kept.log()).sum()
    gap = gap + 0.5 * torch.log(1 + torch.exp(gamma_0) / EIGENVALUES).sum()
    entropy = 0.5 * (math.log(2 * math.pi) + 1 + EIGENVALUES.log()).sum()
    assert abs(entropy - 3.385402) < 1e-6
    assert abs(entropy + gap - 3.400723) < 1e-6
