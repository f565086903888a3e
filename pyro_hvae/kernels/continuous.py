"""Kernels over real, positive and unit-interval values other than the Gaussian."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.kernels.base import Kernel, pieces

__all__ = ["Beta", "Gamma", "LogNormal", "StudentT", "positive"]

_AT_ZERO_ONE = math.log(math.expm1(1.0))


def positive(raw: Tensor, floor: float) -> Tensor:
    """Map the real line to numbers above ``floor``, zero to 1."""
    return F.softplus(raw + math.log(math.expm1(1.0 - floor))) + floor


class _Continuous(Kernel):
    """Base of the kernels here: a network that yields several parameters a variable, and a floor of the scales."""

    def __init__(self, net: nn.Module, event_dim: int = 1, *, floor: float = 1e-3) -> None:
        super().__init__(net, event_dim)
        name = type(self).__name__
        if event_dim < 1:
            raise ValueError(f"{name} needs event_dim >= 1: its parameters lie side by side along the first event dim.")
        if not 0.0 < floor < 1.0:
            raise ValueError(f"floor must lie in (0, 1), got {floor}.")
        self.floor = floor

    def extra_repr(self) -> str:
        return f"event_dim={self.event_dim}, floor={self.floor:g}"


class StudentT(_Continuous):
    r"""Independent Student's t with (mu, r, d) = net(parent): location mu, scale softplus(r), degrees of freedom.

    .. math:: \sigma = s(r) \ge \mathrm{floor},\quad s(0) = 1;\qquad \nu = 2 + \operatorname{softplus}(d + 8)

    The variance is finite, and the start at ten degrees of freedom is close to a Gaussian.

    Args:
        net: network to mu, r and d side by side along the first event dim.
        event_dim: dims of one event, >= 1.
        floor: smallest scale, in (0, 1), in units of x.

    Raises:
        ValueError: for ``event_dim`` or ``floor`` out of range.

    Example:
        >>> StudentT(nn.Linear(2, 3 * 4))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        loc, raw, freedom = pieces(self, self.parameters_of(parent, context), 3)
        scale = positive(raw, self.floor)
        return dist.StudentT(2.0 + F.softplus(freedom + 8.0), loc, scale).to_event(self.event_dim)


class LogNormal(_Continuous):
    r"""Independent log-normal variables: log x is Gaussian with (mu, r) = net(parent), its sd 1 at r = 0.

    Args:
        net: network to mu and r side by side along the first event dim.
        event_dim: dims of one event, >= 1.
        floor: smallest standard deviation of log x, in (0, 1).

    Raises:
        ValueError: for ``event_dim`` or ``floor`` out of range.

    Example:
        >>> LogNormal(nn.Linear(2, 2 * 4))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        loc, raw = pieces(self, self.parameters_of(parent, context), 2)
        return dist.LogNormal(loc, positive(raw, self.floor)).to_event(self.event_dim)


class Gamma(_Continuous):
    r"""Independent gamma variables with (a, r) = net(parent): mean and concentration positive, both 1 at zero.

    .. math:: E[x] = \mathrm{softplus}(a + c),\quad \alpha = \mathrm{softplus}(r + c'),\quad x \sim
        \mathrm{Gamma}(\alpha,\; \alpha / E[x])

    The coefficient of variation is :math:`\alpha^{-1/2}`.

    Args:
        net: network to a and r side by side along the first event dim.
        event_dim: dims of one event, >= 1.
        floor: smallest mean and concentration, in (0, 1).

    Raises:
        ValueError: for ``event_dim`` or ``floor`` out of range.

    Example:
        >>> Gamma(nn.Linear(2, 2 * 4))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        raw_mean, raw = pieces(self, self.parameters_of(parent, context), 2)
        concentration = positive(raw, self.floor)
        return dist.Gamma(concentration, concentration / positive(raw_mean, self.floor)).to_event(self.event_dim)


class Beta(_Continuous):
    r"""Independent beta variables with (l, r) = net(parent): logit l of the mean, and a concentration, 2 at r = 0.

    .. math:: m = \mathrm{logistic}(l),\quad \kappa = 2\, s(r),\quad x \sim
        \mathrm{Beta}(\mathrm{floor} + \kappa m,\; \mathrm{floor} + \kappa (1 - m))

    At zero the distribution is uniform, up to the floor.

    Args:
        net: network to l and r side by side along the first event dim.
        event_dim: dims of one event, >= 1.
        floor: smallest of the two parameters of the beta distribution, in (0, 1).

    Raises:
        ValueError: for ``event_dim`` or ``floor`` out of range.

    Example:
        >>> Beta(nn.Linear(2, 2 * 4))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        logit, raw = pieces(self, self.parameters_of(parent, context), 2)
        concentration = 2.0 * F.softplus(raw + _AT_ZERO_ONE)
        first, second = concentration * torch.sigmoid(logit), concentration * torch.sigmoid(-logit)
        return dist.Beta(self.floor + first, self.floor + second).to_event(self.event_dim)
