"""Closed-form divergences between two distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

__all__ = ["divergence"]


def divergence(q: Any, p: Any) -> Tensor | None:
    """Return KL(q || p) in nats, of batch shape; None without a valid registered formula.

    Torch's formula for transformed distributions needs bijections, which a fold is not; that for the continuous
    Bernoulli against a uniform distribution is wrong; and masked distributions may have different masks.
    """
    if not (_has_formula(q) and _has_formula(p)):
        return None
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _has_formula(fn: Any) -> bool:
    while fn is not None:
        kind = type(fn).__name__
        if kind in ("MaskedDistribution", "FoldedDistribution", "ContinuousBernoulli"):
            return False
        if isinstance(fn, torch.distributions.TransformedDistribution) and not all(
            transform.bijective for transform in fn.transforms
        ):
            return False
        fn = getattr(fn, "base_dist", None)
    return True
