"""Where draws come from: a guide, several, or a sampler that has run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pyro.infer import config_enumerate
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.poutine import block
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_hvae.diagnostics import groups as collect
from pyro_hvae.diagnostics.layout import Layout, layout_of
from pyro_hvae.traces import Evaluator, Reading, read
from pyro_hvae.traces.running import isolated
from pyro_hvae.traces.structure import sample_sites

__all__ = ["Source", "sources_of"]


class Source:
    """Draws of one chain: those of a guide, made when asked for.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.
        num_draws: how many there will be.
        dims: names of event dims by site.
    """

    kind = "guide"
    weighed = True

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: Mapping[str, Any],
        num_draws: int,
        dims: Mapping[str, Sequence[str]] | None,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.num_draws = num_draws
        self.title = getattr(guide, "__name__", None) or type(guide).__name__
        with isolated(model, guide):
            self.probe = self.one()
            trace = self.probe.model_trace
            if any(site.role == "enumerated" for site in self.probe.structure.sites.values()):
                nesting = self.probe.structure.max_plate_nesting
                trace = collect.released(model, args, kwargs, nesting, 1, self.probe.guide_trace)
        self.indices = _indices(self.probe)
        self.layout: Layout = layout_of(self.probe, trace, _of_sites(dims, self.probe))

    def one(self) -> Reading:
        return read(self.model, self.guide, self.args, self.kwargs)

    def read(self, start: int, count: int) -> Reading:
        return read(self.model, self.guide, self.args, self.kwargs, num_particles=count)

    @property
    def plate_scale(self) -> float:
        """The largest N/B of the plates; 1 for the whole data."""
        return max((plate.scale for plate in self.probe.structure.subsampled), default=1.0)

    def draw(self, start: int, count: int, wanted: frozenset[str]) -> collect.Groups:
        """Draws ``start, start + 1, ...`` of the groups that have draws."""
        found = collect.posterior_groups(
            self.read(start, count), self.layout, wanted, self.model, self.args, self.kwargs, weighed=self.weighed
        )
        if wanted & {"prior", "prior_predictive"}:
            prior = collect.prior_groups(self.model, self.args, self.kwargs, self.layout, count)
            found |= {name: group for name, group in prior.items() if name in wanted}
        found["sample_stats"] = found.get("sample_stats", {}) | self.stats(start, count)
        return {name: group for name, group in found.items() if group and name in wanted}

    def stats(self, start: int, count: int) -> dict[str, np.ndarray]:
        return {}

    def can_draw_prior(self) -> bool:
        with isolated(self.model):
            try:
                collect.prior_groups(self.model, self.args, self.kwargs, self.layout, 1)
            except NotImplementedError:
                return False
        return True

    def observed(self) -> dict[str, np.ndarray]:
        return collect.observed_data(self.probe, self.layout)

    def constant(
        self, bound: Mapping[str, Any], dims: Mapping[str, Sequence[str]] | None
    ) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        values, named = collect.constant_data(bound, self.probe, self.layout)
        for name in set(values) & set(dims or {}):
            named[name] = list((dims or {})[name])
        return values, named

    def unconstrained_names(self) -> dict[str, list[str]]:
        """Dims of the latents off their constraints: their own, where the shape is."""
        named = {}
        for name, shape in collect.unconstrained_shapes(self.probe, self.layout).items():
            site = self.layout.sites[name]
            same = shape == site.event_shape
            event = list(site.event_names) if same else [f"{name}_unconstrained_dim_{i}" for i in range(len(shape))]
            named[name] = site.plate_names + event
        return named


class Sampled(Source):
    """Draws of one chain of a sampler, with the densities and predictions of the model there."""

    kind = "mcmc"
    weighed = False

    def __init__(
        self,
        model: Callable[..., Any],
        values: Mapping[str, Tensor],
        diverging: np.ndarray | None,
        args: tuple,
        kwargs: Mapping[str, Any],
        dims: Mapping[str, Sequence[str]] | None,
    ) -> None:
        def hidden(msg: Mapping[str, Any]) -> bool:
            return msg["type"] == "sample" and (msg["is_observed"] or msg["name"] not in values)

        self.values, self.diverging = values, diverging
        draws = block(model, hide_fn=hidden)
        drawn = config_enumerate(model) if _has_more(model, values, args, kwargs) else model
        self.at = Evaluator(drawn, draws, args, kwargs)
        super().__init__(drawn, draws, args, kwargs, len(next(iter(values.values()))), dims)
        self.title = "MCMC"

    def one(self) -> Reading:
        return self.read(0, 1)

    def read(self, start: int, count: int) -> Reading:
        self.at.num_particles = count
        part = {name: value[start : start + count] for name, value in self.values.items()}
        return self.at(part)

    def stats(self, start: int, count: int) -> dict[str, np.ndarray]:
        return {} if self.diverging is None else {"diverging": self.diverging[start : start + count]}


def _has_more(model: Callable[..., Any], values: Mapping[str, Tensor], args: tuple, kwargs: Mapping[str, Any]) -> bool:
    import pyro.poutine as poutine

    with isolated(model):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    return any(not s["is_observed"] and s["name"] not in values for s in sample_sites(trace))


def sources_of(
    model: Any,
    guide: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_draws: int,
    dims: Mapping[str, Sequence[str]] | None,
) -> list[Source]:
    """A source for each chain."""
    if isinstance(guide, AbstractMCMC):
        return _of_sampler(model, guide, args, kwargs, dims)
    guides = list(guide) if isinstance(guide, (list, tuple)) else [guide]
    models = list(model) if isinstance(model, (list, tuple)) else [model] * len(guides)
    if not guides or len(models) != len(guides):
        raise ValueError(f"{len(models)} model(s) and {len(guides)} guide(s): give one model for all, or one for each")
    sources = [Source(one, other, args, kwargs, num_draws, dims) for one, other in zip(models, guides)]
    shapes = [{name: site.shape for name, site in s.layout.sites.items() if site.role != "auxiliary"} for s in sources]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the pairs do not have the same sites of the same shapes, so they can't be chains of one tree")
    return sources


def _of_sampler(
    model: Any, sampler: Any, args: tuple, kwargs: Mapping[str, Any], dims: Mapping[str, Sequence[str]] | None
) -> list[Source]:
    samples = sampler.get_samples(group_by_chain=True)
    if not samples:
        raise ValueError("the sampler has no draws: call its run(...) first")
    chains, draws = next(iter(samples.values())).shape[:2]
    found = getattr(sampler, "_diagnostics", None) or [None] * chains
    sources: list[Source] = []
    for chain in range(chains):
        diverging = None
        if found[chain] and "divergences" in found[chain]:
            diverging = np.zeros(draws, dtype=bool)
            diverging[list(found[chain]["divergences"])] = True
        values = {name: value[chain] for name, value in samples.items()}
        sources.append(Sampled(model, values, diverging, args, kwargs, dims))
    return sources


def _of_sites(dims: Mapping[str, Sequence[str]] | None, probe: Reading) -> dict[str, Sequence[str]]:
    return {name: names for name, names in (dims or {}).items() if name in probe.structure.sites}


def _indices(probe: Reading) -> dict[str, np.ndarray]:
    """The indices that each plate shows of its whole; refuses a plate that draws others at each run."""
    shown = {}
    for trace in (probe.guide_trace, probe.model_trace):
        for site in trace.nodes.values():
            if site["type"] != "sample" or not site_is_subsample(site) or not isinstance(site["value"], Tensor):
                continue
            size, drawn = site["fn"].size, site["fn"].subsample_size
            if drawn is not None and drawn < size:
                raise ValueError(
                    f"plate '{site['name']}' draws another {drawn} of its {size} indices at each run, so its dim "
                    "would mean other data at each draw. Give the whole data, or a fixed subsample="
                )
            if len(site["value"]) < size:
                shown[site["name"]] = site["value"].cpu().numpy()
    return shown
