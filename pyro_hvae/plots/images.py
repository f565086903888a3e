"""Plots of images: samples, reconstructions, traversals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_hvae.arguments import check_count, sequence_of
from pyro_hvae.plots.canvas import check_finite, check_names, entitle, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["reconstructions", "samples", "traversal"]


def samples(
    images: Any,
    shape: tuple[int, int],
    *,
    columns: int = 10,
    titles: Sequence[str] | None = None,
    data: Any = None,
    title: str | None = None,
) -> Figure:
    """Plot a grid of images, grey levels from 0 (black) to 1.

    Args:
        images: ``(N, pixels)`` or ``(N, height, width)``; a list of such arrays gives one row each.
        shape: height and width in pixels.
        columns: images per row of a single array.
        titles: a label for each row.
        data: real images, to compare; the first N are drawn in a grid of their own, on the left.
        title: of the picture, such as the model's name.

    Raises:
        ValueError: if the pixels do not fit the shape, or there is no image.

    Example:
        >>> len(samples(torch.zeros(4, 6), (2, 3), columns=2).axes)
        4
        >>> len(samples(torch.zeros(4, 6), (2, 3), columns=2, data=torch.ones(9, 6)).axes)
        8
    """
    check_count("columns", columns)
    rows = _rows(images, shape, columns)
    if titles is not None:
        check_names("titles", titles, len(rows))
    real = None if data is None else _rows(data, shape, columns, sum(map(len, rows)))[: len(rows)]
    from pyro_hvae.plots.figure import Picture

    across = max(len(row) for row in rows)
    if real is not None:
        across = max(across, *(len(row) for row in real))
    left = 0.0 if titles is None else 1.1
    width = (0.62 * across + left) * (1 if real is None else 2)
    height = 0.62 * len(rows) + (0.35 if real is None else 0.6)
    figure = Picture(figsize=(max(width, 3.2), height), layout="constrained")
    if real is None:
        _draw(figure, rows, across, titles)
    else:
        beside = figure.subfigures(1, 2, wspace=0.04)
        for part, name, lines in zip(beside, ("data", "samples"), (real, rows), strict=True):
            _draw(part, lines, across, titles, len(rows))
            part.suptitle(name, fontsize=9)
    entitle(figure, title, "Images, grey levels from 0 to 1" if real is None else "Data and samples")
    return figure


def _rows(images: Any, shape: tuple[int, int], columns: int, count: int | None = None) -> list[np.ndarray]:
    """Return rows of images, of a list of arrays or of the first ``count`` in one array."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("images is empty: there is nothing to draw")
        return [_images(part, shape) for part in images]
    whole = _images(images, shape)[:count]
    return [whole[start : start + columns] for start in range(0, len(whole), columns)]


