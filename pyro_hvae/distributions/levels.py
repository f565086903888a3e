"""Equally spaced grey levels: the support of image likelihoods, and a Gaussian restricted to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["BinnedGaussian", "LevelDistribution", "Levels", "check_levels"]

_ROUNDINGS = 16  # distance from a level that is allowed, in rounding errors of the value's dtype
_LARGEST_TOLERANCE = 0.25  # in steps, for dtypes that barely resolve the levels


class Levels(constraints.Constraint):
    """The values low, low + step, ..., high: ``num_bins`` of them, up to rounding errors of the value's dtype.

    Args:
        num_bins: number of levels n >= 2.
        low: first level.
        high: last level.

    Example:
        >>> Levels(3, 0.0, 1.0).check(torch.tensor([0.0, 0.5, 0.51, 1.5])).tolist()
        [True, True, False, False]
    """

    is_discrete = True
    event_dim = 0

    def __init__(self, num_bins: int, low: float, high: float) -> None:
        self.num_bins, self.low, self.high = num_bins, low, high
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each value is one of the levels."""
        per_unit = (self.num_bins - 1) / (self.high - self.low)
        eps = torch.finfo(value.dtype if value.is_floating_point() else torch.get_default_dtype()).eps
        tolerance = min(_LARGEST_TOLERANCE, _ROUNDINGS * eps * max(abs(self.low), abs(self.high)) * per_unit)
        if not value.is_floating_point() or eps > torch.finfo(torch.float32).eps:
            value = value.to(torch.get_default_dtype())
        index = (value - self.low) * per_unit
        nearest = index.round().clamp(0, self.num_bins - 1)
        return (index - nearest).abs() <= tolerance

    def __repr__(self) -> str:
        return f"Levels(num_bins={self.num_bins}, low={self.low:g}, high={self.high:g})"


def check_levels(num_bins: int, low: float, high: float) -> None:
    """Check the number of levels and their ends.

    Raises:
        ValueError: for fewer than two levels, or ends that are not finite or not in order.
    """
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 2:
        raise ValueError(
            f"num_bins must be >= 2, got {num_bins!r}: give an integer; a single level has probability 1."
        )
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        raise ValueError(f"high must be greater than low, got low={low}, high={high}; both must be finite.")


class LevelDistribution(TorchDistribution):
    """Base class of distributions on levels; parameters are the tensors that ``arg_constraints`` names."""

    has_enumerate_support = True
    num_bins: int
    low: float
    high: float

    def __init__(
        self, parameters: Sequence[Tensor | float], levels: tuple[int, float, float], validate_args: bool | None
    ) -> None:
        num_bins, low, high = levels
        check_levels(num_bins, low, high)
        self.num_bins, self.low, self.high = num_bins, float(low), float(high)
        tensors = broadcast_all(*parameters)
        for name, tensor in zip(self.arg_constraints, tensors, strict=True):
            setattr(self, name, tensor)
        super().__init__(tensors[0].shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        new.num_bins, new.low, new.high = self.num_bins, self.low, self.high
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the logarithm of the probability of each level, in nats; shape: ``value`` broadcast with the batch."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_masses(((value - self.low) / self.step).round())

    def _log_masses(self, index: Tensor) -> Tensor:
        """Return log-probabilities of levels by their numbers 0, ..., num_bins - 1."""
        raise NotImplementedError

    @property
    def support(self) -> Levels:
        return Levels(self.num_bins, self.low, self.high)

    @property
    def step(self) -> float:
        """Distance of two levels, in the units of x."""
        return (self.high - self.low) / (self.num_bins - 1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all levels along a new first dim: (num_bins, *batch), or (num_bins, 1, ..., 1) if not ``expand``."""
        levels = self._levels().reshape((-1,) + (1,) * len(self.batch_shape))
        return levels.expand((-1, *self.batch_shape)) if expand else levels

    def _levels(self) -> Tensor:
        like = getattr(self, next(iter(self.arg_constraints)))
        return self.low + torch.arange(self.num_bins, dtype=like.dtype, device=like.device) * self.step


class BinnedGaussian(LevelDistribution):
    r"""Levels with probability in proportion to a Gaussian density.

    .. math:: P(x = c_k) = \mathrm{softmax}_k\bigl(-\tfrac12 (c_k - \mu)^2 / \sigma^2\bigr)

    Not reparameterised: it is meant for observations. ``mean``, ``log_prob`` and ``sample`` take memory for all levels.

    Args:
        loc: :math:`\mu`, any shape, in the units of x.
        scale: :math:`\sigma > 0`, broadcast with ``loc``.
        num_bins: number of levels n >= 2.
        low: first level.
        high: last level, > low.

    Raises:
        ValueError: for ``num_bins < 2`` or ``high <= low``; from ``log_prob``, with validation on, for a value that is
            not one of the levels.

    Reference: Variational Diffusion Models (Kingma, Salimans, Poole and Ho, 2021).

    Example:
        >>> p = BinnedGaussian(torch.tensor(0.0), torch.tensor(1.0), num_bins=3)
        >>> p.log_prob(p.enumerate_support()).exp()
        tensor([0.2741, 0.4519, 0.2741])
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        num_bins: int = 256,
        low: float = -1.0,
        high: float = 1.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__((loc, scale), (num_bins, low, high), validate_args)

    def _log_masses(self, index: Tensor) -> Tensor:
        index = index.clamp(0, self.num_bins - 1).long()
        scores, index = torch.broadcast_tensors(self._logits().log_softmax(-1), index.unsqueeze(-1))
        return scores.gather(-1, index[..., :1]).squeeze(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw levels; shape: ``sample_shape`` + batch."""
        with torch.no_grad():
            index = torch.distributions.Categorical(logits=self._logits()).sample(torch.Size(sample_shape))
            return self.low + index.to(self.loc.dtype) * self.step

    @property
    def mean(self) -> Tensor:
        return (self._logits().softmax(-1) * self._levels()).sum(-1)

    @property
    def variance(self) -> Tensor:
        return (self._logits().softmax(-1) * (self._levels() - self.mean.unsqueeze(-1)) ** 2).sum(-1)

    def _logits(self) -> Tensor:
        return -0.5 * ((self._levels() - self.loc.unsqueeze(-1)) / self.scale.unsqueeze(-1)) ** 2
