r"""Information of each layer of latents about the data, and its aggregate posterior.

With the guide's :math:`q(z_l|x)` and its average over data, the aggregate posterior :math:`q(z_l)`,

.. math:: \mathrm E_x\,\mathrm{KL}(q(z_l|x)\|p(z_l)) =
          \underbrace{\mathrm E_x\,\mathrm{KL}(q(z_l|x)\|q(z_l))}_{I_q(x; z_l)} + \mathrm{KL}(q(z_l)\|p(z_l))

(ELBO surgery, Hoffman and Johnson, 2016).  The first part is the layer's information about x; the second
is the mismatch of the prior.  A layer has *collapsed* if it has neither an active unit nor information about x.  Its
term in the bound shows neither: in a bottom-up guide it may be large, or negative, for a layer without information.

A layer's marginals are mixtures over the draws of the layers before it.  They are estimated by mixtures over draws, so
information above :math:`\log N` can't be measured from N data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_hvae.bounds import LayerwiseELBO
from pyro_hvae.bounds.elbo import layer_terms
from pyro_hvae.diagnostics.layers import ACTIVE_THRESHOLD, by_datum, check_data, unit_variances
from pyro_hvae.problem import Problem, Run, of_pair
from pyro_hvae.weights import log_mean_exp

__all__ = ["COLLAPSED_INFORMATION", "layers"]

COLLAPSED_INFORMATION = 0.05
"""Nats of I_q(x; z) below which a layer without active units counts as collapsed; a choice of this library."""

_PARENTS = 256
_POINTS = 1000
"""Data at whose draws the mixtures over all data are evaluated; of more, so many at equal distances."""

_ENTRIES_AT_ONCE = 2**22

_DRAWS = 16
_COMPONENTS = 200_000
"""Draws times data that are enough for the mixtures over all data."""


@of_pair
def layers(problem: Problem, *, num_draws: int | None = None, threshold: float = ACTIVE_THRESHOLD) -> Any:
    r"""Compute term, information and active units of each layer of latents.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; some hundred data are enough.  The cost grows
            with the square of their number up to 1000 of them, and linearly from there on: divergences are then
            averages over 1000 of the data.
        num_draws: S >= 2 draws of the guide for each datum; by default 16, and fewer where draws times data would be
            above 200,000.
        threshold: variance of a posterior mean above which a unit is active.

    Returns:
        ``xarray.Dataset`` over ``layer``, in the guide's order: ``term`` (nats a datum, the layer's term in the
        bound) and ``analytic`` (whether it is a KL divergence in closed form); ``units`` and ``active_units`` (NaN if
        the posterior has no mean); ``mutual_information`` and ``aggregate_kl`` (nats); ``collapsed``.  Attributes:
        ``reconstruction`` and ``elbo`` (nats a datum) and ``information_limit`` (nats, log N).

    Raises:
        ValueError: for ``num_draws < 2``, a single datum, or where no latent is in a plate common to all sites.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> bool(layers(model, guide(slope=0.0, scale=1.0), torch.randn(50)).collapsed.sel(layer="z"))
        True
    """
    import xarray as xr

    if num_draws is None:
        num_draws = _default_draws(problem)
    check_data(problem, num_draws)
    with torch.no_grad():
        run = problem.run(num_draws, draw_enumerated=True)
        terms = _terms(problem, run)
        prior = problem.prior().run(num_draws)
        names = [name for name in run.structure.guide_order if name in run.structure.latent and name in prior.values]
        layers_of = {name: _Layer(run, name) for name in names}
        separate = _SeparateRuns(problem, num_draws, layers_of)
        variances = unit_variances(separate)
        rows: dict[str, list[Any]] = {"mutual_information": [], "aggregate_kl": []}
        for name, layer in layers_of.items():
            aggregate = layer.aggregate_density()
            own = separate.own_density(name)[layer.chosen]
            rows["mutual_information"].append(float((own - aggregate).mean()))
            rows["aggregate_kl"].append(float((aggregate - layer.mixture(prior)).mean()))
    rows["term"] = [_term(terms, name) for name in names]
    rows["analytic"] = [f"kl_{name}" in terms for name in names]
    rows["units"] = [variances[name].numel() for name in names]
    rows["active_units"] = [_active(variances[name], threshold) for name in names]
    information = np.array(rows["mutual_information"])
    inactive = np.array([not active > 0 for active in rows["active_units"]], dtype=bool)  # or NaN
    rows["collapsed"] = [bool(c) for c in inactive & (information < COLLAPSED_INFORMATION)]
    reconstruction = float(terms["reconstruction"].mean())
    size = math.prod(plate.size for plate in run.plates)
    return xr.Dataset(
        {name: ("layer", values) for name, values in rows.items()},
        coords={"layer": names},
        attrs={
            "reconstruction": reconstruction,
            "elbo": reconstruction - sum(float(v.mean()) for k, v in terms.items() if k != "reconstruction"),
            "information_limit": math.log(size),
            "num_data": size,
        },
    )


def _default_draws(problem: Problem) -> int:
    data = math.prod(plate.size for plate in problem.structure.common)
    return max(2, min(_DRAWS, _COMPONENTS // data))


def _active(variance: Tensor, threshold: float) -> float:
    return int((variance > threshold).sum()) if bool(torch.isfinite(variance).all()) else math.nan


def _terms(problem: Problem, run: Run) -> dict[str, Tensor]:
    """Return the terms of the bound by layer, from the draws of a run."""
    bound = LayerwiseELBO(run.num_particles)
    return layer_terms(run, bound.divergences(run, bound.analytic(problem)))


def _term(terms: Mapping[str, Tensor], name: str) -> float:
    """Return a layer's term in nats a datum; NaN where it is joined with that of a summed-out site."""
    term = terms.get(f"kl_{name}", terms.get(f"rate_{name}"))
    return math.nan if term is None else float(term.mean())


