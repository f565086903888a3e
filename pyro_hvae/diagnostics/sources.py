"""Sources of draws: one guide, several, or a sampler that has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyro.poutine as poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_hvae.diagnostics import groups as collect
from pyro_hvae.diagnostics.forecast import Forecast, arguments_of
from pyro_hvae.diagnostics.sites import TreeSites, sites_of
from pyro_hvae.problem import Problem, Run
from pyro_hvae.problem.isolation import isolated
from pyro_hvae.problem.structure import sample_sites

__all__ = ["Source", "problems_of", "sources_of", "sources_of_sampler"]

Dims = Mapping[str, Sequence[str]]


class Source:
    """Draws of one chain, those of a guide.

    Args:
        problem: the pair with its data.
        num_draws: number of draws.
        dims: names of event dims by site.
    """

    kind = "guide"
    weighed = True

    def __init__(self, problem: Problem, num_draws: int, dims: Dims | None) -> None:
        self.problem, self.num_draws = problem, num_draws
        guide = problem.guide
        self.title = getattr(guide, "__name__", None) or type(guide).__name__
        with isolated(problem.model, guide):
            self.probe = self.run(0, 1)
            trace = self.probe.model_trace
            if self.probe.structure.enumerated:
                trace = problem.released(1, self.probe.guide_trace)
        self.new: Forecast | None = None
        self.indices = _indices(self.probe)
        if problem.reading is not None:
            self.indices |= problem.reading.coords
        site_names = self.probe.structure.sites
        self.sites: TreeSites = sites_of(
            self.probe, trace, {name: names for name, names in (dims or {}).items() if name in site_names}
        )

    def run(self, start: int, count: int) -> Run:
        """Run with draws ``start, start + 1, ...``; sites that the guide enumerates are drawn."""
        return self.problem.run(count, draw_enumerated=True)

    @property
    def plate_scale(self) -> float:
        """The largest N/B of the plates; 1 for the whole data."""
        return max((plate.scale for plate in self.probe.structure.subsampled), default=1.0)

    def draw(self, start: int, count: int, wanted: frozenset[str]) -> collect.Groups:
        """Return draws ``start, start + 1, ...`` of the groups that have draws."""
        run = self.run(start, count)
        drawn = collect.posterior_groups(self.problem, run, self.sites, wanted, weighed=self.weighed)
        if wanted & {"prior", "prior_predictive"}:
            prior = collect.prior_groups(self.problem, self.sites, count)
            drawn |= {name: group for name, group in prior.items() if name in wanted}
        if self.new is not None and "predictions" in wanted:
            drawn["predictions"] = self.new.draw(run)
        drawn["sample_stats"] = drawn.get("sample_stats", {}) | self.stats(start, count)
        reading = self.problem.reading
        if reading is not None:
            for name in {"posterior_predictive", "prior_predictive"} & drawn.keys():
                drawn[name] = {site: reading.restore(site, values) for site, values in drawn[name].items()}
        return {name: group for name, group in drawn.items() if group and name in wanted}

    def predict_at(self, data: Any) -> None:
        """Add predictions at new data to the draws: a tuple of arguments, a mapping of keywords, or one argument."""
        self.new = Forecast(self.problem, self.sites, data)

    def stats(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return the sampler's statistics of these draws."""
        return {}

    def can_draw_prior(self) -> bool:
        with isolated(self.problem.model):
            try:
                collect.prior_groups(self.problem, self.sites, 1)
            except NotImplementedError:
                return False
        return True

    def observed(self) -> dict[str, np.ndarray]:
        reading, values = self.problem.reading, collect.observed_data(self.probe, self.sites)
        if reading is None:
            return values
        return {site: reading.restore(site, value, observed=True) for site, value in values.items()}

    def constant(self, dims: Dims | None) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """Return the arguments that are no observations, with the names of their dims."""
        values, named = collect.constant_data(self.arguments, self.probe, self.sites)
        for name in set(values) & set(dims or {}):
            named[name] = list((dims or {})[name])
        return values, named

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments by the names that the model gives them."""
        return arguments_of(self.problem)

    def unconstrained_names(self) -> dict[str, list[str]]:
        """Return the dims of unconstrained latents: those of the site, where the shape is the same."""
        named = {}
        for name, shape in collect.unconstrained_shapes(self.probe, self.sites).items():
            site = self.sites[name]
            same = shape == site.event_shape
            event = list(site.event_names) if same else [f"{name}_unconstrained_dim_{i}" for i in range(len(shape))]
            named[name] = site.plate_names + event
        return named

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of the tree on the source of its draws."""
        model = self.problem.model
        attrs = {
            "model": getattr(model, "__name__", None) or type(model).__name__,
            "guide": self.title,
            "draws": self.kind,
            "plate_scale": self.plate_scale,
        }
        points = self.problem.points if self.weighed else ()
        return attrs | ({"points": ", ".join(points)} if points else {})


