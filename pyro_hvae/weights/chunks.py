"""Number of draws that run at once.

A run of K draws of a program needs memory for K times the entries of its largest site.  Draws are therefore made in
chunks; the results do not depend on the size of a chunk, apart from the random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

from torch import Tensor

from pyro_hvae.arguments import check_count

__all__ = ["chunks", "default_chunk", "joined"]

_ENTRIES = 20_000
"""Draws times entries that run at once by default."""


def chunks(num_draws: int, chunk_size: int | None = None) -> list[int]:
    """Split a number of draws into counts of at most ``chunk_size``.

    Args:
        num_draws: the number of draws.
        chunk_size: the number that runs at once; all of them if None.

    Returns:
        Counts that sum to ``num_draws``.  All are ``chunk_size``, except that the last may be smaller.

    Raises:
        ValueError: if either number is below 1.

    Example:
        >>> chunks(1000, 300)
        [300, 300, 300, 100]
    """
    check_count("num_draws", num_draws)
    if chunk_size is None:
        return [num_draws]
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral):
        check_count("chunk_size", chunk_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; None runs all draws at once")
    whole, rest = divmod(num_draws, chunk_size)
    return [chunk_size] * whole + [rest] * (rest > 0)


def default_chunk(entries_per_draw: int) -> int:
    """Choose a chunk size: as many draws as keep draws times entries at 20,000 or below, and at least one.

    Args:
        entries_per_draw: entries of the largest site in one draw, the product of the sizes of its plates.

    Example:
        >>> default_chunk(360), default_chunk(60_000)
        (55, 1)
    """
    return max(1, _ENTRIES // max(1, entries_per_draw))


def joined(parts: Iterable[Tensor], num_draws: int) -> Tensor:
    """Put chunks of draws together as they come, so that they are never held twice.

    Args:
        parts: chunks along the first dim, ``num_draws`` in all.
        num_draws: the number of draws.

    Example:
        >>> import torch
        >>> joined((torch.full((count,), float(count)) for count in chunks(5, 2)), 5)
        tensor([2., 2., 2., 2., 1.])
    """
    iterator = iter(parts)
    first = next(iterator)
    if len(first) == num_draws:
        return first
    whole, start = first.new_empty((num_draws, *first.shape[1:])), len(first)
    whole[:start] = first
    for part in iterator:
        whole[start : start + len(part)] = part
        start += len(part)
    return whole
