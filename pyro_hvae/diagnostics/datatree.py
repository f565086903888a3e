r"""Draws of a guide, of several, or of a sampler, as an ArviZ ``DataTree``: a variational posterior is inspected as a
sampled one is.

Draws stand as ``(chain, draw)``.  A chain is a guide trained independently of the others, or a chain of a sampler:
R-hat and effective sample size of the independent draws of a single guide say nothing, so call
``arviz_stats.summary(tree, kind="stats")`` there; across guides, R-hat compares the runs.  Further dims are named from
the plates, and from ``infer={"event_dims": [...]}`` of a site, as NumPyro's converter does.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pyro_hvae.diagnostics.arviz_versions import dataset, library_versions
from pyro_hvae.diagnostics.groups import Groups
from pyro_hvae.diagnostics.sources import Source, sources_of
from pyro_hvae.diagnostics.stores import open_store

__all__ = ["GROUPS", "to_datatree"]

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

CHUNK_BYTES = 2**25
"""Bytes of values and densities that run at once, where ``chunk_size`` is not given."""


def to_datatree(
    model: Any,
    guide: Any,
    *args: Any,
    num_draws: int = 1000,
    groups: Sequence[str] | None = None,
    chunk_size: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draw from a guide and collect draws, densities and predictions in the ArviZ schema.

    ========================= ===============================================================================
    group                     content (all log-densities in nats)
    ========================= ===============================================================================
    posterior                 each latent and deterministic site, (chain, draw, its plates, its event dims)
    unconstrained_posterior   continuous latents, mapped from their support to the real line
    sample_stats              ``lp`` = log p(x, z) and ``log_q`` = log q(z|x), summed over all sites, (chain, draw);
                              ``log_weight``, their difference by datum, (chain, draw, plates common to all sites);
                              ``log_q_<site>`` of each layer and ``log_factor_<site>``, (chain, draw, its plates);
                              of a sampler ``lp`` and ``diverging``
    log_likelihood            log p(x|z) of each observed site, in no scale, pointwise (chain, draw, its plates)
    log_prior                 log p(z|its parents) of each latent site, in no scale, pointwise
    posterior_predictive      a draw of each observed site given the latents
    prior, prior_predictive   draws of the model with nothing observed, as many
    observed_data             what was observed
    constant_data             the other arguments that are tensors, as covariates
    ========================= ===============================================================================

    Entries that a mask drops have a log-density of 0.  In a minibatch ``lp`` and ``log_q`` carry the plate's scale, as
    in Pyro, and nothing else does.

    Args:
        model: Pyro program, called with ``args`` and ``kwargs``; or one for each guide, trained together with it.
        guide: Pyro program; a list of guides trained independently, which become chains; or a
            ``pyro.infer.MCMC`` that has run, whose chains and draws are taken as they are.
        num_draws: S >= 1 of each guide; a sampler has its own.
        groups: those wanted, from :data:`GROUPS`; all by default, but for the prior's where it is improper.
        chunk_size: how many draws run at once; by default so many that their values take some 30 MB.  1 runs programs
            that can't be vectorised.
        path: write the draws to this file, ``.nc`` or ``.zarr``, chunk by chunk, instead of holding them in memory.
        progress: show a bar.
        coords: labels by dim name; by default 0, 1, ..., or the indices that a plate's ``subsample=`` shows.
        dims: names of the event dims by site, where the program does not give them, or of all dims of constant data.

    Returns:
        ``xarray.DataTree``; of a ``path``, its arrays are read from the file when they are used.

    Raises:
        ValueError: for ``num_draws < 1``, unknown groups or labels that do not fit, programs that do not fit each
            other, a plate that draws a new minibatch at each run, sites that are not the same at each draw.
        FileExistsError: if there is something at ``path``.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.7))
        >>> tree = to_datatree(model, guide, torch.zeros(3), num_draws=10)
        >>> dict(tree["posterior"].sizes)
        {'chain': 1, 'draw': 10, 'data': 3}
        >>> tree["sample_stats"]["log_q_z"].dims
        ('chain', 'draw', 'data')
    """
    wanted = _wanted(groups)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    with torch.no_grad():
        sources = sources_of(model, guide, args, kwargs, num_draws, dims)
        first = sources[0]
        num_draws = first.num_draws
        left_out = _improper_prior(first, wanted, asked=groups is not None)
        wanted -= left_out
        naming = _Naming(first, _bound(first.model, args, kwargs), coords, dims, wanted, left_out)
        size = min(num_draws, chunk_size or max(1, CHUNK_BYTES // (len(sources) * first.layout.bytes_a_draw)))
        store = open_store(path, naming.tree, num_draws)
        try:
            with tqdm(total=num_draws, disable=not progress, desc="to_datatree", unit="draw") as bar:
                for start in range(0, num_draws, size):
                    count = min(size, num_draws - start)
                    store.append(start, _together([source.draw(start, count, wanted) for source in sources]))
                    bar.update(count)
            return store.finish()
        except BaseException:
            store.discard()
            raise


def _wanted(groups: Sequence[str] | None) -> frozenset[str]:
    if isinstance(groups, str):
        raise ValueError(f"groups is a list of names, got the string {groups!r}")
    unknown = sorted(set(groups or ()) - set(GROUPS))
    if unknown:
        raise ValueError(f"unknown group(s) {unknown}; there are {list(GROUPS)}")
    return frozenset(GROUPS if groups is None else groups)


def _improper_prior(source: Source, wanted: frozenset[str], *, asked: bool) -> frozenset[str]:
    """The groups of a prior that has no draws."""
    prior = wanted & {"prior", "prior_predictive"}
    if not prior or asked or source.can_draw_prior():
        return frozenset()
    return prior


def _together(parts: list[Groups]) -> Groups:
    """One chunk of every chain, as ``(chain, draw, ...)``."""
    first = parts[0]
    if any({k: set(v) for k, v in part.items()} != {k: set(v) for k, v in first.items()} for part in parts):
        raise ValueError("the guides do not draw the same sites, so they can't be chains of one tree")
    return {group: {name: np.stack([part[group][name] for part in parts]) for name in first[group]} for group in first}


def _bound(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the model gives them."""
    try:
        found = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{f"argument_{i}": value for i, value in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for name, value in found.arguments.items():
        kind = found.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": part for i, part in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


class _Naming:
    """Names, labels and attributes: what makes a tree of arrays."""

    def __init__(
        self,
        source: Source,
        bound: Mapping[str, Any],
        coords: Mapping[str, Any] | None,
        dims: Mapping[str, Sequence[str]] | None,
        wanted: frozenset[str],
        left_out: frozenset[str],
    ) -> None:
        self.layout, self.wanted = source.layout, wanted
        self.observed = source.observed() if "observed_data" in wanted else {}
        self.constant, self.constant_dims = source.constant(bound, dims) if "constant_data" in wanted else ({}, {})
        self.unconstrained = source.unconstrained_names()
        self.coords = {} if coords is None else dict(coords)
        known = {dim for site in self.layout.sites.values() for dim in site.dims} | {"chain", "draw"}
        known |= {dim for names in self.constant_dims.values() for dim in names}
        known |= {dim for names in self.unconstrained.values() for dim in names}
        unknown = sorted(set(self.coords) - known)
        if unknown:
            raise ValueError(f"coords labels {unknown}, which are no dims of the tree; there are {sorted(known)}")
        self.coords = source.indices | self.coords
        self.attrs = {
            "creation_library": "pyro_hvae",
            "model": _title(source.model),
            "guide": source.title,
            "draws": source.kind,
            "plate_scale": source.plate_scale,
            **library_versions(),
        }
        if left_out:
            self.attrs["left_out"] = f"{', '.join(sorted(left_out))}: the prior is improper"

    def tree(self, groups: Groups) -> Any:
        import xarray as xr

        made = {name: dataset(values, self._dims(name, values), self.coords) for name, values in groups.items()}
        for name, values, dims in (
            ("observed_data", self.observed, {k: self.layout.sites[k].dims for k in self.observed}),
            ("constant_data", self.constant, self.constant_dims),
        ):
            if name in self.wanted and values:
                made[name] = dataset(values, dims, self.coords, sample_dims=())
        tree = xr.DataTree.from_dict({name: made[name] for name in GROUPS if name in made})
        stamp = next((group.attrs["created_at"] for group in made.values()), None)
        tree.attrs = self.attrs if stamp is None else {"created_at": stamp, **self.attrs}
        return tree

    def _dims(self, group: str, values: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
        sites = self.layout.sites
        if group == "unconstrained_posterior":
            return self.unconstrained
        if group in ("log_likelihood", "log_prior"):
            return {name: sites[name].plate_names for name in values}
        if group == "sample_stats":
            named = {"log_weight": [plate.name for plate in self.layout.common]}
            for name in values:
                for prefix in ("log_q_", "log_factor_"):
                    site = sites.get(name.removeprefix(prefix))
                    if name.startswith(prefix) and site is not None:
                        named[name] = site.plate_names
            return named
        return {name: sites[name].dims for name in values}


def _title(program: Callable[..., Any]) -> str:
    return getattr(program, "__name__", None) or type(program).__name__
