"""Plots of training, and of the terms of the layers."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_hvae.arguments import check_count, check_switch
from pyro_hvae.plots.canvas import STYLES, entitle, legend, panels
from pyro_hvae.plots.canvas import numbers as values_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layer_kl", "training_curves"]


def training_curves(history: Any, *, terms: bool = True, title: str | None = None) -> Figure:
    """Plot loss, validation loss and the terms of the bound against the step.

    Steps at which the divergences weigh less than at their largest weight are shaded (the warm-up of
    :class:`pyro_hvae.bounds.Regularised`): the loss there is no bound, and rises with the weight.

    Args:
        history: a :class:`pyro_hvae.training.History`, or records with ``step`` and values in nats a datum.
        terms: also draw the layers' terms, in a second panel.
        title: of the picture, such as the model's name.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no record.

    Example:
        >>> figure = training_curves([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
        >>> figure.axes[0].get_ylabel()
        'nats per datum'
    """
    check_switch("terms", terms)
    records = list(history) if isinstance(history, Iterable) else [history]
    if not records:
        raise ValueError("the history has no record: there is nothing to draw")
    if not all(isinstance(record, Mapping) and "step" in record for record in records):
        raise TypeError(
            f"history must be a History, or records such as {{'step': 1, 'loss': 3.0}}, got {str(history)[:60]!r}"
        )
    layers = sorted({key for record in records for key in record if key.startswith(("kl_", "rate_"))})
    curves = ["loss", "validation_loss", "reconstruction"]
    drawn = [record[name] for record in records for name in (*curves, *layers) if record.get(name) is not None]
    strange = [value for value in drawn if isinstance(value, bool) or not isinstance(value, numbers.Real)]
    if strange or not drawn:
        found = f"{strange[0]!r} among its losses" if strange else "no loss"
        raise ValueError(f"the history has {found}: there is nothing to draw")
    warm_ups, largest = _warm_ups(records)
    figure, axes = panels(2 if terms and layers else 1, width=6.0, height=3.4)
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
        for start, end in warm_ups:
            label = f"KL weight below {largest:g}" if start == warm_ups[0][0] else None
            axis.axvspan(start, end, color="0.9", zorder=0, label=label)
        legend(axis)
    entitle(figure, title, "Training: the bound's loss, and its terms")
    return figure


def _warm_ups(records: list[Any]) -> tuple[list[tuple[float, float]], float]:
    """Return the intervals of steps at which the divergences weigh less than at their largest, and that weight."""
    weights = [(r["step"], r["divergence_weight"]) for r in records if r.get("divergence_weight") is not None]
    largest = max((weight for _, weight in weights), default=1.0)
    spans: list[tuple[float, float]] = []
    start, before = 0.0, weights[0][1] if weights else 1.0
    for step, weight in weights:
        if before < largest and step > start:
            joined = bool(spans) and spans[-1][1] == start
            spans = [*spans[:-1], (spans[-1][0], step)] if joined else [*spans, (start, step)]
        start, before = step, weight
    return spans, largest


def layer_kl(terms: Any, *, units: Mapping[str, int] | None = None, title: str | None = None) -> Figure:
    """Plot the term of each layer in the bound, one bar each.

    Args:
        terms: the terms of a bound (``kl_<site>``, ``rate_<site>``; others are left out), numbers or values per datum
            in nats; or the result of :func:`pyro_hvae.diagnostics.layers`, with its active units.
        units: number of active units by site, written on the bars.
        title: of the picture, such as the model's name.

    Raises:
        ValueError: if there is no such term.

    Example:
        >>> layer_kl({"kl_z2": 1.0, "rate_z1": 3.0, "reconstruction": -9.0}).axes[0].get_ylabel()
        'nats per datum'
    """
    if units is not None and not isinstance(units, Mapping):
        raise TypeError(f"units must be a mapping from sites to numbers of units, got {units!r}")
    for site, count in (units or {}).items():
        check_count(f"units[{site!r}]", count, 0)
    if hasattr(terms, "data_vars") and "term" in terms:
        rows = [terms[name].values.tolist() for name in ("layer", "term", "analytic", "active_units")]
        units = dict(zip(rows[0], rows[3], strict=True)) if units is None else units
        terms = {f"{'kl' if analytic else 'rate'}_{name}": term for name, term, analytic, _ in zip(*rows, strict=True)}
    if not isinstance(terms, Mapping):
        raise TypeError(f"terms must be a mapping from names to nats, or of layers(), got {type(terms).__name__}")
    chosen = {name: values for name, values in terms.items() if name.startswith(("kl_", "rate_"))}
    means = {name: float(np.mean(values_of(name, values))) for name, values in chosen.items()}
    undefined = [name for name, mean in means.items() if not math.isfinite(mean)]
    if undefined:
        raise ValueError(f"the terms {undefined} are NaN or infinite: there is no bar of that height")
    if not means:
        raise ValueError(f"no layer terms (kl_<site> or rate_<site>) among {sorted(terms)}")
    figure, (axis,) = panels(1, width=2.6 + 1.1 * len(means), height=3.4)
    hatches = ["" if name.startswith("kl_") else "//" for name in means]
    kinds = ["divergence" if name.startswith("kl_") else "log q - log p" for name in means]
    labels = [kind if kind not in kinds[:number] else "_" + kind for number, kind in enumerate(kinds)]
    style: Any = {"hatch": hatches, "color": "0.75", "edgecolor": "0.2", "width": 0.6, "label": labels}
    bars = axis.bar(list(means), list(means.values()), **style)
    for name, bar in zip(means, bars, strict=True):
        site = name.split("_", 1)[1]
        active = "" if units is None or site not in units else f"\n{units[site]} active"
        axis.annotate(
            f"{means[name]:.2f}{active}",
            (bar.get_x() + 0.3, max(bar.get_height(), 0.0)),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axis.axhline(0.0, color="0.2", linewidth=0.8)
    axis.set_ylabel("nats per datum")
    axis.set_xlabel("term of the layer")
    axis.margins(y=0.2)
    legend(axis)
    entitle(figure, title, "Terms of the layers in the bound")
    return figure
