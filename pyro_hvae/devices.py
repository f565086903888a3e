"""What a device can do with the values of its tensors; the ground of both towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["close", "has_values"]


def has_values(*tensors: Any) -> bool:
    """Return whether all tensors have values; those of torch's ``meta`` device have shapes and dtypes alone.

    For checks of values that a program gets once, before its first step.  Arguments that are no tensors have values.

    Example:
        >>> import torch
        >>> has_values(torch.zeros(2), 3.0), has_values(torch.zeros(2, device="meta"))
        (True, False)
    """
    return not any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors)


def close(first: Tensor, second: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Return whether two tensors agree up to round-off, NaN with NaN; without values, whether their shapes do."""
    if not has_values(first, second):
        return first.shape == second.shape
    return torch.allclose(first, second, rtol=rtol, atol=atol, equal_nan=True)
