r"""Collect draws of one guide, of several, or of a sampler in an ArviZ ``DataTree``.

Draws have dims ``(chain, draw)``.  A chain is a guide trained independently of the others, or a chain of a sampler:
R-hat and effective sample size have no meaning for independent draws of a single guide, so call
``arviz_stats.summary(tree, kind="stats")`` there; across guides, R-hat compares the runs.  Further dims are named from
the plates, and from ``infer={"event_dims": [...]}`` of a site, as NumPyro's converter does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.mcmc.api import AbstractMCMC
from tqdm.auto import tqdm

from pyro_hvae.arguments import check_count
from pyro_hvae.diagnostics.arviz_versions import dataset, library_versions
from pyro_hvae.diagnostics.groups import Groups
from pyro_hvae.diagnostics.sources import Source, problems_of, sources_of, sources_of_sampler
from pyro_hvae.diagnostics.stores import open_store
from pyro_hvae.problem import Problem
from pyro_hvae.problem.isolation import evaluating
from pyro_hvae.weights import chunks

__all__ = ["GROUPS", "collect", "to_datatree"]

GROUPS = (
    "posterior",
    "unconstrained_posterior",
    "sample_stats",
    "log_likelihood",
    "log_prior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
)
"""The groups of a tree."""

NEW_GROUPS = ("predictions", "predictions_constant_data")
"""The groups of new data, in a tree with predictions."""

CHUNK_BYTES = 2**25
"""Bytes of values and densities that run at once by default."""


@evaluating()
def to_datatree(
    model: Any,
    guide: Any = None,
    *args: Any,
    num_draws: int = 1000,
    groups: Sequence[str] | None = None,
    chunk_size: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    predictions: Any = None,
    error: Any = None,
    **kwargs: Any,
) -> Any:
    r"""Draw from a guide and collect draws, densities and predictions in the ArviZ schema.

    ========================= ===============================================================================
    group                     content (all log-densities in nats)
    ========================= ===============================================================================
    posterior                 each latent and deterministic site, (chain, draw, its plates, its event dims); what the
                              model sums out is drawn from its posterior given the other draws, what the guide
                              enumerates from the guide
    unconstrained_posterior   continuous latents, mapped from their support to the real line
    sample_stats              ``lp`` = log p(x, z) and ``log_q`` = log q(z|x), summed over all sites, (chain, draw);
                              ``log_weight``, their difference by datum, (chain, draw, plates common to all sites);
                              ``log_q_<site>`` of each layer and ``log_factor_<site>``, (chain, draw, its plates);
                              of a sampler ``lp`` and ``diverging``
    log_likelihood            log p(x|z) of each observed site, in no scale, pointwise (chain, draw, its plates)
    log_prior                 log p(z|its parents) of each latent site, in no scale, pointwise
    posterior_predictive      a draw of each observed site given those draws
    prior, prior_predictive   draws of the model with nothing observed, as many
    observed_data             the observed data
    constant_data             the other arguments that are tensors, as covariates
    predictions               draws of the observed sites at new data, given the same draws of the guide; latents of the
                              new rows are drawn from their prior (:func:`~pyro_hvae.problem.predict`)
    predictions_constant_data the new arguments that are tensors
    ========================= ===============================================================================

    Entries that a mask drops have a log-density of 0.  In a minibatch ``lp`` and ``log_q`` carry the plate's scale, as
    in Pyro, and nothing else does.

    Args:
        model: Pyro program, called with ``args`` and ``kwargs``; or one for each guide, trained together with it; or a
            bound :class:`~pyro_hvae.problem.Problem`, and nothing else then.
        guide: Pyro program; a list of guides trained independently, which become chains; or a
            ``pyro.infer.MCMC`` that has run, whose chains and draws are used.
        num_draws: S >= 1 of each guide; a sampler has its own.
        groups: names from :data:`GROUPS`; all by default, without the prior's where it is improper.
        chunk_size: number of draws that run at once; by default their values take some 30 MB.  With 1, programs that
            can't be vectorised run too.
        path: write the draws to this file, ``.nc`` or ``.zarr``, chunk by chunk, instead of holding them in memory.
        progress: show a bar.
        coords: labels by dim name; by default 0, 1, ..., or the indices that a plate's ``subsample=`` shows.
        dims: names of the event dims by site, where the program does not give them, or of all dims of constant data.
        predictions: new data: a tuple of the model's arguments, or a mapping of its keywords; None for what is to be
            predicted.

        error: a :class:`~pyro_hvae.diagnostics.PosteriorError` of this pair and these data, kept as the group
            ``posterior_error``.

    Returns:
        ``xarray.DataTree``; of a ``path``, its arrays are read from the file when they are used.

    Raises:
        ValueError: for ``num_draws < 1``, unknown groups or labels that do not fit, programs that do not fit each
            other, sites that are not the same at each draw, or states that are summed out and all have probability 0.
        FileExistsError: if there is something at ``path``.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> tree = to_datatree(model, guide(), torch.zeros(3), num_draws=10)
        >>> dict(tree["posterior"].sizes)
        {'chain': 1, 'draw': 10, 'data': 3}
        >>> tree["sample_stats"]["log_q_z"].dims
        ('chain', 'draw', 'data')
    """
    check_count("num_draws", num_draws)
    if chunk_size is not None:
        chunks(num_draws, chunk_size)
    if isinstance(groups, str) or not isinstance(groups, (Iterable, type(None))):
        raise ValueError(f"groups is a list of names, got {groups!r}")
    labels = _Labels({} if coords is None else dict(coords), dims, error)
    with torch.no_grad():
        if isinstance(guide, AbstractMCMC):
            sources = sources_of_sampler(Problem(model, None, args, kwargs), guide, dims)
        else:
            sources = sources_of(problems_of(model, guide, args, kwargs), num_draws, dims)
        if predictions is not None:
            for source in sources:
                source.predict_at(predictions)
        elif set(NEW_GROUPS) & set(groups or ()):
            raise ValueError("the groups of predictions need new data: pass predictions=, a tuple of arguments")
        return collect(sources, groups, labels, chunk_size, path, progress)


class _Labels(NamedTuple):
    """What the caller adds: labels by dim, dims by site, and a posterior's error."""

    coords: dict[str, Any]
    dims: Mapping[str, Sequence[str]] | None
    error: Any = None


