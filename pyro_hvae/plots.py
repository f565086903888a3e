"""Pictures for people.

Every function takes arrays, tensors or a history, returns a matplotlib figure, and shows nothing by itself.  Lines
differ by marker or dash as well as by colour, so that they can be told apart in grey.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layer_kl", "reconstructions", "samples", "training_curves"]

_STYLES = ("-", "--", "-.", ":")


def training_curves(history: Any, *, terms: bool = True) -> Figure:
    """Loss, validation loss and the terms of the bound against the step.

    Args:
        history: a :class:`pyro_hvae.training.History`, or records with ``step`` and values in nats a datum.
        terms: also draw the layers' terms, in a second panel.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no record.

    Example:
        >>> figure = training_curves([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
        >>> figure.axes[0].get_ylabel()
        'nats per datum'
    """
    records = list(history)
    if not records:
        raise ValueError("the history has no record: there is nothing to draw")
    layers = sorted({key for record in records for key in record if key.startswith(("kl_", "rate_"))})
    shown = ["loss", "validation_loss", "reconstruction"]
    figure, axes = _panels(2 if terms and layers else 1, width=5.0, height=3.4)
    for axis, names in zip(axes, (shown, layers), strict=False):
        for name, style in zip(names, itertools.cycle(_STYLES)):
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                if name == "reconstruction":
                    values = tuple(-value for value in values)
                label = {"reconstruction": "-reconstruction", "validation_loss": "held-out loss"}.get(name, name)
                axis.plot(steps, values, style, label=label, linewidth=1.4)
        axis.set_xlabel("step")
        axis.set_ylabel("nats per datum")
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    return figure


def layer_kl(terms: Mapping[str, Any], *, units: Mapping[str, int] | None = None) -> Figure:
    """One bar a layer: what it costs in the bound.

    Args:
        terms: the terms of a bound (``kl_<site>``, ``rate_<site>``; others are left out), numbers or values per datum
            in nats.
        units: number of active units by site, written on the bars.

    Example:
        >>> layer_kl({"kl_z2": 1.0, "rate_z1": 3.0, "reconstruction": -9.0}).axes[0].get_ylabel()
        'nats per datum'
    """
    found = {name: float(np.mean(_array(v))) for name, v in terms.items() if name.startswith(("kl_", "rate_"))}
    if not found:
        raise ValueError(f"no layer terms (kl_<site> or rate_<site>) among {sorted(terms)}")
    figure, (axis,) = _panels(1, width=1.6 + 1.1 * len(found), height=3.2)
    hatches = ["" if name.startswith("kl_") else "//" for name in found]
    bars = axis.bar(list(found), list(found.values()), hatch=hatches, color="0.75", edgecolor="0.2", width=0.6)
    for name, bar in zip(found, bars, strict=True):
        site = name.split("_", 1)[1]
        count = "" if units is None or site not in units else f"\n{units[site]} active"
        axis.annotate(
            f"{found[name]:.2f}{count}",
            (bar.get_x() + 0.3, max(bar.get_height(), 0.0)),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axis.axhline(0.0, color="0.2", linewidth=0.8)
    axis.set_ylabel("nats per datum")
    axis.margins(y=0.2)
    return figure


def samples(images: Any, shape: tuple[int, int], *, columns: int = 10, titles: Sequence[str] | None = None) -> Figure:
    """A grid of images, grey levels from 0 (black) to 1.

    Args:
        images: ``(N, pixels)`` or ``(N, height, width)``; a list of such arrays gives one row each.
        shape: height and width in pixels.
        columns: images a row, where a single array is given.
        titles: a label for each row.

    Raises:
        ValueError: if the pixels do not fit the shape.

    Example:
        >>> len(samples(torch.zeros(4, 6), (2, 3), columns=2).axes)
        4
    """
    if isinstance(images, (list, tuple)):
        rows = [_images(part, shape) for part in images]
    else:
        whole = _images(images, shape)
        rows = [whole[start : start + columns] for start in range(0, len(whole), columns)]
    from matplotlib.figure import Figure

    across = max(len(row) for row in rows)
    left = 0.0 if titles is None else 1.1
    figure = Figure(figsize=(0.62 * across + left, 0.62 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), across, squeeze=False)
    for row, line in enumerate(rows):
        for column in range(across):
            axis = grid[row][column]
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            if column < len(line):
                axis.imshow(line[column], cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
        if titles is not None:
            grid[row][0].set_ylabel(titles[row], rotation=0, ha="right", va="center", fontsize=8)
    return figure


def reconstructions(x: Any, xhat: Any, shape: tuple[int, int], *, columns: int = 10) -> Figure:
    """Data above what the model makes of them.

    Args:
        x, xhat: ``(N, pixels)`` each; the first ``columns`` are drawn.
        shape: height and width in pixels.

    Example:
        >>> len(reconstructions(torch.zeros(3, 6), torch.zeros(3, 6), (2, 3)).axes)
        6
    """
    return samples([_array(x)[:columns], _array(xhat)[:columns]], shape, titles=["data", "reconstruction"])


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _images(values: Any, shape: tuple[int, int]) -> np.ndarray:
    array = _array(values)
    pixels = shape[0] * shape[1]
    if array.size % pixels or array.reshape(len(array), -1).shape[1] != pixels:
        raise ValueError(f"images of shape {array.shape} do not fit {shape[0]} x {shape[1]} = {pixels} pixels each")
    return array.reshape(-1, *shape)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
