r"""Resampling of weighted particles, with ancestors of its own for each datum.

With normalised weights :math:`W_k` each of K new particles copies an ancestor :math:`a_k`, so that the number of copies
of particle k has mean :math:`K W_k`.  ``"multinomial"`` draws the ancestors independently; ``"systematic"`` takes those
at K evenly spaced points of the cumulated weights, which start at one uniform draw, and has the smaller variance.

Reference: Comparison of resampling schemes for particle filtering (Douc, Cappé and Moulines, 2005).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hvae.bounds.weighted import softmax_of

__all__ = ["RESAMPLING", "ancestors_of", "gather"]

RESAMPLING = ("systematic", "multinomial", "none")


def ancestors_of(log_weights: Tensor, scheme: str) -> Tensor:
    """Draw the index of each new particle's ancestor.

    Args:
        log_weights: (K, *plates), not normalised; where all are -inf, ancestors are drawn with equal weights.
        scheme: ``"systematic"`` or ``"multinomial"``.

    Returns:
        Indices (K, *plates), drawn without gradient.

    Example:
        >>> weights = torch.tensor([[0.5], [0.0], [0.25], [0.25]])
        >>> ancestors_of(weights.log(), "systematic").squeeze(-1).tolist()
        [0, 0, 2, 3]
    """
    count = log_weights.shape[0]
    cumulated = softmax_of(log_weights.detach()).movedim(0, -1).cumsum(-1)
    cumulated = cumulated / cumulated[..., -1:]
    if scheme == "systematic":
        steps = torch.arange(count, dtype=cumulated.dtype, device=cumulated.device)
        points = (steps + torch.rand_like(cumulated[..., :1])) / count
    else:
        points = torch.rand_like(cumulated)
    # particles of weight zero have no interval; the last end is 1, and rounding may bring a point to it
    points = points.clamp(max=1.0 - torch.finfo(points.dtype).eps)
    indices = torch.searchsorted(cumulated.contiguous(), points.contiguous(), right=True)
    return indices.clamp(max=count - 1).movedim(-1, 0)


def gather(value: Tensor, ancestors: Tensor) -> Tensor:
    """Return a value (K, *plates, *event) of the ancestors (K, *plates)."""
    event = value.shape[ancestors.dim() :]
    index = ancestors.reshape(ancestors.shape + (1,) * len(event)).expand(*ancestors.shape, *event)
    if value.shape[: ancestors.dim()] != ancestors.shape:
        value = value.expand(index.shape)
    return value.gather(0, index)
