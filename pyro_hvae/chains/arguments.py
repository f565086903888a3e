"""What the arguments of a program say of the number of data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_size"]


def batch_size(name: str, x: Any, context: Any, mask: Any, size: int | None) -> int:
    """N, from whichever of the arguments tells it; all that do must agree."""
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"{name!r} takes data as a torch.Tensor, got {type(x).__name__}; convert with torch.as_tensor.")
    found = size
    for what, given in (("x", x), ("context", context), ("mask", mask)):
        if not isinstance(given, Tensor):
            continue
        if not given.dim():
            raise ValueError(f"{what} must have the data as its first dim, got a 0-dim tensor.")
        if found is not None and given.shape[0] != found:
            raise ValueError(
                f"{what} has {given.shape[0]} rows where {found} are expected: x, context, mask and size "
                "must agree on the number of data."
            )
        found = given.shape[0]
    if found is None:
        raise ValueError(f"{name!r} can't tell how many data to sample: pass size=, or x, context or mask with N rows.")
    if found < 1:
        raise ValueError(f"{name!r} needs at least one datum, got {found}.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean (True = observed), got {mask.dtype}; use mask.bool().")
        if x is not None and mask.shape not in (x.shape, x.shape[:1]):
            raise ValueError(
                f"mask must have the shape of x {tuple(x.shape)} or {tuple(x.shape[:1])}, got {tuple(mask.shape)}."
            )
    return found
