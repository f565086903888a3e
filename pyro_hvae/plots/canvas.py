"""Figures without a window, and values as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STYLES", "array", "panels"]

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
