"""Two correlated Gaussian entries with a gamma each: paths, denoisers whose errors are known, the line integral."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pyro_hvae.diffusion import Noising, PolynomialSchedule, Schedule
from pyro_hvae.models import vdm

__all__ = [
    "COVARIANCE",
    "HIGH",
    "LOW",
    "PATHS",
    "WRONG",
    "Bent",
    "Contextual",
    "Gaussian",
    "Levelled",
    "Path",
    "Separate",
    "contextual",
    "cubature",
    "errors",
    "expected",
    "integrated",
    "mean_and_error",
    "pair",
]

LOW, HIGH = (torch.tensor(ends, dtype=torch.float64) for ends in ((-5.0, -3.0), (3.0, 4.0)))
COVARIANCE = torch.tensor([[1.5, 0.9], [0.9, 0.8]], dtype=torch.float64)
WRONG = torch.tensor([[1.5, -0.6], [-0.6, 0.8]], dtype=torch.float64)
PATHS = {  # shares of the way of both entries, with their slopes
    "straight": (lambda t: (t, t), lambda t: (t**0, t**0)),
    "first early": (lambda t: (2 * t - t**2, t**3), lambda t: (2 - 2 * t, 3 * t**2)),
    "second early": (lambda t: (t**2, 1 - (1 - t) ** 4), lambda t: (2 * t, 4 * (1 - t) ** 3)),
    "straight, later": (lambda t: (t**3, t**3), lambda t: (3 * t**2, 3 * t**2)),
    "second early, later": (lambda t: (t**6, 1 - (1 - t**3) ** 4), None),
}


class Path(Schedule):
    """One of PATHS."""

    event_shape = (2,)

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, t):
        low, high = LOW.to(t), HIGH.to(t)
        return low + (high - low) * torch.stack(PATHS[self.name][0](t), -1)


class Gaussian(nn.Module):
    """E[x | z] for x ~ N(0, covariance) and a gamma for each entry."""

    def __init__(self, covariance):
        super().__init__()
        self.covariance = covariance

    def forward(self, z, gamma):
        snr, y = torch.exp(-gamma), z / Noising(gamma).alpha
        precision = torch.linalg.inv(self.covariance) + torch.diag_embed(snr)
        return torch.linalg.solve(precision, (snr * y)[..., None])[..., 0]


class Levelled(Gaussian):
    """The same, which takes the mean of the gammas for that of both entries: no E[x | z] of any data."""

    def forward(self, z, gamma):
        y = z / Noising(gamma).alpha
        mean = gamma.mean(-1, keepdim=True).expand(gamma.shape)
        return super().forward(Noising(mean).alpha * y, mean)


class Separate(nn.Module):
    """E[x_i | z_i] for entries of variance 1.5 and 0.8, which says nothing of the others."""

    def forward(self, z, gamma):
        snr, variance = torch.exp(-gamma), torch.tensor([1.5, 0.8])
        return variance * snr / (1 + variance * snr) * z / Noising(gamma).alpha


def pair(denoiser, schedule, num_layers=None):
    return vdm(denoiser, event_shape=2, num_layers=num_layers, schedule=schedule, parameterisation="x0")


def cubature(dim):
    """Points of equal weight with which quadratic functions of N(0, I) have their mean."""
    return torch.cat([torch.eye(dim), -torch.eye(dim)]) * dim**0.5


def expected(model, guide, s, t, x=None):
    """Mean of a layer's divergence (or for s = None its rate), over the noise and x ~ N(0, COVARIANCE) or given x."""
    points = cubature(4 if x is None else 2)
    data = points[:, 2:] @ torch.linalg.cholesky(COVARIANCE).T if x is None else x.expand(len(points), 2)
    marginal = guide.marginal(t, data)
    z = marginal.mean + marginal.stddev * points[:, :2]
    return model.matching(s, t, z, data).mean()


def integrated(model, guide, x=None, points=80):
    """The denoising matching in continuous time, by quadrature over times."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    times = zip(torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2), strict=True)
    return sum(width * expected(model, guide, None, t, x) for t, width in times)


def errors(gamma):
    """Mean square of eps - epshat by entry, of Levelled(COVARIANCE), from moments."""
    believed, snr = torch.exp(-gamma.mean()), torch.exp(-gamma)
    gain = believed * torch.linalg.inv(torch.linalg.inv(COVARIANCE) + believed * torch.eye(2))
    rest = gain - torch.eye(2)
    return snr * (rest @ COVARIANCE @ rest.T + gain @ torch.diag(1 / snr) @ gain.T).diagonal()


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


class Bent(Schedule):
    """LOW + (HIGH - LOW) (t + w (t^2 - t)), with a learned w for each entry, and the slope by differentiation."""

    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.bend = nn.Parameter(torch.tensor([0.3, -0.4]))

    def forward(self, t):
        t = t.unsqueeze(-1)
        return LOW + (HIGH - LOW) * (t + self.bend * (t**2 - t))


class Contextual(nn.Module):
    """A wrong denoiser that looks at z, gamma and the context."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 2)

    def forward(self, z, gamma, context):
        context = context.expand(*z.shape[:-1], context.shape[-1])
        return 0.5 * self.layer(torch.cat([z, gamma / 5, context], -1))


def contextual(num_layers):
    torch.manual_seed(1)
    schedule = PolynomialSchedule((2,), -4.0, 3.0, context_features=3, hidden=8)
    with torch.no_grad():
        schedule.net[-1].weight.mul_(60.0)
        schedule.ends += 0.3 * torch.randn(2, 2)
    model, guide = vdm(Contextual(), event_shape=2, num_layers=num_layers, schedule=schedule)
    return model, guide
