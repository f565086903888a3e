"""Read a model: its sites, the arguments that they depend on, and draws of its prior."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils._pytree import tree_flatten

from pyro_hvae.amortized.graph import Graph
from pyro_hvae.amortized.inputs import align
from pyro_hvae.amortized.look import Seen, look
from pyro_hvae.amortized.transforms import inner_support
from pyro_hvae.problem import Plate, Problem
from pyro_hvae.problem.dependencies import program_edges
from pyro_hvae.problem.isolation import isolated
from pyro_hvae.problem.prior import prior_guide
from pyro_hvae.problem.structure import sample_sites

__all__ = ["ModelReading", "bound_program", "predictive_draws", "read_model", "tensors_of"]

DRAWS = 64
"""Draws of the prior, for the location and scale of each latent."""


@dataclass(frozen=True)
class ModelReading:
    """A model with example arguments.

    Attributes:
        sites: all sites by name, seen in the example.
        graph: sites, and arguments that sites depend on, with their dependencies.
        covariates: position and plates of each argument of the graph.
        plates: names of plates around each node of the graph.
        complete: whether dependencies could be analysed; otherwise a site counts as dependent on all before it.
        draws: of the prior, ``(S, *shape)`` by latent.
    """

    sites: dict[str, Seen]
    graph: Graph
    covariates: dict[str, tuple[int, tuple[Plate, ...]]]
    plates: dict[str, frozenset[str]]
    complete: bool
    draws: dict[str, Tensor]

    def names(self, kind: str) -> list[str]:
        return [name for name, seen in self.sites.items() if seen.kind == kind]


def bound_program(program: Callable[..., Any], kwargs: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a program that Pyro's handlers may wrap: they take the keyword ``context`` for themselves."""
    if "context" not in kwargs:
        return program, dict(kwargs)
    rest = {name: value for name, value in kwargs.items() if name != "context"}
    context = kwargs["context"]

    def bound(*args: Any, **more: Any) -> Any:
        return program(*args, context=context, **more)

    return bound, rest


def tensors_of(args: tuple, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments one by one, those inside of lists and mappings too; arrays as tensors."""
    leaves, _ = tree_flatten((args, dict(kwargs)))
    return [torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype != object else leaf for leaf in leaves]


def read_model(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> ModelReading:
    """Read a model with example arguments, without side effects.

    Raises:
        ValueError: for a model without latents or without observations, whose prior can't be drawn, or whose sites
            change from draw to draw.
    """
    with isolated(model), pyro.validation_enabled(False):
        sites = look(model, args, kwargs)
    draws = _prior_draws(model, args, kwargs, sites)
    latents = [name for name, seen in sites.items() if seen.kind == "latent"]
    if not latents:
        raise ValueError(f"the model draws no latent that a guide could draw; its sites are {sorted(sites)}")
    if not any(seen.kind in ("observed", "factor") for seen in sites.values()):
        raise ValueError(
            f"the model observes nothing with these arguments (its latents are {latents}), so there is no posterior: "
            "pass the data, as in amortize(model, x), and observe them by obs="
        )
    marks, arguments = _arguments(model, args, kwargs)
    edges = program_edges(model, args, kwargs, marks)
    complete = edges is not None and set(sites) <= set(edges)
    own = {name: next((i for i in arguments if arguments[i] is seen.value), None) for name, seen in sites.items()}
    parents: dict[str, list[str]] = {}
    read: dict[int, list[str]] = {}
    for name in sites:
        earlier = list(parents)
        above = edges[name] if complete and edges is not None else frozenset((*earlier, *marks.values()))
        parents[name] = [other for other in earlier if other in above]
        for position, mark in marks.items():
            if mark not in above or own[name] == position:
                continue
            source = next((other for other in earlier if own[other] == position), None)
            if source is not None:
                parents[name].append(source)
            elif complete or position not in own.values():
                read.setdefault(position, []).append(name)
    covariates, roots = {}, {}
    for position, readers in read.items():
        argument = arguments[position]
        if isinstance(argument, Tensor):
            plates = align(argument, [sites[name].plates for name in readers])
            covariates[marks[position]] = position, plates
            roots[marks[position]] = list[str]()
            for name in readers:
                parents[name].append(marks[position])
    around = {name: _names(seen.plates) for name, seen in sites.items()}
    around.update({name: _names(plates) for name, (_, plates) in covariates.items()})
    return ModelReading(sites, Graph({**roots, **parents}), covariates, around, complete, draws)


def _names(plates: tuple[Plate, ...]) -> frozenset[str]:
    return frozenset(plate.name for plate in plates if plate.dim is not None)


def _arguments(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, Any]]:
    """Return names of the tensors among the arguments, by position, and the tensors."""
    leaves = tensors_of(args, kwargs)
    arguments = {position: leaf for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    names: list[str] = []
    try:
        call = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs)
        given: list[tuple[str, Any]] = []
        for name, value in call.arguments.items():
            kind = call.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                given += value.items()
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                given += [(f"{name}[{i}]", one) for i, one in enumerate(value)]
            else:
                given.append((name, value))
        for name, value in given:
            count = len(tree_flatten(value)[0])
            names += [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]
    except (TypeError, ValueError):
        names = []
    if len(names) != len(leaves):
        names = [f"argument {position}" for position in range(len(leaves))]
    return {position: f"{names[position]} (argument)" for position in arguments}, arguments


def predictive_draws(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return draws of the observed sites from the model, ``(S, *shape)`` by site."""
    problem = Problem(model)(*args, **kwargs).prior()
    with isolated(model), torch.no_grad():
        traces = [problem.released() for _ in range(DRAWS)]
    names = problem.structure.observed
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}


