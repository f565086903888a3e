"""The values of discrete sites, for moves that enumerate them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_hvae.problem.structure import leaf_distribution

__all__ = ["Values", "require_finite", "require_fixed_range", "values_of"]


class Values(NamedTuple):
    """All values of one entry of a discrete site.

    Attributes:
        points: ``(V, *event)``, with the event of one entry: none, or a vector for one-hot categories.
        event_dim: number of its dims.
    """

    points: Tensor
    event_dim: int

    def contains(self, value: Tensor) -> Tensor:
        """Return which entries of a value are among the points."""
        if not self.event_dim:
            return torch.isin(value.to(self.points.dtype), self.points) & (value == value.round())
        return (value.unsqueeze(-2) == self.points).all(-1).any(-1)


def values_of(fn: Any) -> Values:
    """Return the values of one entry of a distribution whose range is finite.

    A Binomial whose totals differ has those up to the largest; beyond its own total an entry has no density.
    """
    leaf = leaf_distribution(fn)
    try:
        points = leaf.enumerate_support(expand=False)
    except NotImplementedError:
        points = torch.arange(1 + int(leaf.total_count.max()), dtype=leaf.total_count.dtype)
        points = points.to(leaf.total_count.device)
    return Values(points.reshape(len(points), *leaf.event_shape), len(leaf.event_shape))


def require_finite(name: str, fn: Any) -> None:
    """Refuse a discrete site whose values can't be enumerated.

    Raises:
        ValueError: with a form of the site that has finitely many values.
    """
    leaf = leaf_distribution(fn)
    kind = type(leaf).__name__
    why = None
    if not leaf.has_enumerate_support:
        why = f"its values can't be enumerated ({kind})"
    elif len(leaf.event_shape) > 1:
        why = f"its event has {len(leaf.event_shape)} dims ({kind})"
    else:
        try:
            values_of(fn)
        except (NotImplementedError, AttributeError) as error:
            why = f"its values can't be enumerated ({kind}: {error})"
        if why is None and kind != "Binomial" and _totals_differ(leaf):
            why = f"its totals differ ({kind})"
    if why is not None:
        raise ValueError(
            f"site '{name}' is discrete, and {why}, as Gibbs moves do: write it as a Categorical with a largest value "
            "n, such as dist.Categorical(logits=dist.Poisson(rate).log_prob(torch.arange(n + 1.0))) for a Poisson"
        )


def require_fixed_range(name: str, fn: Any) -> None:
    """Refuse a site whose number of values depends on other draws.

    Args:
        fn: of a run with several chains, which are the leftmost dim.

    Raises:
        ValueError: naming the site.
    """
    totals = getattr(leaf_distribution(fn), "total_count", None)
    if isinstance(totals, Tensor) and totals.dim() and bool((totals != totals[:1]).any()) and len(totals) > 1:
        batch = len(fn.batch_shape)
        if totals.dim() == batch:  # the leftmost dim is that of the chains
            raise ValueError(
                f"site '{name}' has a total_count that depends on other draws, so that Gibbs moves don't know its "
                "values: draw it from a guide with a fixed total_count"
            )


def _totals_differ(leaf: Any) -> bool:
    totals = getattr(leaf, "total_count", None)
    return isinstance(totals, Tensor) and bool((totals != totals.reshape(-1)[0]).any())
