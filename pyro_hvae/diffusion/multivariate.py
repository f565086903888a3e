r"""Learned schedules with a gamma for each entry of a datum, which may depend on a context.

An entry i has its own noise level :math:`\gamma_i(t, c)`, and the bound in continuous time is a line integral,

.. math:: \tfrac12\int_0^1\sum_i\gamma_i'(t)\,\mathrm E\,(\epsilon_i-\hat\epsilon_i)^2\,dt
          = \tfrac12\int_{\gamma(0)}^{\gamma(1)}\sum_i \mathrm E\,(\epsilon_i-\hat\epsilon_i)^2\,d\gamma_i .

- The speed along the path does not matter: :math:`t\to u(t)`, the same for all entries, leaves it as it is.
- The path between the ends does, in general, since the integrand of a network is no gradient field; then the inside of
  the schedule has a gradient of the bound, unlike that of a schedule with one gamma.
- It does not where the denoiser is the exact :math:`\mathrm E[\epsilon|z]` of any data: the integrand is the gradient
  of the mutual information between x and z in the entries' SNR, and the bound is exact on every path between the ends.
- Nor where :math:`\hat\epsilon_i` depends on :math:`z_i` and :math:`\gamma_i` alone: the integral is then a sum over
  the entries.

References: Diffusion Models With Learned Adaptive Noise (Sahoo et al., 2024; MuLAN); Gradient of Mutual Information in
Linear Vector Gaussian Channels (Palomar and Verdu, 2006).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_hvae.arguments import check_count
from pyro_hvae.diffusion.reverse import takes_context
from pyro_hvae.diffusion.schedules import Schedule, check_ends

__all__ = ["MeanLevel", "PolynomialSchedule"]

_LEAST_SLOPE = 1e-3


class _Polynomial(Schedule):
    """gamma = first + width f(t) / f(1), with f' = (a t^2 + b t + d)^2 + 1e-3.

    Args:
        first, width: at the ends, (*event_shape).
        coefficients: a, b and d, (3, ..., *event_shape), of which the dims in the middle are those of a context.
    """

    def __init__(self, first: Tensor, width: Tensor, coefficients: Tensor) -> None:
        super().__init__()
        self.event_shape = tuple(first.shape)
        self.first, self.width = first, width
        self.a, self.b, self.d = coefficients

    def forward(self, t: Tensor) -> Tensor:
        return self.first + self.width * self._raised(self._wide(t)) / self._raised(t.new_ones(()))

    def derivative(self, t: Tensor) -> Tensor:
        whole, t = self._raised(t.new_ones(())), self._wide(t)
        return self.width * ((self.a * t**2 + self.b * t + self.d) ** 2 + _LEAST_SLOPE) / whole

    def layers(self, times: Tensor) -> list[Tensor]:
        return [self(t) for t in times]  # one at a time: a context has dims of its own

    def _wide(self, t: Tensor) -> Tensor:
        return t.reshape(t.shape + (1,) * len(self.event_shape))

    def _raised(self, t: Tensor) -> Tensor:
        a, b, d = self.a, self.b, self.d
        powers = (d**2 + _LEAST_SLOPE, b * d, (b**2 + 2 * a * d) / 3, a * b / 2, a**2 / 5)
        total = torch.zeros_like(t)
        for power in reversed(powers):
            total = (total + power) * t
        return total


class PolynomialSchedule(Schedule):
    r"""A learned polynomial of degree five for each entry, between two ends; a function of a context if there is one.

    .. math:: \gamma_i(t, c) = \gamma_{0,i} + (\gamma_{1,i}-\gamma_{0,i})\,\frac{f_i(t, c)}{f_i(1, c)},\qquad
              f_i'(t, c) = (a_i t^2 + b_i t + d_i)^2 + 10^{-3},

    which increases for any a, b, d; they are parameters, or of a context the output of a network.  At the start gamma
    is linear without a context, and close to it with one.  The ends do not depend on the context, so that a context is
    seen in the path alone.

    The denoiser is called with gamma of the shape of z; :class:`MeanLevel` makes one from a denoiser that takes one
    level.  A context is a covariate, known to model and guide; it must not be computed from x.

    Args:
        event_shape: of one datum.
        gamma_min, gamma_max: the ends of every entry, at the start if they are learned.
        context_features: c, width of the context (..., c); 0 for none.
        hidden: width of the network on the context.
        learn_ends: whether each entry's ends are parameters too; the upper end always lies above the lower.

    Raises:
        ValueError: for an ``event_shape`` without sizes or with one below 1, or ends out of order; in use, for a
            context that is missing, or of another width.

    Reference:
        Diffusion Models With Learned Adaptive Noise (Sahoo et al., 2024).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> schedule = PolynomialSchedule((2,), -6.0, 4.0, context_features=3)
        >>> schedule.given(torch.randn(5, 3))(torch.tensor(0.5)).shape
        torch.Size([5, 2])
        >>> PolynomialSchedule((2,), -6.0, 4.0)(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [[-6.0, -6.0], [-1.0, -1.0], [4.0, 4.0]]
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        *,
        context_features: int = 0,
        hidden: int = 64,
        learn_ends: bool = True,
    ) -> None:
        super().__init__()
        check_ends(gamma_min, gamma_max)
        check_count("hidden", hidden)
        self.event_shape = tuple(event_shape)
        if not self.event_shape or min(self.event_shape) < 1:
            raise ValueError(f"event_shape must have sizes of at least 1, got {self.event_shape}")
        if context_features < 0:
            raise ValueError(f"context_features must be at least 0, got {context_features}")
        self.context_features = context_features
        ends = torch.tensor([gamma_min, _inverse_softplus(gamma_max - gamma_min)])
        ends = ends.reshape(2, *(1,) * len(self.event_shape)).repeat(1, *self.event_shape)
        if learn_ends:
            self.ends = nn.Parameter(ends)
        else:
            self.register_buffer("ends", ends)
        start = torch.tensor([0.0, 0.0, 1.0]).reshape(3, *(1,) * len(self.event_shape)).repeat(1, *self.event_shape)
        self.start = nn.Parameter(start)
        self.net: nn.Module | None = None
        if context_features:
            last = nn.Linear(hidden, start.numel(), bias=False)
            nn.init.normal_(last.weight, std=0.01)
            self.net = nn.Sequential(nn.Linear(context_features, hidden), nn.SiLU(), last)

    def forward(self, t: Tensor) -> Tensor:
        return self.given(None)(t)

    def derivative(self, t: Tensor) -> Tensor:
        return self.given(None).derivative(t)

    def given(self, context: Any) -> Schedule:
        coefficients = self.start
        if self.net is not None:
            if context is None:
                raise ValueError(
                    f"this schedule depends on a context of {self.context_features} features: call the programs with "
                    "context=..., or take schedule.given(context)"
                )
            if context.shape[-1:] != (self.context_features,):
                raise ValueError(
                    f"this schedule depends on a context (..., {self.context_features}), got {tuple(context.shape)}"
                )
            moved = self.net(context.to(self.ends.dtype)).unflatten(-1, (3, *self.event_shape))
            shape = (3, *(1,) * (context.dim() - 1), *self.event_shape)
            coefficients = coefficients.reshape(shape) + moved.movedim(-1 - len(self.event_shape), 0)
        return _Polynomial(self.ends[0], F.softplus(self.ends[1]), coefficients)

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}, context_features={self.context_features}"


