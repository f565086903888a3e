"""Predictions at new data, as groups of a tree."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pyro_hvae.diagnostics.arviz_versions import dataset
from pyro_hvae.diagnostics.groups import as_array
from pyro_hvae.diagnostics.sites import TreeSites
from pyro_hvae.problem import Problem, Run
from pyro_hvae.problem.predict import by_draw, of_problem
from pyro_hvae.problem.structure import plates_of

__all__ = ["Forecast", "arguments_of"]


class Forecast:
    """New data of the model of a problem, predicted at draws of its guide.

    Args:
        problem: the pair with its data.
        sites: its sites, which name the dims of events.
        data: a tuple of arguments, a mapping of keywords, or one argument.
    """

    def __init__(self, problem: Problem, sites: TreeSites, data: Any) -> None:
        args, kwargs = ((), dict(data)) if isinstance(data, Mapping) else (data, {})
        new = Problem(problem.model, None, args if isinstance(args, tuple) else (args,), kwargs)
        self.problem, self.sites, self.new = problem, sites, new
        self.data = of_problem(problem, new)
        self.dims: dict[str, list[str]] = {}
        self.plates: dict[str, int] = {}

    def draw(self, run: Run) -> dict[str, np.ndarray]:
        """Return draws (K, *dims of plates, *event) of the predicted sites."""
        template, count = self.problem.template, run.num_particles
        values = {name: by_draw(run, name, template) for name in self.data.names}
        trace = self.data.draw({name: value[0] for name, value in values.items()})
        drawn, reading = self.data.draw_many(values, count), self.new.reading
        result = {}
        for name in self.data.observed(trace):
            site = trace.nodes[name]
            plates, event_dim = plates_of(site), site["fn"].event_dim
            self.plates |= {plate.name: plate.size for plate in plates}
            known = self.sites[name].event_names if name in self.sites else ()
            event = list(known) if len(known) == event_dim else [f"{name}_dim_{i}" for i in range(event_dim)]
            self.dims[name] = [plate.name for plate in plates] + event
            shape = [plate.size for plate in plates] + list(site["value"].shape[site["value"].dim() - event_dim :])
            array = as_array(drawn[name]).reshape(count, *shape)
            result[name] = array if reading is None else reading.restore(name, array)
        return result

    def datasets(self, draws: Mapping[str, np.ndarray], wanted: frozenset[str]) -> dict[str, Any]:
        """Return the groups of these draws (chain, draw, ...) and of the new data."""
        coords = {} if self.new.reading is None else self.new.reading.coords
        made = {"predictions": dataset(draws, self.dims, coords)} if draws else {}
        constants, dims = {}, {}
        for name, value in arguments_of(self.new).items():
            if not isinstance(value, (Tensor, np.ndarray)):
                continue
            array = as_array(value) if isinstance(value, Tensor) else value
            label = f"{name}_argument" if name in self.dims else name
            named = [f"{label}_dim_{i}" for i in range(array.ndim)]
            over = [plate for plate, size in self.plates.items() if array.ndim and size == array.shape[0]]
            if len(over) == 1:
                named[0] = over[0]
            constants[label], dims[label] = array, named
        if constants and "predictions_constant_data" in wanted:
            made["predictions_constant_data"] = dataset(constants, dims, coords, sample_dims=())
        return made


def arguments_of(problem: Problem) -> dict[str, Any]:
    """Return the arguments of a problem by the names that its model gives them."""
    model, args, kwargs = problem.model, problem.args, problem.kwargs
    try:
        bound = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{f"argument_{i}": value for i, value in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": part for i, part in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named
