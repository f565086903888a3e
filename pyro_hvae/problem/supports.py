"""Ranges of distributions as intervals of numbers, and comparisons of intervals."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_hvae import devices
from pyro_hvae.problem.structure import leaf_distribution

__all__ = ["Interval", "bare_support", "interval_of", "reached", "support_ends", "vanishes"]

INVERSE = torch.distributions.transforms._InverseTransform


def bare_support(leaf: Any) -> Any:
    """Return the support of a distribution without declarations of event dims."""
    support = leaf.support
    while isinstance(support, constraints.independent) or type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support


class Interval:
    """Numbers between two ends: all reals, or all integers."""

    def __init__(self, low: Any, high: Any, discrete: bool) -> None:
        self.low, self.high, self.discrete = torch.as_tensor(low), torch.as_tensor(high), discrete

    def outside(self, other: Interval) -> float | None:
        """Return a number of ``other`` that is not in this interval, None if there is none."""
        below, above = self._beyond(other)
        if below:
            low, other_low = float(self.low.detach().max()), float(other.low.detach().min())
            return low - 1.0 if other_low == -math.inf else 0.5 * (low + other_low) if not self.discrete else other_low
        if above:
            high, other_high = float(self.high.detach().min()), float(other.high.detach().max())
            return high + 1.0 if other_high == math.inf else (
                0.5 * (high + other_high) if not self.discrete else other_high
            )
        return None

    def _beyond(self, other: Interval) -> tuple[bool, bool]:
        if not devices.has_values(self.low, self.high, other.low, other.high):
            return False, False
        low, high = self.low - _rounding(self.low), self.high + _rounding(self.high)
        try:
            return bool((other.low < low).any()), bool((other.high > high).any())
        except RuntimeError:  # ends of shapes that do not broadcast
            return bool(other.low.min() < low.max()), bool(other.high.max() > high.min())

    def __str__(self) -> str:
        ends = [f"{float(end.detach().min()):g}" for end in (self.low, self.high)]
        if ends == ["-inf", "inf"]:
            return "the real line"
        return f"integers from {ends[0]} to {ends[1]}" if self.discrete else f"({ends[0]}, {ends[1]})"


def support_ends(fn: Any) -> list[Tensor]:
    """Return the finite ends of a distribution's range, with their gradient; none where the range is unknown."""
    leaf = leaf_distribution(fn)
    try:
        interval = reached(leaf, bare_support(leaf))
    except (NotImplementedError, AttributeError):
        return []
    ends = [] if interval is None else [interval.low, interval.high]
    return [end for end in ends if not devices.has_values(end) or bool(torch.isfinite(end).any())]


def _rounding(end: Tensor) -> Tensor:
    """Return a tolerance for the end of an interval."""
    return 1e-6 * (1 + end.abs())


def reached(leaf: Any, support: Any) -> Interval | None:
    """Return the interval that contains all draws of a distribution.

    Torch gives the real line as the support of every transformed distribution that ends in an affine map.  Where all
    maps are monotone and elementwise, the ends of the base's interval are mapped instead.
    """
    plain = interval_of(support)
    generic = torch.distributions.TransformedDistribution
    if not isinstance(leaf, generic) or type(leaf).support is not generic.support:
        return plain
    base = leaf_distribution(leaf.base_dist)
    try:
        interval = reached(base, bare_support(base))
        for transform in _elementary(leaf.transforms):
            if interval is None or interval.discrete or transform.domain.event_dim or transform.codomain.event_dim:
                return plain
            interval = _mapped(transform, interval)
    except (NotImplementedError, AttributeError, RuntimeError, ValueError, TypeError, IndexError):
        return plain
    return plain if interval is None else interval


def _elementary(transforms: Any) -> list[Any]:
    """Return the transforms without compositions."""
    parts = []
    for transform in transforms:
        while isinstance(transform, torch.distributions.IndependentTransform):
            transform = transform.base_transform
        inner = transform.inv if isinstance(transform, INVERSE) else None
        if isinstance(transform, torch.distributions.ComposeTransform):
            parts += _elementary(transform.parts)
        elif isinstance(inner, torch.distributions.ComposeTransform):
            parts += _elementary([part.inv for part in reversed(inner.parts)])
        elif not isinstance(transform, torch.distributions.ReshapeTransform):
            parts.append(transform)
    return parts


def _mapped(transform: Any, interval: Interval) -> Interval:
    """Return the image of an interval under a monotone transform."""
    inverted = isinstance(transform, INVERSE)  # libraries rename the class
    call = transform.inv._inverse if inverted else transform._call  # without the cache of the last draw
    increasing = bool((torch.as_tensor(transform.sign) > 0).all())
    low, high = call(interval.low), call(interval.high)
    domain, codomain = interval_of(transform.domain), interval_of(transform.codomain)
    if increasing and domain is not None and codomain is not None:  # transforms clip at the ends of their domains
        low = torch.where(interval.low <= domain.low, codomain.low.to(low), low)
        high = torch.where(interval.high >= domain.high, codomain.high.to(high), high)
    return Interval(torch.minimum(low, high), torch.maximum(low, high), False)


def interval_of(support: Any) -> Interval | None:
    kind = type(support).__name__
    if kind in ("_Real", "_RealVector"):
        return Interval(-math.inf, math.inf, False)
    if kind == "_Boolean":
        return Interval(0.0, 1.0, True)
    ends = {
        "_GreaterThan": ("lower_bound", None, False),
        "_GreaterThanEq": ("lower_bound", None, False),
        "_LessThan": (None, "upper_bound", False),
        "_Interval": ("lower_bound", "upper_bound", False),
        "_HalfOpenInterval": ("lower_bound", "upper_bound", False),
        "_IntegerInterval": ("lower_bound", "upper_bound", True),
        "_IntegerGreaterThan": ("lower_bound", None, True),
        "_IntegerLessThan": (None, "upper_bound", True),
    }
    if kind not in ends:
        return None
    low, high, discrete = ends[kind]
    low_end = -math.inf if low is None else getattr(support, low)
    return Interval(low_end, math.inf if high is None else getattr(support, high), discrete)


def vanishes(leaf: Any, number: float, value: Tensor) -> bool:
    """Whether a distribution's density is zero at a number outside of its support."""
    with torch.no_grad(), pyro.validation_enabled(False):
        try:
            density = leaf.log_prob(torch.full_like(value, number))
        except (ValueError, RuntimeError, NotImplementedError, IndexError):
            return False
    if not devices.has_values(density):
        return True
    return bool((density == -math.inf).any()) and not bool(torch.isnan(density).any())
