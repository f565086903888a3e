"""Plots of latents, and of the noise levels of a diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_hvae.arguments import check_count
from pyro_hvae.plots.canvas import STYLES, array, check_finite, check_names, entitle, legend, numbers, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["latent_map", "schedule"]

_MARKERS = "osv^D<>pX*"
_MOST_CLASSES = 10


def latent_map(
    z: Any,
    labels: Any = None,
    *,
    names: tuple[str, str] | None = None,
    label_name: str = "label",
    title: str | None = None,
) -> Figure:
    """Plot data in the plane of two units, or of the first two principal components of more.

    Args:
        z: (N, d), d >= 2, such as means of the guide.
        labels: of each datum, (N,): classes, which get a marker and a colour each; or more than 10 different numbers,
            which get a colour on a scale.  NaN and None are drawn in grey.
        names: of the axes, where d = 2; "unit 0" and "unit 1" by default.
        label_name: of the labels, with their unit, for the legend or the scale.
        title: of the picture, such as the model's name.

    Raises:
        ValueError: for z that is not finite, fewer than two units, no datum, another number of labels than of data, or
            names where d > 2.

    Example:
        >>> latent_map(np.zeros((4, 2)), [0, 0, 1, 1]).axes[0].get_xlabel()
        'unit 0'
    """
    values = numbers("z", z).astype(float)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"z must be (N, d) with d >= 2, got {values.shape}")
    check_finite("z", values)
    classes = np.zeros(len(values)) if labels is None else array(labels, "labels")
    if classes.shape != values.shape[:1]:
        raise ValueError(f"labels must be one for each of {len(values)} data, got shape {classes.shape}")
    if not isinstance(label_name, str):
        raise ValueError(f"label_name must be text, got {label_name!r}")
    if names is not None:
        check_names("names", names, 2)
    if values.shape[1] > 2:
        if names is not None:
            raise ValueError(
                f"names are of two units, and z has {values.shape[1]}, drawn by principal components: pass two columns "
                "of z, or leave names out"
            )
        values, names = _components(values)
    figure, (axis,) = panels(1, width=5.4, height=3.9)
    absent = np.array([label is None or label != label for label in classes.tolist()], dtype=bool)
    if absent.any():
        axis.plot(*values[absent].T, ".", markersize=3, linestyle="none", color="0.7", label="no label")
    values, classes = values[~absent], classes[~absent]
    different = _different(classes)
    if classes.dtype.kind in "iuf" and len(different) > _MOST_CLASSES:
        drawn = axis.scatter(*values.T, c=classes, s=9, alpha=0.8, cmap="viridis")
        figure.colorbar(drawn, ax=axis, label=label_name)
        if absent.any():
            axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=8, title=None)
    else:
        for number, label in enumerate(different):
            marker = _MARKERS[number % len(_MARKERS)]
            axis.plot(*values[classes == label].T, marker, markersize=3, linestyle="none", alpha=0.7, label=str(label))
        if labels is not None:
            legend(axis, markerscale=1.5, title=label_name, title_fontsize=8)
    xlabel, ylabel = ("unit 0", "unit 1") if names is None else names
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    entitle(figure, title, f"Latents of {len(absent)} data")
    return figure


def _components(values: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """Return the first two principal components, and their names with the share of the variance."""
    if len(values) < 2:
        raise ValueError("z has one datum of more than two units, and no principal components: pass two columns of z")
    centred = values - values.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    share = singular**2 / max((singular**2).sum(), np.finfo(float).tiny)
    names = (f"first component ({share[0]:.0%} of the variance)", f"second component ({share[1]:.0%})")
    return centred @ directions[:2].T, names


def _different(classes: np.ndarray) -> np.ndarray:
    """Return the different labels in order.

    Raises:
        ValueError: for labels that have no order, such as numbers beside words.
    """
    try:
        return np.unique(classes)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in classes.tolist()})
        raise ValueError(f"labels must be of one kind, got {' and '.join(kinds)}") from error


def schedule(*schedules: Any, labels: list[str] | None = None, points: int = 200, title: str | None = None) -> Figure:
    """Plot gamma(t) = -log SNR(t) and the noise variance sigma^2(t) of schedules.

    Args:
        schedules: :class:`pyro_hvae.diffusion.Schedule`.
        labels: a name each; their types by default.
        points: of t in [0, 1].
        title: of the picture.

    Example:
        >>> from pyro_hvae.diffusion import LinearSchedule
        >>> [axis.get_ylabel() for axis in schedule(LinearSchedule()).axes]
        ['gamma = -log SNR', 'noise variance']
    """
    strange = [type(one).__name__ for one in schedules if not callable(one)]
    if strange or not schedules:
        raise TypeError(f"schedules must be of pyro_hvae.diffusion, such as LinearSchedule(), got {strange or 'none'}")
    check_count("points", points, 2)
    names = [type(gamma_of).__name__ for gamma_of in schedules] if labels is None else labels
    check_names("labels", names, len(schedules))
    figure, (left, right) = panels(2, width=4.0, height=3.0)
    t = torch.linspace(0.0, 1.0, points)
    for gamma_of, name, style in zip(schedules, names, STYLES * len(schedules), strict=False):
        with torch.no_grad():
            gamma = gamma_of(t)
        left.plot(t, gamma, style, label=name)
        right.plot(t, torch.sigmoid(gamma), style, label=name)
    left.set_ylabel("gamma = -log SNR")
    right.set_ylabel("noise variance")
    for axis in (left, right):
        axis.set_xlabel("t")
    legend(right)
    entitle(figure, title, "Noise over the time of a diffusion")
    return figure