class MeanLevel(nn.Module):
    """A denoiser that is called with the mean of the entries' noise levels, for a schedule with a gamma for each entry.

    All gammas increase in t, so that their mean and the context tell which they are.

    Args:
        denoiser: module with ``forward(z, gamma)``, or ``forward(z, gamma, context)``, and gamma of shape (...).
        event_dim: dims of one datum.

    Example:
        >>> from pyro_hvae.models import vdm
        >>> from pyro_hvae.nn import DenoisingMLP
        >>> _ = torch.manual_seed(0)
        >>> schedule = PolynomialSchedule((2,), -6.0, 4.0)
        >>> model, guide = vdm(MeanLevel(DenoisingMLP(2)), event_shape=2, num_layers=10, schedule=schedule)
        >>> guide(torch.zeros(3, 2))["z10"].shape
        torch.Size([3, 2])
    """

    def __init__(self, denoiser: nn.Module, event_dim: int = 1) -> None:
        super().__init__()
        check_count("event_dim", event_dim)
        self.denoiser = denoiser
        self.event_dim = event_dim
        self._takes_context = takes_context(denoiser)

    def forward(self, z: Tensor, gamma: Tensor, context: Any = None) -> Tensor:
        """Map z and gamma (..., *event_shape) to the denoiser's output at the mean of gamma (...)."""
        level = gamma.mean(tuple(range(-self.event_dim, 0)))
        if context is None or not self._takes_context:
            return self.denoiser(z, level)
        return self.denoiser(z, level, context)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value)) if value < 30 else value
