"""Plots of k-hat, calibration, and the evidence."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_hvae.arguments import check_number
from pyro_hvae.plots.canvas import STYLES, array, check_result, entitle, legend, numbers, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["calibration_ecdf", "evidence_bracket", "khat_scatter"]


def khat_scatter(khats: Any, *, title: str | None = None) -> Figure:
    """Plot k-hat of each datum, and of each layer, with the largest reliable value.

    Args:
        khats: of :func:`pyro_hvae.diagnostics.khats`, or its dataset.
        title: of the picture, such as the model's name.

    Raises:
        ValueError: if there is no k-hat for each datum.

    Example:
        >>> import xarray as xr
        >>> khats = xr.Dataset({"per_datum": ("data", [0.1, 0.9])}, attrs={"good_k": 0.7})
        >>> khat_scatter(khats).axes[0].get_ylabel()
        'Pareto k-hat'
    """
    data = khats.to_dataset() if hasattr(khats, "to_dataset") else khats
    if not hasattr(data, "data_vars"):
        raise TypeError(f"khats must be a result of pyro_hvae.diagnostics.khats, got {type(khats).__name__}")
    if "per_datum" not in data:
        raise ValueError("there is no k-hat for each datum: no latent of the pair is local to one")
    if "good_k" not in data.attrs or bool(data["per_datum"].isnull().any()):
        raise ValueError("khats is no whole result: it has no attrs['good_k'], the limit, or a k-hat is NaN")
    names = ["all layers"]
    values = [data["per_datum"].values.ravel()]
    if "per_layer" in data and data.sizes["layer"] > 1:
        names += [f"{name} and after" for name in data.layer.values]
        values += [data["per_layer"].sel(layer=name).values.ravel() for name in data.layer.values]
    figure, axes = panels(len(names), width=3.2, height=3.0)
    good = float(data.attrs["good_k"])
    low = min((float(v[np.isfinite(v)].min()) for v in values if np.isfinite(v).any()), default=0.0)
    for axis, name, khat in zip(axes, names, values, strict=True):
        drawn = np.where(np.isneginf(khat), low - 0.1, khat)
        over = drawn > good
        axis.plot(np.flatnonzero(~over), drawn[~over], "o", color="0.6", markersize=3, label="to be trusted")
        axis.plot(np.flatnonzero(over), drawn[over], "x", color="0.1", markersize=4, label="not")
        axis.axhline(good, color="0.2", linestyle="--", linewidth=0.9, label=f"limit, {good:.2f}")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("datum")
        axis.set_ylabel("Pareto k-hat")
    legend(axes[-1])
    entitle(figure, title, "k-hat of the importance weights of each datum")
    return figure


def calibration_ecdf(
    calibration: Any, *, names: list[str] | None = None, level: float = 0.95, title: str | None = None
) -> Figure:
    """Plot the difference of the ranks' distribution function from the uniform one, with simultaneous bands.

    Above the band on the left and below it on the right: too many ranks at both ends, draws too narrow; the other way
    round: too wide; above or below throughout: draws too high or too low.

    Args:
        calibration: of :func:`pyro_hvae.diagnostics.calibrate`.
        names: quantities to draw, all by default; each coordinate is a line.
        level: of the bands.
        title: of the picture, such as the model's name.

    Example:
        >>> from pyro_hvae.diagnostics import Calibration
        >>> ranks = {"z": np.random.default_rng(0).integers(0, 20, 100)}
        >>> calibration_ecdf(Calibration(ranks, 19)).axes[0].get_xlabel()
        'rank / draws'
    """
    from pyro_hvae.diagnostics.uniformity import ecdf_bands

    check_result("calibration", calibration, ("ranks", "num_draws"), "pyro_hvae.diagnostics.calibrate")
    check_number("level", level, 0.0, 1.0, ends="()")
    if names is not None and (not isinstance(names, (list, tuple)) or not names or set(names) - set(calibration.ranks)):
        raise ValueError(f"names must be some of {list(calibration.ranks)}, got {names!r}")
    names = list(calibration.ranks) if names is None else list(names)
    figure, axes = panels(len(names), width=3.2, height=2.8)
    for axis, name in zip(axes, names, strict=True):
        ranks = calibration.ranks[name]
        size = len(ranks)
        points, low, high = ecdf_bands(size, calibration.num_draws, level)
        axis.fill_between(points, low - points, high - points, color="0.88", step="mid", label=f"{level:.0%} band")
        for column, line in enumerate(ranks.reshape(size, -1).T):
            ecdf = (
                np.searchsorted(np.sort((line + 1) / (calibration.num_draws + 1)), points + 1e-9, side="right") / size
            )
            label = "ranks, a line for each coordinate" if column == 0 else None
            axis.plot(points, ecdf - points, STYLES[column % len(STYLES)], linewidth=1.0, label=label)
        axis.axhline(0.0, color="0.3", linewidth=0.7)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("rank / draws")
        axis.set_ylabel("ECDF - uniform")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    entitle(figure, title, "Calibration: ranks of the simulated values among draws of the guide")
    return figure


def evidence_bracket(
    bracket: Any, *, elbo: Any = None, others: Mapping[str, Any] | None = None, title: str | None = None
) -> Figure:
    """Plot the lower and upper estimate of log p(x) for each datum, sorted, with other bounds.

    Args:
        bracket: of :func:`pyro_hvae.evidence_sandwich`.
        elbo: bound for each datum, nats (N,).
        others: more values for each datum, by name.
        title: of the picture, such as the model's name.

    Example:
        >>> from types import SimpleNamespace
        >>> two = SimpleNamespace(lower=np.array([-2.0, -1.0]), upper=np.array([-1.9, -0.8]), upper_is_bound=True)
        >>> evidence_bracket(two).axes[0].get_ylabel()
        'nats'
    """
    check_result("bracket", bracket, ("lower", "upper", "upper_is_bound"), "pyro_hvae.evidence_sandwich")
    if others is not None and not isinstance(others, Mapping):
        raise TypeError(f"others must be a mapping from names to nats, got {others!r}")
    low, high = array(bracket.lower).ravel(), array(bracket.upper).ravel()
    order = np.argsort(low)
    place = np.arange(len(order))
    figure, (axis,) = panels(1, width=6.6, height=3.2)
    kind = "bound" if bracket.upper_is_bound else "estimate"
    marked = ({} if elbo is None else {"ELBO": elbo}) | dict(others or {})
    marked = {name: numbers(name, values, len(low)) for name, values in marked.items()}
    open_below = np.isneginf(low[order])
    ends = np.concatenate([low, high, *(array(values).ravel() for values in marked.values())])
    ends = ends[np.isfinite(ends)]
    floor = ends.min() - 0.1 * max(np.ptp(ends), 1.0) if open_below.any() else -np.inf
    below = np.maximum(low[order], floor)
    axis.vlines(place, below, high[order], color="0.2", linewidth=2.0, label=f"log p(x), above: {kind}")
    axis.scatter(place, high[order], marker="_", s=36, color="0.2")  # the line of an exact value has no length
    if open_below.any():
        axis.plot(place[open_below], below[open_below], "v", color="0.2", linestyle="none", label="nothing below")
    for marker, (name, values) in zip(itertools.cycle("xo+^sd*"), marked.items()):
        axis.plot(place, array(values).ravel()[order], marker, markersize=4, linestyle="none", label=name)
    axis.set_xlabel("datum, sorted")
    axis.set_ylabel("nats")
    legend(axis)
    entitle(figure, title, "log p(x) of each datum between its bounds")
    return figure
