r"""Variance of the sampled-layer estimate, against closed forms.

Gaussian data with eigenvalues l_k and the exact denoiser: with :math:`v = e^{-\gamma}` and
:math:`a_k = v l_k / (1 + v l_k)` the term at time t is :math:`\tfrac12\gamma'(t)\sum_k a_k\chi^2_k`, so that its mean
over the data is :math:`\tfrac12\gamma' G`, and its mean square :math:`\tfrac14\gamma'^2 H`, with
:math:`G = \sum a_k` and :math:`H = G^2 + 2\sum a_k^2`.  Over all schedules between two ends the mean square is least
where :math:`\gamma'\propto H^{-1/2}`, and is :math:`(\tfrac12\int\sqrt H\,d\gamma)^2` there.
"""

import pytest
import torch
from torch import nn

from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import CosineSchedule, LearnedSchedule, LinearSchedule, Noising
from pyro_hvae.models import vdm

EIGENVALUES = torch.tensor([4.0, 1.0, 0.3, 0.05, 0.01], dtype=torch.float64)
LOW, HIGH = -10.0, 4.0


class ExactDenoiser(nn.Module):
    def forward(self, z, gamma):
        level = Noising(gamma.unsqueeze(-1))
        return level.alpha * EIGENVALUES / (level.alpha**2 * EIGENVALUES + level.sigma**2) * z


def moments(gamma):
    """G and H."""
    snr = torch.exp(-gamma)[..., None]
    shares = snr * EIGENVALUES / (1 + snr * EIGENVALUES)
    return shares.sum(-1), shares.sum(-1) ** 2 + 2 * (shares**2).sum(-1)


def closed_form(schedule):
    """Mean of one term, its variance, and the part of that which is within the times."""
    t = torch.linspace(0, 1, 20_001)
    with torch.no_grad():
        mean, square = moments(schedule(t))
        slope = schedule.derivative(t)
    total = torch.trapezoid(0.5 * slope * mean, t)
    return (
        float(total),
        float(torch.trapezoid(0.25 * slope**2 * square, t) - total**2),
        float(torch.trapezoid(0.25 * slope**2 * (square - mean**2), t)),
    )


def least_variance():
    gamma = torch.linspace(LOW, HIGH, 20_001)
    mean, square = moments(gamma)
    return float((0.5 * torch.trapezoid(square.sqrt(), gamma)) ** 2 - (0.5 * torch.trapezoid(mean, gamma)) ** 2)


def pair(schedule):
    return vdm(ExactDenoiser(), event_shape=5, num_layers=None, schedule=schedule, parameterisation="x0")


def draws(sampling, schedule, batches=500, size=32, num_layers=1, warm_up=0, mean=True):
    """Means over batches of the sampled terms, or the terms of each datum."""
    model, guide = pair(schedule)
    bound = DiffusionELBO(num_layers, sampling)
    found = []
    for _ in range(warm_up):  # times are learned in training alone
        bound.differentiable_loss(model, guide, EIGENVALUES.sqrt() * torch.randn(size, 5))
    for _ in range(batches):
        x = EIGENVALUES.sqrt() * torch.randn(size, 5)
        terms = bound.terms(model, guide, x)["denoising_matching"]
        found.append(terms.mean(0, keepdim=True) if mean else terms)
    return torch.cat(found)


def agrees(found, expected):
    """A variance estimated by that of draws, within four of its standard errors."""
    centred = (found - found.mean()) ** 2
    return abs(float(centred.mean()) - expected) < 4 * float(centred.std()) / len(found) ** 0.5


@pytest.mark.parametrize("schedule", [LinearSchedule(LOW, HIGH), CosineSchedule(-4.0, HIGH)])
def test_uniform_and_antithetic_times_have_the_variance_of_their_closed_forms(schedule):
    total, whole, within = closed_form(schedule)
    assert within < 0.7 * whole  # so that the two can be told apart
    uniform = draws("uniform", schedule, batches=1, size=20_000, mean=False)
    antithetic = draws("antithetic", schedule)
    assert agrees(uniform, whole)
    assert agrees(antithetic, within / 32)
    assert not agrees(antithetic, whole / 32)
    for found in (uniform, antithetic):
        assert abs(float(found.mean()) - total) < 4 * float(found.std()) / len(found) ** 0.5


def test_importance_sampled_times_lower_the_variance_of_a_bad_schedule():
    schedule = CosineSchedule(LOW, HIGH)
    uniform = draws("uniform", schedule, batches=300)
    importance = draws("importance", schedule, batches=300, warm_up=100)
    assert float(importance.var()) < 0.3 * float(uniform.var())


def test_more_times_a_datum_lower_the_variance():
    schedule = LinearSchedule(LOW, HIGH)
    _, _, within = closed_form(schedule)
    assert float(draws("antithetic", schedule, batches=300, num_layers=8).var()) < 0.5 * within / 32


def test_a_learned_schedule_lowers_the_variance():
    """To within a fifth of the least of all, which is half of the linear one's here; it moves the inside alone."""
    torch.set_default_dtype(torch.float64)
    schedule = LearnedSchedule(LOW, HIGH, learn_ends=False).double()
    before = closed_form(schedule)
    model, guide = pair(schedule)
    objective = DiffusionELBO(sampling="uniform")(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 200)
    for _ in range(200):
        optimizer.zero_grad()
        objective(EIGENVALUES.sqrt() * torch.randn(256, 5)).backward()
        optimizer.step()
        decay.step()
    after, least, linear = closed_form(schedule), least_variance(), closed_form(LinearSchedule(LOW, HIGH))
    assert abs(after[0] - before[0]) < 1e-4  # the bound does not depend on the inside
    assert least < after[1] < 1.2 * least < 0.61 * linear[1]