def _draw(
    figure: Any, rows: list[np.ndarray], across: int, titles: Sequence[str] | None = None, down: int | None = None
) -> None:
    """Draw rows of images from the top left of a grid; places without an image hold nothing."""
    grid = figure.subplots(len(rows) if down is None else down, across, squeeze=False)
    for row, places in enumerate(grid):
        for column, axis in enumerate(places):
            if row >= len(rows) or column >= len(rows[row]):
                axis.remove()
                continue
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            axis.imshow(rows[row][column], cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
        if titles is not None and row < len(rows):
            places[0].set_ylabel(titles[row], rotation=0, ha="right", va="center", fontsize=8)


def reconstructions(
    x: Any, xhat: Any, shape: tuple[int, int], *, columns: int = 10, title: str | None = None
) -> Figure:
    """Plot data above their reconstructions.

    Args:
        x, xhat: ``(N, pixels)`` each; the first ``columns`` are drawn.
        shape: height and width in pixels.
        columns: images per row.
        title: of the picture, such as the model's name.

    Example:
        >>> len(reconstructions(torch.zeros(3, 6), torch.zeros(3, 6), (2, 3)).axes)
        6
    """
    check_count("columns", columns)
    data, drawn = _images(x, shape), _images(xhat, shape)
    if len(data) != len(drawn):
        raise ValueError(f"x has {len(data)} images and xhat {len(drawn)}: pass the reconstructions of the same data")
    title = "Data and their reconstructions" if title is None else title
    return samples([data[:columns], drawn[:columns]], shape, titles=["data", "reconstruction"], title=title)


def traversal(
    model: Any,
    latents: Any,
    shape: tuple[int, int],
    *,
    units: Mapping[str, Sequence[int]],
    at: Sequence[float] = (-2.5, -1.875, -1.25, -0.625, 0.0, 0.625, 1.25, 1.875, 2.5),
    context: torch.Tensor | None = None,
) -> Figure:
    """Plot the effect of units on the image: one row per unit, one image per value, with all others fixed.

    Args:
        model: a chain with the one-layer decoder p(x | z_1), or any :class:`~pyro_hvae.chains.TopDown`.
        latents: values by site of one datum, (1, d) each, as :func:`pyro_hvae.encode` gives them.
        shape: height and width in pixels.
        units: those that are moved, by site.
        at: the values that each takes, in standard deviations of a standard normal prior; written above the columns.
        context: covariates of the datum, (c,) or (1, c), for a model that was built with a context.

    Raises:
        TypeError: for a model that is no chain, or latents that are no tensors.
        ValueError: for an unknown site or unit, latents or a context of several data, values that are not finite, or no
            context where the model needs one.

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> figure = traversal(model, {"z1": torch.zeros(1, 2)}, (2, 3), units={"z1": [0, 1]}, at=(-1, 0, 1))
        >>> len(figure.axes)
        6
    """
    from pyro_hvae.chains import TopDown, decode

    if not isinstance(model, TopDown):
        raise TypeError(f"model must be a generative chain, TopDown(...), got {type(model).__name__}")
    _check_latents(model, latents)
    _check_units(latents, units)
    values = numbers("at", at)
    check_finite("at", values)
    if values.ndim != 1:
        raise ValueError(f"at must be a sequence of numbers, got shape {values.shape}")
    if context is not None:
        if not isinstance(context, torch.Tensor):
            raise TypeError(f"context must be a tensor, (c,) or (1, c), got {type(context).__name__}")
        if context.dim() not in (1, 2) or (context.dim() == 2 and len(context) != 1):
            raise ValueError(f"context is of one datum, (c,) or (1, c), got {tuple(context.shape)}: pass one row")
        check_finite("context", numbers("context", context))
        context = context.reshape(1, -1).expand(len(values), -1)
    rows, titles = [], []
    for site, unit in ((site, unit) for site, chosen in units.items() for unit in chosen):
        moved = {name: value.expand(len(values), *value.shape[1:]).clone() for name, value in latents.items()}
        moved[site][:, unit] = torch.as_tensor(values).to(moved[site])
        with torch.no_grad():
            rows.append(decode(model, moved, size=len(values), context=context).mean)
        titles.append(f"{site}[{unit}]")
    figure = samples(rows, shape, titles=titles, title=f"{model.name}: one unit moved at a time")
    for axis, value in zip(figure.axes, values.tolist(), strict=False):
        axis.set_title(f"{value:.3g}", fontsize=7)
    figure.supxlabel("value of the unit, in standard deviations of a standard normal prior", fontsize=8)
    figure.set_figheight(figure.get_figheight() + 0.4)
    return figure


def _check_latents(model: Any, latents: Any) -> None:
    """Refuse latents that are none of the model's, are no tensors of one datum, or are not finite."""
    if not isinstance(latents, Mapping) or not latents:
        raise TypeError(f"latents must be tensors by site, as encode(guide, x[:1]) gives them, got {latents!r}")
    for site, value in latents.items():
        if site not in model.latents:
            raise ValueError(f"no site {site!r} among the latents {list(model.latents)} of {model.name!r}")
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"the latents of {site!r} must be a tensor (1, d), got {type(value).__name__}")
    several = {site: tuple(value.shape) for site, value in latents.items() if value.dim() != 2 or len(value) != 1}
    if several:
        raise ValueError(f"latents are of one datum, (1, d) each, got {several}: pass one row, as encode(guide, x[:1])")
    for site, value in latents.items():
        check_finite(f"the latents of {site!r}", numbers(f"the latents of {site!r}", value))


def _check_units(latents: Mapping[str, torch.Tensor], units: Any) -> None:
    """Refuse sites and units that the latents don't have."""
    if not isinstance(units, Mapping):
        raise TypeError(f"units must be places by site, as units={{{next(iter(latents))!r}: [0, 1]}}, got {units!r}")
    for site, chosen in units.items():
        if site not in latents:
            raise ValueError(f"no site {site!r} among the latents {sorted(latents)}")
        for unit in sequence_of(f"units of {site!r}", chosen):
            check_count(f"units of {site!r}", unit, 0)
        size = latents[site].shape[-1]
        if any(not 0 <= unit < size for unit in chosen):
            raise ValueError(f"units of {site!r} are 0 to {size - 1}, got {list(chosen)}")
    if not any(len(chosen) for chosen in units.values()):
        raise ValueError(f"units is empty: name some by site, as units={{{next(iter(latents))!r}: [0, 1]}}")


def _images(values: Any, shape: tuple[int, int]) -> np.ndarray:
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shape must be (height, width) in pixels, got {shape!r}")
    for name, size in zip(("height", "width"), shape, strict=True):
        check_count(f"the {name} in shape", size)
    images = numbers("images", values)
    pixels = shape[0] * shape[1]
    if images.ndim == 0 or images.size % pixels or images.reshape(len(images), -1).shape[1] != pixels:
        raise ValueError(f"images of shape {images.shape} do not fit {shape[0]} x {shape[1]} = {pixels} pixels each")
    return images.reshape(-1, *shape)