def collect(
    sources: Sequence[Source],
    groups: Sequence[str] | None = None,
    labels: _Labels | None = None,
    chunk_size: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    totals_only: bool = False,
) -> Any:
    """Build the tree of sources, each a chain; arguments as in :func:`to_datatree`.

    Args:
        totals_only: of ``sample_stats``, leave out the densities of single sites.
    """
    first, wanted = sources[0], _wanted(groups)
    left_out = _improper_prior(first, wanted, asked=groups is not None)
    wanted -= left_out
    naming = _Naming(first, labels or _Labels({}, None), wanted, left_out)
    if first.kind == "guide" and len(sources) > 1:
        naming.attrs["models"] = len({id(source.problem.model) for source in sources})
    store = open_store(path, naming.tree, first.num_draws)
    size = chunk_size or max(1, CHUNK_BYTES // (len(sources) * first.sites.draw_bytes))
    start = 0
    try:
        with tqdm(total=first.num_draws, disable=not progress, desc="to_datatree", unit="draw") as bar:
            for count in chunks(first.num_draws, size):
                drawn = _together([source.draw(start, count, wanted) for source in sources])
                store.append(start, _totals(drawn) if totals_only else drawn)
                start += count
                bar.update(count)
        return store.finish()
    except BaseException:
        store.discard()
        raise


def _wanted(groups: Sequence[str] | None) -> frozenset[str]:
    every = (*GROUPS, *NEW_GROUPS)
    unknown = sorted(set(groups or ()) - set(every))
    if unknown:
        raise ValueError(f"unknown group(s) {unknown}; there are {list(every)}")
    return frozenset(every if groups is None else groups)


def _improper_prior(source: Source, wanted: frozenset[str], *, asked: bool) -> frozenset[str]:
    """Return the groups of an improper prior, which has no draws."""
    prior = wanted & {"prior", "prior_predictive"}
    if not prior or asked or source.can_draw_prior():
        return frozenset()
    return prior


def _together(parts: list[Groups]) -> Groups:
    """Stack one chunk of every chain: ``(chain, draw, ...)``."""
    first = parts[0]
    if any({k: set(v) for k, v in part.items()} != {k: set(v) for k, v in first.items()} for part in parts):
        raise ValueError("the guides do not draw the same sites, so they can't be chains of one tree")
    return {group: {name: np.stack([part[group][name] for part in parts]) for name in first[group]} for group in first}


def _totals(drawn: Groups) -> Groups:
    stats = drawn["sample_stats"]
    return drawn | {"sample_stats": {name: stats[name] for name in ("lp", "log_q", "log_weight") if name in stats}}


class _Naming:
    """Names, labels and attributes of a tree."""

    def __init__(
        self, source: Source, labels: _Labels, wanted: frozenset[str], left_out: frozenset[str]
    ) -> None:
        self.sites, self.wanted, self.error = source.sites, wanted, labels.error
        shape = tuple(plate.size for plate in self.sites.common)
        if self.error is not None and tuple(self.error.kl.shape) != shape:
            raise ValueError(
                f"error has data of shape {tuple(self.error.kl.shape)}, and the tree {shape}: give the error of the "
                "same programs and data"
            )
        self.observed = source.observed() if "observed_data" in wanted else {}
        self.constant, self.constant_dims = source.constant(labels.dims) if "constant_data" in wanted else ({}, {})
        self.unconstrained = source.unconstrained_names()
        tree_dims = {dim for site in self.sites.sites.values() for dim in site.dims} | {"chain", "draw"}
        tree_dims |= {dim for names in self.constant_dims.values() for dim in names}
        tree_dims |= {dim for names in self.unconstrained.values() for dim in names}
        unknown = sorted(set(labels.coords) - tree_dims)
        if unknown:
            raise ValueError(f"coords labels {unknown}, which are no dims of the tree; there are {sorted(tree_dims)}")
        self.coords = source.indices | labels.coords
        self.new = source.new
        self.attrs = {"creation_library": "pyro_hvae", **source.attrs, **library_versions()}
        if left_out:
            self.attrs["left_out"] = f"{', '.join(sorted(left_out))}: the prior is improper"

    def tree(self, groups: Groups) -> Any:
        """Build the tree of these arrays."""
        import xarray as xr

        made = {
            name: dataset(values, self._dims(name, values), self.coords)
            for name, values in groups.items()
            if name != "predictions"
        }
        for name, values, dims in (
            ("observed_data", self.observed, {k: self.sites[k].dims for k in self.observed}),
            ("constant_data", self.constant, self.constant_dims),
        ):
            if name in self.wanted and values:
                made[name] = dataset(values, dims, self.coords, sample_dims=())
        if self.new is not None:
            made |= self.new.datasets(groups.get("predictions", {}), self.wanted)
        kept = {name: made[name] for name in (*GROUPS, *NEW_GROUPS) if name in made}
        if self.error is not None:
            kept["posterior_error"] = self.error.to_dataset()
        tree = xr.DataTree.from_dict(kept)
        stamp = next((group.attrs["created_at"] for group in made.values()), None)
        tree.attrs = self.attrs if stamp is None else {"created_at": stamp, **self.attrs}
        return tree

    def _dims(self, group: str, values: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
        if group == "unconstrained_posterior":
            return self.unconstrained
        if group in ("log_likelihood", "log_prior"):
            return {name: self.sites[name].plate_names for name in values}
        if group == "sample_stats":
            named = {"log_weight": [plate.name for plate in self.sites.common]}
            for name in values:
                for prefix in ("log_q_", "log_factor_"):
                    site = name.removeprefix(prefix)
                    if name.startswith(prefix) and site in self.sites:
                        named[name] = self.sites[site].plate_names
            return named
        return {name: self.sites[name].dims for name in values}
