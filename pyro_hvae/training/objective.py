r"""What is minimised: the objective of a pair as a module, normalised to nats a datum.

A bound's loss is the sum over the whole data set, :math:`-\frac NB\sum_{n\in\text{batch}}\mathrm{bound}(x_n)`, as
Pyro has it.  Learning rates, clipping and the epsilon of Adam should not depend on how much data there is, so the
optimiser sees that loss **divided by the number of data N** that it speaks of; the minimum is the same, and what the
bar shows is nats a datum.  N is

1. the size of the data set, where both programs take a ``data_size`` (then a minibatch is scaled by N/B); else
2. the size of the plates common to all sites, with the scale that the programs' own plates put on them; else
3. one: a pair with global latents and no ``data_size`` is not divided.

A diffusion under :class:`~pyro_hvae.bounds.DiffusionELBO` is not run to find that out, since in continuous time it
can't be: its data are the rows of x.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
from torch import Tensor, nn

from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.traces import structure
from pyro_hvae.traces.parameters import param_sites, unconstrained
from pyro_hvae.traces.running import _bare, isolated, run_pair, unregistered
from pyro_hvae.training.rebuild import constraint_record, hold

__all__ = ["PairObjective", "accepts"]

Program = Callable[..., Any]


def accepts(program: Program, keyword: str) -> bool:
    """Whether a program takes a keyword of that name, by its signature."""
    target = program.forward if isinstance(program, nn.Module) else program
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False
    return keyword in parameters


class PairObjective(nn.Module):
    """The loss of a pair in nats a datum, as a module that owns every parameter of both programs.

    Modules are registered as they are.  Parameters that the programs keep in Pyro's parameter store (by
    ``pyro.param`` or ``pyro.module`` in plain functions) are found by a dry run and registered under
    ``store``; AutoGuides are set up by the same run, which restores the generators.

    Args:
        bound: anything with ``differentiable_loss(model, guide, *args)``: a bound of this library or of Pyro.
        model, guide: Pyro programs, modules or functions.
        args, kwargs: one example batch.
        data_size: N, or None if unknown.

    Raises:
        ValueError: if neither program has a parameter.
    """

    def __init__(
        self,
        bound: Any,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: Mapping[str, Any],
        data_size: int | None,
    ) -> None:
        super().__init__()
        self.bound = bound
        # Functions are no modules; nn.Module keeps them as plain attributes.
        self.model = model
        self.guide = guide
        self.step: int | None = None
        self.data_size = data_size if accepts(model, "data_size") and accepts(guide, "data_size") else None
        self.store = nn.ParameterDict()
        self.store_records: dict[str, dict[str, Any]] = {}
        if not isinstance(bound, DiffusionELBO):
            with isolated():
                guide(*args, **self.keywords(kwargs))  # an AutoGuide makes its parameters here
        self._adopt_store(args, self.keywords(kwargs))
        self.normaliser = float(self._count(args, self.keywords(kwargs)))
        if not any(True for _ in self.parameters()):
            raise ValueError("neither the model nor the guide has a parameter, so there is nothing to train")

    def keywords(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords for the programs: the batch's own, and ``data_size`` where they take it."""
        if self.data_size is None or "data_size" in kwargs:
            return dict(kwargs)
        return {**kwargs, "data_size": self.data_size}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch, 0-dim, in nats a datum."""
        if self.step is not None and hasattr(self.bound, "set_step"):
            self.bound.set_step(self.step)  # weights that follow the step: once for each step, however many batches
        with unregistered():
            loss = self.bound.differentiable_loss(self.model, self.guide, *args, **self.keywords(kwargs))
        return loss / self.normaliser

    def terms(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The bound's terms, averaged over the batch, 0-dim each, in nats; empty if the bound has none."""
        if not hasattr(self.bound, "terms"):
            return {}
        terms = self.bound.terms(self.model, self.guide, *args, **self.keywords(kwargs))
        return {name: term.mean() for name, term in terms.items()}

    def programs(self) -> Iterator[tuple[str, Program]]:
        yield "model", self.model
        yield "guide", self.guide

    def _count(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        if self.data_size is not None:
            return self.data_size
        if isinstance(self.bound, DiffusionELBO):
            return len(args[0] if args else kwargs["x"])
        count = 1.0
        for plate in structure(self.model, self.guide, args, kwargs).common:
            count *= plate.full_size
        return count

    def _adopt_store(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Register what the programs read from the parameter store and no module of theirs owns."""
        with isolated(self.model, self.guide), unregistered():  # another pair's parameters may stand in the store
            if isinstance(self.bound, DiffusionELBO):
                _, visited = self.bound.estimate(self.model, self.guide, args, kwargs)
                traces = visited.model_trace, visited.guide_trace
            else:
                traces = run_pair(_bare(self.model), _bare(self.guide), args, kwargs)
        owned = {id(parameter) for parameter in self.parameters()}
        store = pyro.get_param_store()
        for name, site in param_sites(*reversed(traces)).items():
            leaf = unconstrained(site)
            if id(leaf) in owned or name not in store or store._params[name] is not leaf:
                continue
            if not isinstance(leaf, nn.Parameter):
                leaf = nn.Parameter(leaf.detach())
                hold(name, leaf)
            key = name.replace(".", "/")
            self.store[key] = leaf
            self.store_records[f"store.{key}"] = {
                "name": name,
                "constraint": constraint_record(store._constraints[name]),
            }
            owned.add(id(leaf))
