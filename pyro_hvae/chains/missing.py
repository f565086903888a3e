"""Missing data: drop masked entries from a likelihood, and fill the data there.

A masked entry j contributes no factor: log p(x_obs | z) = sum_{j observed} log p(x_j | z), which is the
marginal likelihood of the observed entries where p(x | z) factorises over them. The value that replaces
x_j lies inside the support, so that neither its density nor its gradient is NaN before they are dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_hvae import distributions

__all__ = ["drop_masked", "fill_value", "zero_masked"]


def zero_masked(x: Tensor, mask: Tensor | None, reader: Any = None) -> Tensor:
    """Set x to zero where it is masked, or to the ``masked_value`` of the module that reads it."""
    if mask is None:
        return x
    filled = torch.full_like(x, getattr(reader, "masked_value", 0.0))
    return torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())), x, filled)


def drop_masked(
    site: str, likelihood: TorchDistribution, mask: Tensor, x: Tensor | None, size: int
) -> tuple[TorchDistribution, Tensor | None]:
    """Drop the masked entries of a likelihood, and fill the data with values of the support there.

    Raises:
        ValueError: if single entries are masked and the likelihood does not factorise over them.
    """
    event = likelihood.event_shape
    if mask.shape not in ((size,), (size, *event)):
        raise ValueError(f"mask must have shape {(size, *event)} or {(size,)}, got {tuple(mask.shape)}.")
    base: Any = likelihood
    dims = 0
    while isinstance(base, torch.distributions.Independent):
        dims += base.reinterpreted_batch_ndims
        base = base.base_dist
    whole = mask.dim() == 1
    if base.event_dim and not whole:
        raise ValueError(
            f"the likelihood of {site!r} ({type(base).__name__}) does not factorise over the last "
            f"{base.event_dim} dim(s) of its event, so single entries can't be masked. Pass a mask of shape "
            f"{(size,)}, or use a factorised likelihood."
        )
    over = mask.reshape(mask.shape + (1,) * dims) if whole else mask
    if x is not None:
        entries = over.reshape(over.shape + (1,) * base.event_dim)
        x = torch.where(entries, x, fill_value(site, base, x))
    return base.mask(over).to_event(dims), x


def fill_value(site: str, base: TorchDistribution, x: Tensor) -> Tensor:
    """Return a value inside the support where density and gradients are finite; it broadcasts against x."""
    if isinstance(base, distributions.Columns):
        pieces = zip(base.parts, base.split(x))
        return base.joined([fill_value(site, part, piece).expand_as(piece) for part, piece in pieces])
    support: Any = base.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    low = getattr(support, "low", low)  # of distributions.Levels, whose first level is as good as any
    zero = x.new_zeros(())
    if support in (constraints.real, constraints.boolean, constraints.real_vector):
        return zero
    if low is not None and high is not None:
        return zero + (low if support.is_discrete else 0.5 * (low + high))
    if low is not None:
        return zero + (low if support.is_discrete else low + 1)
    if support is constraints.one_hot:
        return torch.eye(base.event_shape[-1], dtype=x.dtype, device=x.device)[0]
    if support is constraints.simplex:
        return x.new_full(tuple(base.event_shape), 1.0 / base.event_shape[-1])
    try:
        return transform_to(support)(x.new_zeros(tuple(base.event_shape)))
    except NotImplementedError:
        raise ValueError(
            f"there is no default value for missing data on the support {support} of {site!r} "
            f"({type(base).__name__}). Fill x with any value of the support, and pass mask through "
            "poutine.mask."
        ) from None
