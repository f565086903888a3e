"""Small alphabets on which everything about a discrete diffusion is known by enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["BITS", "Linear", "Masked", "Replaced", "expected_bound", "integrated", "model_evidence", "states"]


def states(values: int, entries: int) -> Tensor:
    """All arrays of integers below ``values``, in lexicographic order."""
    return torch.tensor(list(itertools.product(range(values), repeat=entries)))


BITS = torch.arange(1, 9, dtype=torch.float64) / 36
"""Oracle 10: p of 000, 001, ..., 111."""


def conditionals(probs: Tensor, fits: Tensor) -> Tensor:
    """log p(x_j | the others of z), (..., D, C); ``fits`` (..., 8, 3) is the likelihood of each entry of z given x."""
    x = states(2, 3)
    columns = []
    for j in range(3):
        others = [k for k in range(3) if k != j]
        joint = probs * fits[..., others].prod(-1)
        columns.append(torch.stack([torch.where(x[:, j] == v, joint, 0.0).sum(-1) for v in (0, 1)], -1))
    return torch.stack(columns, -2).log()


class Masked(nn.Module):
    """Exact conditionals of three bits under masks, whatever the noise level."""

    def __init__(self, probs: Tensor = BITS) -> None:
        super().__init__()
        self.probs = probs

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        fits = (z.unsqueeze(-2) == states(2, 3)) | (z.unsqueeze(-2) == 2)
        return conditionals(self.probs, fits.double())


class Replaced(Masked):
    """Exact conditionals of three bits under uniform noise, of which gamma is the logit of b."""

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        kept, lost = torch.sigmoid(-gamma)[..., None, None], torch.sigmoid(gamma)[..., None, None]
        return conditionals(self.probs, kept * (z.unsqueeze(-2) == states(2, 3)) + lost / 2)


class Linear(nn.Module):
    """A small denoiser that is wrong on purpose."""

    def __init__(self, entries: int = 3, categories: int = 2) -> None:
        super().__init__()
        self.shape = (entries, categories)
        self.layer = nn.Linear(entries * (categories + 1) + 1, entries * categories)

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        hot = (z.unsqueeze(-1) == torch.arange(self.shape[1] + 1)).flatten(-2).to(self.layer.weight)
        return self.layer(torch.cat([hot, gamma.unsqueeze(-1) / 5], -1)).unflatten(-1, self.shape)


def expected_bound(model, guide, x: Tensor) -> Tensor:
    """Expectation of the bound for each x (N, D), by enumeration of z at each layer."""
    corruption, layers = model.corruption, model.num_layers
    every = states(corruption.num_states, x.shape[-1])[:, None].expand(-1, *x.shape)
    data = x.expand_as(every)

    def mean(t: Tensor, term: Tensor) -> Tensor:
        weight = guide.marginal(t, data).log_prob(every).exp()
        return torch.where(weight > 0, weight * term, 0.0).sum(0)

    times = model.time(torch.arange(layers + 1.0))
    total = mean(times[1], model.likelihood(every).log_prob(data))
    for s, t in itertools.pairwise(times[1:]):
        total = total - mean(t, model.matching(s, t, every, data))
    top = guide.marginal(times[-1], x)
    if hasattr(top, "base_dist"):
        total = total - torch.distributions.kl_divergence(top, model.prior(times).expand(top.batch_shape))
    return total


def integrated(model, guide, x: Tensor, points: int = 60) -> Tensor:
    """The bound in continuous time by quadrature over times and enumeration of z."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    every = states(model.corruption.num_states, x.shape[-1])[:, None].expand(-1, *x.shape)
    data = x.expand_as(every)
    total = torch.zeros(len(x))
    for t, width in zip(torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2), strict=True):
        probability = guide.marginal(t, data).log_prob(every).exp()
        rate = model.matching(None, t, every, data)
        total = total + width * torch.where(probability > 0, probability * rate, 0.0).sum(0)
    return -total


def model_evidence(model, x: Tensor) -> Tensor:
    """log p(x) (N,) of a chain, by the forward algorithm over all arrays."""
    every = states(model.corruption.num_states, x.shape[-1])
    count = len(every)
    times = model.time(torch.arange(model.num_layers + 1.0))
    with torch.no_grad():
        log_p = model.prior(times).log_prob(every)
        for i in range(model.num_layers, 1, -1):
            reachable = log_p > -math.inf  # kernels are defined there alone
            above = every[reachable]
            transition = model.transition(times[i - 1], times[i], above[:, None].expand(-1, count, -1))
            log_p = (log_p[reachable, None] + transition.log_prob(every.expand(len(above), count, -1))).logsumexp(0)
        reachable = log_p > -math.inf
        above = every[reachable][:, None].expand(-1, *x.shape)
        return (log_p[reachable, None] + model.likelihood(above).log_prob(x.expand_as(above))).logsumexp(0)


def assert_rate_is_the_limit_of_short_steps(model, every: Tensor) -> None:
    """At each pair of a state of the noise and a datum; rates are not negative."""
    z, x = (part.expand(len(every), *every.shape) for part in (every[:, None], every))
    for time in (0.1, 0.5, 0.9):
        t, step = torch.tensor(time), 1e-6
        rate = model.matching(None, t, z, x)
        short = (model.matching(t - step, t, z, x) + model.matching(t, t + step, z, x)) / (2 * step)
        torch.testing.assert_close(short, rate, atol=1e-4, rtol=1e-4)
        assert (rate >= 0).all()