class Sampled(Source):
    """Draws of one chain of a sampler, with the model's densities and predictions at them."""

    kind = "mcmc"
    weighed = False

    def __init__(
        self, problem: Problem, values: Mapping[str, Tensor], diverging: np.ndarray | None, dims: Dims | None
    ) -> None:
        self.values, self.diverging = values, diverging
        super().__init__(_at_draws(problem, values), len(next(iter(values.values()))), dims)
        self.title = "MCMC"

    def run(self, start: int, count: int) -> Run:
        part = {name: value[start : start + count] for name, value in self.values.items()}
        return self.problem.run(count, part)

    def stats(self, start: int, count: int) -> dict[str, np.ndarray]:
        return {} if self.diverging is None else {"diverging": self.diverging[start : start + count]}


def _at_draws(problem: Problem, values: Mapping[str, Tensor]) -> Problem:
    """Return the model with its latents of these names as the guide; all others are summed out."""
    model = problem.model

    def hidden(msg: Mapping[str, Any]) -> bool:
        return msg["type"] == "sample" and (msg["is_observed"] or msg["name"] not in values)

    bound, _, kwargs = problem.programs.bound()
    with isolated(model):
        trace = poutine.trace(bound).get_trace(*problem.args, **kwargs)
    more = any(not site["is_observed"] and site["name"] not in values for site in sample_sites(trace))
    drawn = config_enumerate(model) if more else model
    return Problem(drawn, poutine.block(model, hide_fn=hidden), problem.args, problem.kwargs)


def problems_of(model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each guide.

    Raises:
        TypeError: for a bound problem together with a guide or data.
        ValueError: for another number of models than of guides.
    """
    if isinstance(model, Problem):
        if guide is not None or args or kwargs:
            raise TypeError(
                "a problem has its guide and its data bound already; call this with the problem alone, or with model, "
                "guide and data"
            )
        return [model]
    guides = list(guide) if isinstance(guide, (list, tuple)) else [guide]
    models = list(model) if isinstance(model, (list, tuple)) else [model] * len(guides)
    if models and all(isinstance(one, Problem) for one in models) and guide is None and not (args or kwargs):
        return models
    if not guides or len(models) != len(guides):
        raise ValueError(f"{len(models)} model(s) and {len(guides)} guide(s): give one model for all, or one for each")
    return [Problem(one, other, args, kwargs) for one, other in zip(models, guides, strict=True)]


def sources_of(problems: Sequence[Problem], num_draws: int, dims: Dims | None) -> list[Source]:
    """Return a source for each guide.

    Raises:
        ValueError: for problems whose sites differ.
    """
    sources = [Source(problem, num_draws, dims) for problem in problems]
    shapes = [{name: site.shape for name, site in s.sites.sites.items() if site.role != "auxiliary"} for s in sources]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the pairs do not have the same sites of the same shapes, so they can't be chains of one tree")
    return sources


def sources_of_sampler(problem: Problem, sampler: AbstractMCMC, dims: Dims | None) -> list[Source]:
    """Return a source for each chain of a sampler.

    Raises:
        ValueError: for a sampler that has not run.
    """
    samples = sampler.get_samples(group_by_chain=True)
    if not samples:
        raise ValueError("the sampler has no draws: call its run(...) first")
    chains, draws = next(iter(samples.values())).shape[:2]
    statistics = getattr(sampler, "_diagnostics", None) or [None] * chains
    sources: list[Source] = []
    for chain in range(chains):
        diverging = None
        if statistics[chain] and "divergences" in statistics[chain]:
            diverging = np.zeros(draws, dtype=bool)
            diverging[list(statistics[chain]["divergences"])] = True
        values = {name: value[chain] for name, value in samples.items()}
        sources.append(Sampled(problem, values, diverging, dims))
    return sources


def _indices(probe: Run) -> dict[str, np.ndarray]:
    """Return the indices of each subsampled plate."""
    indices = {}
    for trace in (probe.guide_trace, probe.model_trace):
        for site in trace.nodes.values():
            if site["type"] != "sample" or not site_is_subsample(site) or not isinstance(site["value"], Tensor):
                continue
            if len(site["value"]) < site["fn"].size:
                indices[site["name"]] = site["value"].cpu().numpy()
    return indices