def _check_support(name: str, fn: Any, ends: dict[str, tuple[Tensor, ...]]) -> None:
    """Refuse a latent whose support changes from draw to draw."""
    try:
        support = inner_support(fn)
    except (NotImplementedError, AttributeError):
        return
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    own = [getattr(support, end) for end in ("lower_bound", "upper_bound") if hasattr(support, end)]
    now = tuple(torch.as_tensor(end) for end in own)
    before = ends.setdefault(name, now)
    if any(not torch.equal(one, other) for one, other in zip(before, now, strict=True)):
        raise ValueError(
            f"the support of site '{name}' depends on other draws of the model (its ends changed from "
            f"{[end.flatten()[0].item() for end in before]} to {[end.flatten()[0].item() for end in now]}), which the "
            "guide may not have drawn yet: draw a number of the unit interval and scale it in the model, or draw the "
            "site in a program of yours, amortize(..., guides=[program])"
        )


def _prior_draws(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], sites: Mapping[str, Seen]
) -> dict[str, Tensor]:
    bound, rest = bound_program(model, kwargs)
    prior = prior_guide(bound)
    latents = [name for name, seen in sites.items() if seen.kind == "latent"]
    values: dict[str, list[Tensor]] = {name: [] for name in latents}
    ends: dict[str, tuple[Tensor, ...]] = {}
    with isolated(model), torch.no_grad(), pyro.validation_enabled(False):
        for _ in range(DRAWS):
            trace = poutine.trace(prior).get_trace(*args, **rest)
            drawn = {site["name"]: site["value"] for site in sample_sites(trace) if not site["is_observed"]}
            if set(drawn) != set(latents):
                extra = sorted(set(drawn) ^ set(latents))
                raise ValueError(
                    f"the sites of the model change from draw to draw ({extra} are not in each), so there is no one "
                    "guide: draw them at every run, and choose between them by torch.where"
                )
            for name, value in drawn.items():
                _check_support(name, trace.nodes[name]["fn"], ends)
                values[name].append(value)
    for name, several in values.items():
        shapes = {tuple(value.shape) for value in several}
        if len(shapes) > 1:
            raise ValueError(f"site '{name}' has other shapes from draw to draw, such as {sorted(shapes)[:2]}")
    return {name: torch.stack(several) for name, several in values.items()}
