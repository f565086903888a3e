r"""The objective of a pair as a module, normalised to nats a datum.

A bound's loss is the sum over the whole data set, :math:`-\frac NB\sum_{n\in\text{batch}}\mathrm{bound}(x_n)`, as
in Pyro.  Learning rates, clipping and the epsilon of Adam should not depend on the number of data, so the optimiser
minimises that loss **divided by its number of data**; the minimum is the same.  A datum is a row of the programs'
arguments, and the number of data is

1. the size N of the data set, where the model takes a ``data_size`` (then a batch is scaled by N/B); else
2. the rows of the batch, times the scale that the programs' own plate of these rows puts on them.

The loss of a smaller batch is divided by fewer, so it is in nats a datum, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.bounds.base import Objective
from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem import Problem
from pyro_hvae.problem.execute import Call
from pyro_hvae.problem.isolation import RUNNING, isolated
from pyro_hvae.problem.parameters import param_sites
from pyro_hvae.problem.structure import plates_of, sample_sites
from pyro_hvae.training.feed import rows_of
from pyro_hvae.training.rebuild import constraint_record, hold

__all__ = ["PairObjective", "accepts"]

Program = Callable[..., Any]


def accepts(program: Program, keyword: str, *, any_keyword: bool = False) -> bool:
    """Whether a program takes a keyword of that name, by its signature.

    Args:
        any_keyword: count ``**kwargs`` too, by which AutoGuides pass keywords on to their model.
    """
    target: Any = program.forward if isinstance(program, nn.Module) else program
    if isinstance(program, EasyGuide):
        target = program.guide
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False
    if keyword in parameters:
        return True
    return any_keyword and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


class PairObjective(nn.Module):
    """The loss of a pair in nats a datum, as a module that owns every parameter of both programs.

    The objective is a child module, and so are the programs if they are modules.  Parameters that the programs keep
    in Pyro's parameter store (by ``pyro.param`` or ``pyro.module`` in plain functions) are collected by a dry run and
    registered under ``store``; AutoGuides are initialised by the same run, which restores the generators.

    Args:
        bound: an object with ``differentiable_loss(model, guide, *args)``: a bound of this library or of Pyro.
        model, guide: Pyro programs, modules or functions.
        args, kwargs: one example batch.
        data_size: N, or None if unknown.

    Attributes:
        data_size: N, where the model takes it; None otherwise.

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
        self.data_size = data_size if _takes_data_size(model, guide) else None
        self._guide_as_called: tuple[Program] = (guide,)
        if self.data_size is not None and not accepts(guide, "data_size", any_keyword=True):
            self._guide_as_called = (_WithoutDataSize(guide),)
        self.store = nn.ParameterDict()
        self.store_records: dict[str, dict[str, Any]] = {}
        self._dry_run(self.problem(args, kwargs))
        if isinstance(bound, Objective):
            bound.prepare(self.problem(args, kwargs))
        if not any(True for _ in self.parameters()):
            raise ValueError("neither the model nor the guide has a parameter, so there is nothing to train")

    def problem(self, args: tuple, kwargs: Mapping[str, Any], *, training: bool = False) -> Problem:
        """Return the pair with a batch; ``data_size`` is among its keywords if the model takes it."""
        keywords = dict(kwargs)
        if self.data_size is not None:
            keywords.setdefault("data_size", self.data_size)
        return Problem(self.model, self._guide_as_called[0], args, keywords, training=training, registering=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch, 0-dim, in nats a datum."""
        problem = self.problem(args, kwargs, training=True)
        with RUNNING:
            return self.loss(problem) / self.count(problem)

    def loss(self, problem: Problem) -> Tensor:
        """Return the objective's loss: of the whole data set, in nats."""
        if isinstance(self.bound, Objective):
            return self.bound.differentiable_loss(problem)
        model, guide, keywords = problem.programs.bound()
        return self.bound.differentiable_loss(model, guide, *problem.args, **keywords)

    def count(self, problem: Problem) -> float:
        """Return the number of data of a batch's loss."""
        if "data_size" in problem.kwargs and self.data_size is not None:
            return float(problem.kwargs["data_size"])
        rows = rows_of(problem.args, problem.kwargs)
        if isinstance(self.bound, DiffusionELBO) and rows is not None:
            return float(rows)
        count = 1.0 if rows is None else float(rows)
        plates = problem.structure.common if rows is None else problem.structure.data_plates
        for plate in plates:
            if rows is None:
                count *= plate.full_size
            elif plate.size == rows:
                count *= plate.scale
        return count

    def advance(self) -> None:
        """Count a step of training."""
        if isinstance(self.bound, Objective):
            self.bound.advance()

    def _dry_run(self, problem: Problem) -> None:
        """Run both programs once, and register the parameters that they read from the store and do not own."""
        diffusion = isinstance(self.bound, DiffusionELBO)  # in continuous time its programs can't be run
        stored: dict[str, tuple[Tensor, Any]] = {}
        store = pyro.get_param_store()
        with isolated(self.model, self.guide), torch.no_grad():
            if diffusion:
                visited = self.bound.estimate(problem).run
                traces = visited.model_trace, visited.guide_trace
            else:
                _, lazy, keywords = problem.programs.bound()
                with evaluation_mode(self.model, self.guide):
                    lazy(*problem.args, **keywords)  # an AutoGuide makes its parameters here
                traces = Call(problem.programs, None).traces()
            owned = {id(parameter) for parameter in self.parameters()}
            for name, leaf in param_sites(*reversed(traces)).items():
                if id(leaf) not in owned and name in store and store._params[name] is leaf:
                    stored[name] = leaf, store._constraints[name]
                    owned.add(id(leaf))
        for name, (leaf, constraint) in stored.items():
            parameter = leaf if isinstance(leaf, nn.Parameter) else nn.Parameter(leaf.detach())
            hold(name, parameter, constraint)
            key = name.replace(".", "/")
            self.store[key] = parameter
            self.store_records[f"store.{key}"] = {"name": name, "constraint": constraint_record(constraint)}
        if not diffusion and self._guide_as_called[0] is not self.guide:
            _require_same_plates(*traces)


def _takes_data_size(model: Program, guide: Program) -> bool:
    if accepts(model, "data_size"):
        return True
    return accepts(guide, "data_size") and accepts(model, "data_size", any_keyword=True)


class _WithoutDataSize(nn.Module):
    """A guide that is called without the keyword ``data_size``, which it does not take."""

    def __init__(self, guide: Program) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, *args: Any, data_size: Any = None, **kwargs: Any) -> Any:
        _, bare, keywords = Problem(self.guide, self.guide, args, kwargs, registering=False).programs.bound()
        return bare(*args, **keywords)


def _require_same_plates(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse a guide without the scale that the model puts on a latent of both."""
    for site in sample_sites(guide_trace):
        plates = plates_of(site)
        if site["name"] not in model_trace:
            continue
        for plate in plates_of(model_trace.nodes[site["name"]]):
            own = [other for other in plates if other.dim == plate.dim]
            if own and own[0].full_size != plate.full_size:
                raise ValueError(
                    f"the model scales site '{site['name']}' to {plate.full_size} data (plate '{plate.name}'), and the "
                    f"guide to {own[0].full_size}, as it does not take data_size: write def guide(x, data_size=None) "
                    "and pyro.plate('data', data_size or len(x), subsample=torch.arange(len(x))) there, too"
                )
