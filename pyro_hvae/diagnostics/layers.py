r"""Active units of each layer of latents.

A unit is *active* when its posterior mean depends on the data, :math:`\mathrm{Var}_x\,\mathrm E_q[u|x] > 0.01`
(Importance Weighted Autoencoders, Burda, Grosse and Salakhutdinov, 2016).  A layer without active units has
collapsed onto its prior, whatever its term in the bound.

A unit is an entry of a site's event, at one index of the plates inside of the data.  The units of a
categorical latent are the indicators of its categories, whose variances are summed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.problem import Plate, Problem, Run, of_pair
from pyro_hvae.problem.structure import leaf_distribution
from pyro_hvae.weights import chunks, default_chunk

__all__ = ["ACTIVE_THRESHOLD", "active_units", "by_datum", "draw_runs", "mean_variances", "unit_variances"]

ACTIVE_THRESHOLD = 0.01
"""Variance of the posterior mean over the data above which a unit counts as active (Burda et al., 2016)."""


@of_pair
def mean_variances(problem: Problem, *, num_draws: int = 64) -> dict[str, Tensor]:
    r"""Compute the variance over the data of each unit's posterior mean, :math:`\mathrm{Var}_x\,\mathrm E_q[u|x]`.

    The mean of a layer is averaged over draws of the layers before it.  The variance of this average is subtracted, so
    the estimate is unbiased, and may be slightly negative for an inactive unit.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.
        num_draws: S >= 2 draws.

    Returns:
        For each latent site in a plate that the data index, a tensor of the sizes of its other plates and its event
        shape, in the units of the latent squared; of a categorical site, summed over its categories.

    Raises:
        ValueError: for ``num_draws < 2``, a single datum, where no latent is in a plate common to all sites, or
            for a latent whose posterior has no mean, such as a Cauchy distribution.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.stack([x / 2, 0 * x], -1), 0.7).to_event(1))
        >>> mean_variances(model, guide, torch.tensor([-1.0, 1.0]))["z"]
        tensor([0.5000, 0.0000])
    """
    check_data(problem, num_draws)
    with torch.no_grad():
        variances = unit_variances(draw_runs(problem, num_draws))
    for name, variance in variances.items():
        if not bool(torch.isfinite(variance).all()):
            kind = problem.structure.sites[name].guide_distribution
            raise ValueError(
                f"the guide's distribution of site '{name}' ({kind}) has no finite mean, which active units "
                "need: use a distribution with a mean, or look at mutual_information of layers"
            )
    return variances


@of_pair
def active_units(problem: Problem, *, num_draws: int = 64, threshold: float = ACTIVE_THRESHOLD) -> dict[str, int]:
    """Count the active units of each latent site.

    Args:
        num_draws: S >= 2, as in :func:`mean_variances`.
        threshold: variance above which a unit counts.

    Raises:
        ValueError: as :func:`mean_variances`.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> active_units(model, guide(slope=0.0, scale=1.0), torch.tensor([-1.0, 1.0]))
        {'z': 0}
    """
    variances = mean_variances(problem, num_draws=num_draws)
    return {name: int((variance > threshold).sum()) for name, variance in variances.items()}


def check_data(problem: Problem, num_draws: int) -> None:
    """Refuse too few draws, and fewer than two data."""
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2, got {num_draws}")
    plates = problem.structure.common
    if not plates:
        raise ValueError(
            "no plate is common to all sites, so no latent is indexed by the data: put each datum's latents and "
            "observations into one plate"
        )
    if all(plate.size < 2 for plate in plates):
        raise ValueError("a variance over data needs two data at least, better some hundreds; there is one datum")


def draw_runs(problem: Problem, num_draws: int) -> Iterable[Run]:
    """Yield runs with so many draws in all; sites that the guide enumerates are drawn."""
    for count in chunks(num_draws, max(2, default_chunk(problem.structure.entries))):
        yield problem.run(count, draw_enumerated=True)


def unit_variances(runs: Iterable[Run]) -> dict[str, Tensor]:
    """Return the variance over the data of each unit's mean, from all draws of ``runs``; NaN without a mean."""
    means: dict[str, _OverDraws] = {}
    categorical = set()
    for run in runs:
        for name in run.structure.latent:
            means.setdefault(name, _OverDraws()).add(_means(run, name))
            if _is_categorical(run, name):
                categorical.add(name)
    variances = {name: one.variance() for name, one in means.items()}
    return {name: variance.sum(-1) if name in categorical else variance for name, variance in variances.items()}


def _is_categorical(run: Run, name: str) -> bool:
    return type(leaf_distribution(run.guide_trace.nodes[name]["fn"])).__name__ == "Categorical"


class _OverDraws:
    """Mean and variance over draws of ``(S, N, *units)``, of parts as they come."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, part: Tensor) -> None:
        """Join the moments of a part (Chan, Golub and LeVeque, 1979)."""
        mean = part.mean(0)
        squares = ((part - mean) ** 2).sum(0)
        if not self.count:
            self.count, self.mean, self.squares = len(part), mean, squares
            return
        total, shift = self.count + len(part), mean - self.mean
        self.mean = self.mean + shift * (len(part) / total)
        self.squares = self.squares + squares + shift**2 * (self.count * len(part) / total)
        self.count = total

    def variance(self) -> Tensor:
        """Return the variance over data of the mean over draws."""
        noise = (self.squares / (self.count - 1)).mean(0) / self.count if self.count > 1 else 0.0
        return self.mean.var(0) - noise


def _means(run: Run, name: str) -> Tensor:
    """Return the mean of each unit given the draws before it, ``(K, N, *units)``."""
    fn = run.guide_trace.nodes[name]["fn"]
    if _is_categorical(run, name):
        return by_datum(run, name, leaf_distribution(fn).probs.expand(*fn.batch_shape, *fn.event_shape, -1), 1)
    try:
        means = fn.mean
    except NotImplementedError:
        means = run.values[name]  # a flow: draws replace the mean, and their variance is subtracted
    return by_datum(run, name, means if means.is_floating_point() else means.to(torch.get_default_dtype()))


def by_datum(run: Run, name: str, value: Tensor, more: int = 0) -> Tensor:
    """Reshape a value of a site to ``(K, N, *other plates, *event)``.

    Args:
        more: number of dims of the value to the right of the site's event.
    """
    event_dim = run.guide_trace.nodes[name]["fn"].event_dim + more
    plates = [plate for plate in run.structure.sites[name].plates if plate.dim is not None]
    placed = run.layout.put(value, plates, value.shape[value.dim() - event_dim :])
    return data_first(placed, plates, run.plates)


def data_first(placed: Tensor, plates: list[Plate], data: tuple[Plate, ...]) -> Tensor:
    """Reshape ``(K, *plates, ...)`` to ``(K, N, *other plates, ...)``, where N counts the indices of ``data``."""
    own = {plate.dim: position for position, plate in enumerate(plates, start=1)}
    moved = placed.movedim([own[plate.dim] for plate in data], list(range(1, 1 + len(data))))
    size: Any = 1
    for plate in data:
        size *= plate.size
    return moved.reshape(len(moved), size, *moved.shape[1 + len(data) :])