class _Layer:
    """One layer of a run: a point of it for each datum, and densities of points under its distributions.

    The entries of a point are its event and the plates inside of the data.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.points = by_datum(run, name, run.values[name])[0]  # (N, *inner plates, *event)
        count = len(self.points)
        self.chosen = torch.linspace(0, count - 1, min(count, _POINTS), dtype=torch.float64).round().long()
        self.event_dim = run.guide_trace.nodes[name]["fn"].event_dim
        self.data = {plate.dim for plate in run.plates}
        self.sizes = tuple(plate.size for plate in run.plates)

    @property
    def size(self) -> int:
        return len(self.points)

    def aggregate_density(self) -> Tensor:
        """Return log q(z) of the chosen points, without the components that drew them."""
        return self._mixture(self.run, drop=1)

    def mixture(self, run: Run) -> Tensor:
        """Return the log of the chosen points' mean density over the draws and data of a run."""
        return self._mixture(run, drop=0)

    def _mixture(self, run: Run, *, drop: int) -> Tensor:
        """Return the log of the mean density, a few points at a time; ``drop`` first draws where draws matter."""
        points = self.points[self.chosen.to(self.points.device)]
        width = max(1, _ENTRIES_AT_ONCE // (run.num_particles * self.points.numel()))  # all data are components
        means = []
        for part in points.split(width):
            densities = self._per_datum(run, self._placed(part, run, own=False))  # (points, K, N)
            if drop and not bool((densities.diff(dim=1).abs() < 1e-12).all()):
                densities = densities[:, drop:]
            means.append(log_mean_exp(densities.flatten(1), 1))
        return torch.cat(means)

    def own_densities(self, run: Run) -> Tensor:
        """Return the log-density of each datum's own point at the draws of a run, (K, N)."""
        return self._per_datum(run, self._placed(self.points[None], run, own=True))[0]

    def _placed(self, points: Tensor, run: Run, *, own: bool) -> Tensor:
        """Reshape points to the dims of the run's plates, ``(P, 1, dims, *event)``; each datum's own, or one."""
        info = self.run.structure.sites[self.name]
        inner = [plate for plate in info.plates if plate.dim is not None and plate.dim not in self.data]
        shape = [1] * run.layout.nesting
        for plate in inner:
            shape[plate.dim or 0] = plate.size
        if own:
            for plate in self.run.plates:
                shape[plate.dim or 0] = plate.size
            order = [plate for plate in info.plates if plate.dim is not None]
            kept = [plate for plate in order if plate.dim in self.data] + inner
            sized = points[0].reshape(*(plate.size for plate in kept), *points.shape[2 + len(inner) :])
            points = sized.movedim(list(range(len(kept))), [order.index(plate) for plate in kept])[None]
        event = points.shape[points.dim() - self.event_dim :]
        return points.reshape(len(points), 1, *shape, *event)

    def _per_datum(self, run: Run, points: Tensor) -> Tensor:
        """Sum log-densities of placed points over the plates inside of the data: (P, K, N)."""
        fn = run.guide_trace.nodes[self.name]["fn"]
        value = fn.log_prob(points)
        nesting = run.layout.nesting
        value = value.expand(len(points), *value.shape[1:])
        inner = [dim for dim in range(-nesting, 0) if dim not in self.data]
        if inner:
            value = value.sum(inner)
        return value.expand(*value.shape[:2], *self.sizes).reshape(len(value), value.shape[1], self.size)


class _SeparateRuns:
    """Runs with other draws than the points'; iteration records the densities of each datum's own point."""

    def __init__(self, problem: Problem, num_draws: int, layers_of: Mapping[str, _Layer]) -> None:
        self.problem, self.num_draws, self.layers_of = problem, num_draws, layers_of
        self.parts: dict[str, list[Tensor]] = {name: [] for name in layers_of}

    def __iter__(self) -> Iterator[Run]:
        for _ in range(_PARENTS // self.num_draws + 1):
            run = self.problem.run(self.num_draws, draw_enumerated=True)
            for name, layer in self.layers_of.items():
                self.parts[name].append(log_mean_exp(layer.own_densities(run)))
            yield run

    def own_density(self, name: str) -> Tensor:
        """Return log q(z|x) of each datum's own point, (N,), averaged over draws of the layers before it."""
        return log_mean_exp(torch.stack(self.parts[name]))
