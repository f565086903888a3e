"""Plots of training, and of the terms of the layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_hvae.plots.canvas import STYLES, array, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layer_kl", "training_curves"]


def training_curves(history: Any, *, terms: bool = True) -> Figure:
    """Plot loss, validation loss and the terms of the bound against the step.

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
    curves = ["loss", "validation_loss", "reconstruction"]
    figure, axes = panels(2 if terms and layers else 1, width=5.0, height=3.4)
    for axis, names in zip(axes, (curves, layers), strict=False):
        for name, style in zip(names, itertools.cycle(STYLES)):
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


def layer_kl(terms: Any, *, units: Mapping[str, int] | None = None) -> Figure:
    """Plot the term of each layer in the bound, one bar each.

    Args:
        terms: the terms of a bound (``kl_<site>``, ``rate_<site>``; others are left out), numbers or values per datum
            in nats; or the result of :func:`pyro_hvae.diagnostics.layers`, with its active units.
        units: number of active units by site, written on the bars.

    Raises:
        ValueError: if there is no such term.

    Example:
        >>> layer_kl({"kl_z2": 1.0, "rate_z1": 3.0, "reconstruction": -9.0}).axes[0].get_ylabel()
        'nats per datum'
    """
    if hasattr(terms, "data_vars") and "term" in terms:
        rows = [terms[name].values.tolist() for name in ("layer", "term", "analytic", "active_units")]
        units = dict(zip(rows[0], rows[3], strict=True)) if units is None else units
        terms = {f"{'kl' if analytic else 'rate'}_{name}": term for name, term, analytic, _ in zip(*rows, strict=True)}
    means = {name: float(np.mean(array(v))) for name, v in terms.items() if name.startswith(("kl_", "rate_"))}
    if not means:
        raise ValueError(f"no layer terms (kl_<site> or rate_<site>) among {sorted(terms)}")
    figure, (axis,) = panels(1, width=1.6 + 1.1 * len(means), height=3.2)
    hatches = ["" if name.startswith("kl_") else "//" for name in means]
    bars = axis.bar(list(means), list(means.values()), hatch=hatches, color="0.75", edgecolor="0.2", width=0.6)
    for name, bar in zip(means, bars, strict=True):
        site = name.split("_", 1)[1]
        count = "" if units is None or site not in units else f"\n{units[site]} active"
        axis.annotate(
            f"{means[name]:.2f}{count}",
            (bar.get_x() + 0.3, max(bar.get_height(), 0.0)),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axis.axhline(0.0, color="0.2", linewidth=0.8)
    axis.set_ylabel("nats per datum")
    axis.margins(y=0.2)
    return figure
