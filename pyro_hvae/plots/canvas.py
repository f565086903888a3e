"""Figures without a window, and values as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STYLES", "array", "check_names", "check_result", "numbers", "panels"]

STYLES = ("-", "--", "-.", ":")
"""Dashes of lines, for prints in grey."""


def panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Any]]:
    from pyro_hvae.plots.figure import Picture

    figure = Picture(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def numbers(name: str, value: Any, size: int | None = None) -> np.ndarray:
    """Return numbers as an array; refuse what is none, what is empty, and another number of values than ``size``.

    Raises:
        ValueError: naming the argument.
    """
    values = array(value)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers, got {type(value).__name__} {str(value)[:40]!r}")
    if not values.size:
        raise ValueError(f"{name} is empty: there is nothing to draw")
    if size is not None and values.size != size:
        raise ValueError(f"{name} must have one value for each of {size} data, got {values.size}")
    return values


def check_result(name: str, value: Any, attributes: tuple[str, ...], source: str) -> None:
    """Refuse what lacks an attribute of a result.

    Raises:
        TypeError: naming the argument, and the function that makes such results.
    """
    if not all(hasattr(value, attribute) for attribute in attributes):
        raise TypeError(f"{name} must be a result of {source}, got {type(value).__name__}")


def check_names(name: str, value: Any, size: int) -> None:
    """Refuse what is no sequence of so many names.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, (list, tuple)) or len(value) != size:
        raise ValueError(f"{name} must be a list of {size} names, one for each, got {value!r}")
