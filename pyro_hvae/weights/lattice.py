"""k-hat of weights with ties, which discrete draws have.

A power law on a lattice is a power law between its points as well.  Tied weights are therefore spread evenly from their
value down to the next lower one, and the tail is fitted to these.  Weights of zero are left out before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hvae.weights.tail import (
    LEAST_DRAWS,
    TIE,
    constant_tail,
    excess,
    fit_tail,
    group_ends,
    tail_size,
    tied_cutoff,
)

__all__ = ["lattice_khat"]

_BOUND = 10
"""A largest value with so many copies bounds the weights, which then have all moments."""


def lattice_khat(log_weights: Tensor) -> Tensor:
    """Compute k-hat of rows with ties.

    Args:
        log_weights: ``(R, S)``, each row with a largest value of 0.

    Returns:
        ``(R,)``: ``-inf`` where the largest value is common, ``inf`` where fewer than 25 weights are positive, or the
        others vanish beside the largest.
    """
    ordered = log_weights.sort(-1).values
    positive = (ordered > -torch.inf).sum(-1)
    khat = ordered.new_full((len(ordered),), torch.inf)
    for count in positive.unique().tolist():  # the size of a tail depends on the number of positive weights
        if count >= LEAST_DRAWS:
            rows = (positive == count).nonzero()[:, 0]
            khat[rows] = _positive_khat(ordered[rows, -count:])
    return khat


def _positive_khat(ordered: Tensor) -> Tensor:
    """Return k-hat of rows in ascending order without weights of zero."""
    size = tail_size(ordered.shape[-1])
    tail = ordered[:, -size - 1 :]
    bounded = constant_tail(tail) | ((ordered > -TIE).sum(-1) >= _BOUND)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered.diff(dim=-1) > TIE
    tail = torch.where(tied_cutoff(tail)[:, None], _spread(ordered, first)[:, -size - 1 :], tail)
    khat = fit_tail(excess(tail - tail[:, -1:]))[0]
    khat = khat.nan_to_num(torch.inf, torch.inf, torch.inf)  # NaN: the others vanish beside the largest
    return khat.masked_fill(bounded, -torch.inf)


def _spread(ordered: Tensor, first: Tensor) -> Tensor:
    """Spread each group of equal values evenly over the gap below it; the lowest group over the gap above it.

    Args:
        ordered: ``(R, S)`` in ascending order.
        first: True at the start of each group.
    """
    count = ordered.shape[-1]
    start, after = group_ends(first)
    below = start.gather(-1, (start - 1).clamp(min=0))  # start of the group below
    value = ordered.gather(-1, start)
    gap = value - ordered.gather(-1, below)
    above = ordered.gather(-1, after[:, :1].clamp(max=count - 1))
    gap = torch.where(start == 0, above - ordered[:, :1], gap)
    index = torch.arange(count, device=ordered.device)
    place = (index - start + 0.5) / (after - start)
    return ordered - gap * (1 - place)
