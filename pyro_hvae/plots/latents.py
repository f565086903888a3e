"""Plots of latents, and of the noise levels of a diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_hvae.arguments import check_count
from pyro_hvae.plots.canvas import STYLES, array, check_names, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["latent_map", "schedule"]

_MARKERS = "osv^D<>pX*"
_MOST_CLASSES = 10


def latent_map(z: Any, labels: Any = None, *, names: tuple[str, str] = ("unit 0", "unit 1")) -> Figure:
    """Plot data in the plane of two units, or of the first two principal components of more.

    Args:
        z: (N, d), d >= 2, such as means of the guide.
        labels: of each datum, (N,): classes, which get a marker and a colour each; or more than 10 different numbers,
            which get a colour on a scale.  NaN and None are drawn in grey.
        names: of the axes, where d = 2.

    Raises:
        ValueError: for fewer than two units, or another number of labels than of data.

    Example:
        >>> latent_map(np.zeros((4, 2)), [0, 0, 1, 1]).axes[0].get_xlabel()
        'unit 0'
    """
    values = array(z)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"z must be (N, d) with d >= 2, got {values.shape}")
    if values.shape[1] > 2:
        centred = values - values.mean(0)
        _, singular, directions = np.linalg.svd(centred, full_matrices=False)
        share = singular**2 / (singular**2).sum()
        names = (f"first component ({share[0]:.0%})", f"second component ({share[1]:.0%})")
        values = centred @ directions[:2].T
    figure, (axis,) = panels(1, width=4.2, height=3.8)
    classes = np.zeros(len(values)) if labels is None else array(labels)
    if classes.shape != values.shape[:1]:
        raise ValueError(f"labels must be one for each of {len(values)} data, got shape {classes.shape}")
    absent = np.array([label is None or label != label for label in classes.tolist()], dtype=bool)
    if absent.any():
        axis.plot(*values[absent].T, ".", markersize=3, linestyle="none", color="0.7", label="no label")
    values, classes = values[~absent], classes[~absent]
    different = np.unique(classes)
    if classes.dtype.kind in "iuf" and len(different) > _MOST_CLASSES:
        drawn = axis.scatter(*values.T, c=classes, s=9, alpha=0.8, cmap="viridis")
        figure.colorbar(drawn, ax=axis)
    else:
        for number, label in enumerate(different):
            marker = _MARKERS[number % len(_MARKERS)]
            axis.plot(*values[classes == label].T, marker, markersize=3, linestyle="none", alpha=0.7, label=str(label))
        if labels is not None:
            axis.legend(frameon=False, fontsize=7, markerscale=1.5, ncols=2)
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    return figure


def schedule(*schedules: Any, labels: list[str] | None = None, points: int = 200) -> Figure:
    """Plot gamma(t) = -log SNR(t) and the noise variance sigma^2(t) of schedules.

    Args:
        schedules: :class:`pyro_hvae.diffusion.Schedule`.
        labels: a name each; their types by default.
        points: of t in [0, 1].

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
    figure, (left, right) = panels(2, width=3.4, height=3.0)
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
    left.legend(frameon=False, fontsize=8)
    return figure
