"""Figures without a window, and values as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STYLES", "array", "check_finite", "check_names", "check_result", "entitle", "legend", "numbers", "panels"]

STYLES = ("-", "--", "-.", ":")
"""Dashes of lines, for prints in grey."""


def panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Any]]:
    from pyro_hvae.plots.figure import Picture

    figure = Picture(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def entitle(figure: Any, title: str | None, default: str) -> None:
    """Write the title above all panels; ``default`` where there is None.

    Raises:
        ValueError: for a title that is no text.
    """
    if title is not None and not (isinstance(title, str) and title.strip()):
        raise ValueError(f"title must be text, or None for {default!r}; got {title!r}")
    figure.suptitle(default if title is None else title, fontsize=10)


def legend(axis: Any, **options: Any) -> None:
    """Write the legend on the right of a panel, where it covers nothing."""
    options = {"frameon": False, "fontsize": 8, "borderaxespad": 0.0} | options
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), **options)


def array(value: Any, name: str = "values") -> np.ndarray:
    """Return a tensor, an array or a sequence as an array.

    Raises:
        ValueError: for rows of different lengths, naming the argument.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must have rows of one length, got {str(value)[:40]}") from error


def numbers(name: str, value: Any, size: int | None = None) -> np.ndarray:
    """Return numbers as an array; refuse what is none, what is empty, and another number of values than ``size``.

    Raises:
        ValueError: naming the argument.
    """
    values = array(value, name)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers, got {type(value).__name__} {str(value)[:40]!r}")
    if not values.size:
        raise ValueError(f"{name} is empty: there is nothing to draw")
    if size is not None and values.size != size:
        raise ValueError(f"{name} must have one value for each of {size} data, got {values.size}")
    return values


def check_finite(name: str, values: np.ndarray) -> None:
    """Refuse NaN and infinity, which have no place in a picture.

    Raises:
        ValueError: naming the argument, and the number of such values.
    """
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} of {values.size} values that are NaN or infinite")


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
    texts = isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
    if not texts or len(value) != size:
        raise ValueError(f"{name} must be a list of {size} names, one for each, got {value!r}")
