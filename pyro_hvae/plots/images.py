"""Plots of images: samples, reconstructions, traversals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_hvae.arguments import check_count
from pyro_hvae.plots.canvas import check_names, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["reconstructions", "samples", "traversal"]


def samples(images: Any, shape: tuple[int, int], *, columns: int = 10, titles: Sequence[str] | None = None) -> Figure:
    """Plot a grid of images, grey levels from 0 (black) to 1.

    Args:
        images: ``(N, pixels)`` or ``(N, height, width)``; a list of such arrays gives one row each.
        shape: height and width in pixels.
        columns: images per row of a single array.
        titles: a label for each row.

    Raises:
        ValueError: if the pixels do not fit the shape, or there is no image.

    Example:
        >>> len(samples(torch.zeros(4, 6), (2, 3), columns=2).axes)
        4
    """
    check_count("columns", columns)
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("images is empty: there is nothing to draw")
        rows = [_images(part, shape) for part in images]
    else:
        whole = _images(images, shape)
        rows = [whole[start : start + columns] for start in range(0, len(whole), columns)]
    if titles is not None:
        check_names("titles", titles, len(rows))
    from pyro_hvae.plots.figure import Picture

    across = max(len(row) for row in rows)
    left = 0.0 if titles is None else 1.1
    figure = Picture(figsize=(0.62 * across + left, 0.62 * len(rows)), layout="constrained")
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
    """Plot data above their reconstructions.

    Args:
        x, xhat: ``(N, pixels)`` each; the first ``columns`` are drawn.
        shape: height and width in pixels.

    Example:
        >>> len(reconstructions(torch.zeros(3, 6), torch.zeros(3, 6), (2, 3)).axes)
        6
    """
    check_count("columns", columns)
    data, drawn = _images(x, shape), _images(xhat, shape)
    if len(data) != len(drawn):
        raise ValueError(f"x has {len(data)} images and xhat {len(drawn)}: pass the reconstructions of the same data")
    return samples([data[:columns], drawn[:columns]], shape, titles=["data", "reconstruction"])


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
        at: the values that each takes, in standard deviations of a standard normal prior.
        context: covariates of the datum, (c,) or (1, c), for a model that was built with a context.

    Raises:
        ValueError: for an unknown site or unit, latents or a context of several data, or no context where the model
            needs one.

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> figure = traversal(model, {"z1": torch.zeros(1, 2)}, (2, 3), units={"z1": [0, 1]}, at=(-1, 0, 1))
        >>> len(figure.axes)
        6
    """
    from pyro_hvae.chains import decode

    _check_units(latents, units)
    if context is not None:
        if context.dim() > 1 and len(context) != 1:
            raise ValueError(f"context is of one datum, (c,) or (1, c), got {tuple(context.shape)}: pass one row")
        context = context.reshape(1, -1).expand(len(at), -1)
    rows, titles = [], []
    for site, unit in ((site, unit) for site, chosen in units.items() for unit in chosen):
        moved = {name: value.expand(len(at), *value.shape[1:]).clone() for name, value in latents.items()}
        moved[site][:, unit] = torch.as_tensor(at).to(moved[site])
        with torch.no_grad():
            rows.append(decode(model, moved, size=len(at), context=context).mean)
        titles.append(f"{site}[{unit}]")
    return samples(rows, shape, titles=titles)


def _check_units(latents: Mapping[str, torch.Tensor], units: Mapping[str, Sequence[int]]) -> None:
    """Refuse latents of several data, and sites and units that they don't have."""
    several = {site: tuple(value.shape) for site, value in latents.items() if value.dim() != 2 or len(value) != 1}
    if several:
        raise ValueError(f"latents are of one datum, (1, d) each, got {several}: pass one row, as encode(guide, x[:1])")
    if not any(len(chosen) for chosen in units.values()):
        raise ValueError(f"units is empty: name some by site, as units={{{next(iter(latents), 'z1')!r}: [0, 1]}}")
    for site, chosen in units.items():
        if site not in latents:
            raise ValueError(f"no site {site!r} among the latents {sorted(latents)}")
        size = latents[site].shape[-1]
        if any(not 0 <= unit < size for unit in chosen):
            raise ValueError(f"units of {site!r} are 0 to {size - 1}, got {list(chosen)}")


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
