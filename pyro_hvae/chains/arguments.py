"""Number of data N, from the arguments of a program, and the shape of one datum."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count, sequence_of

__all__ = ["batch_size", "check_data_size", "event_sizes"]


def batch_size(name: str, x: Any, context: Any, mask: Any, size: int | None) -> int:
    """Return N, the common number of rows of x, context and mask, or ``size``.

    Raises:
        TypeError: for x that is no tensor, or a size that is no integer.
        ValueError: for arguments that disagree, that leave N open, or a mask of another type or shape.
    """
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"{name!r} takes data as a torch.Tensor, got {type(x).__name__}; convert with torch.as_tensor.")
    if size is not None and (isinstance(size, bool) or not isinstance(size, Integral)):
        raise TypeError(f"size is a number of data, an integer; got {size!r}.")
    rows = None if size is None else int(size)
    for what, argument in (("x", x), ("context", context), ("mask", mask)):
        if not isinstance(argument, Tensor):
            continue
        if not argument.dim():
            raise ValueError(f"{what} must have the data as its first dim, got a 0-dim tensor.")
        if rows is not None and argument.shape[0] != rows:
            raise ValueError(
                f"{what} has {argument.shape[0]} rows where {rows} are expected: x, context, mask and size "
                "must agree on the number of data."
            )
        rows = argument.shape[0]
    if rows is None:
        raise ValueError(f"{name!r} can't tell how many data to sample: pass size=, or x, context or mask with N rows.")
    if rows < 1:
        raise ValueError(f"{name!r} needs at least one datum, got {rows}.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean (True = observed), got {mask.dtype}; use mask.bool().")
        if x is not None and mask.shape not in (x.shape, x.shape[:1]):
            raise ValueError(
                f"mask must have the shape of x {tuple(x.shape)} or {tuple(x.shape[:1])}, got {tuple(mask.shape)}."
            )
    return rows


def check_data_size(data_size: int, size: int) -> None:
    """Refuse a data set that is smaller than its minibatch of ``size`` data.

    Raises:
        ValueError: with both sizes.
    """
    if not data_size >= size:  # false for NaN too
        raise ValueError(f"data_size is the size of the whole data set, got {data_size} for a batch of {size}.")


def event_sizes(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one datum as a tuple.

    Raises:
        ValueError: for no size at all, or one below 1.
    """
    sizes = (shape,) if isinstance(shape, Integral) else tuple(sequence_of("event_shape", shape))
    if not sizes:
        raise ValueError("event_shape must hold at least one size, got none.")
    for size in sizes:
        check_count("event_shape", size)
    return tuple(int(size) for size in sizes)
