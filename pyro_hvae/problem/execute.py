"""Run a pair of programs: the guide, then the model on its draws; vectorised over particles, enumerated, replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem.isolation import (
    RUNNING,
    forget_parameters,
    kept_buffers,
    no_statistics,
    noted_parameters,
)
from pyro_hvae.problem.parameters import frozen, trainable
from pyro_hvae.problem.plates import Layout
from pyro_hvae.problem.structure import PARTICLES, Structure, is_deterministic, is_factor, sample_sites

__all__ = ["Call", "EventDims", "Particles", "Programs", "Released", "run_pair"]

Program = Callable[..., Any]


class Particles(Messenger):
    """Put every site, except those named in ``once``, into a leftmost plate of ``num_particles``."""

    def __init__(self, num_particles: int, dim: int, once: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.frame = CondIndepStackFrame(PARTICLES, dim, num_particles, 0, num_particles)
        self.once = once

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.once or self.frame in msg["cond_indep_stack"]:
            return
        if not site_is_subsample(msg):
            msg["cond_indep_stack"] = (self.frame,) + msg["cond_indep_stack"]
            BroadcastMessenger._pyro_sample(msg)


class _FixedSubsample(Messenger):
    """Fix each plate to the indices that it drew in the first run of an evaluation."""

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.indices and site_is_subsample(msg) and not msg["done"]:
            msg["value"], msg["done"] = self.indices[msg["name"]], True


class EventDims(Messenger):
    """Record the names of event dims before a replay replaces the model's ``infer`` options by the guide's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, tuple[str, ...]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        names = (msg["infer"] or {}).get("event_dims")
        if names:
            self.names[msg["name"]] = tuple(names)


class Released(Messenger):
    """Draw the observed sites; deterministic sites and factors stay."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not (is_deterministic(msg) or is_factor(msg) or site_is_subsample(msg)):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


class _InParallel(Messenger):
    """Enumerate in parallel the sites that a program marks for sequential enumeration."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["infer"].get("enumerate") == "sequential":
            msg["infer"]["enumerate"] = "parallel"


@dataclass(frozen=True)
class Programs:
    """A model and a guide with the arguments that both are called with.

    ``registering`` runs the ``pyro.param`` statements of modules.  SVI needs them; an optimiser over the modules'
    parameters does not, and they take half of the time that Pyro adds to a small step.  ``training`` leaves modules in
    their present mode; otherwise they run in evaluation mode.
    """

    model: Program
    guide: Program
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    registering: bool = True
    training: bool = False

    def bound(self) -> tuple[Program, Program, Mapping[str, Any]]:
        """Return the programs and the keywords for a run.

        Pyro's handlers take the keyword ``context`` for themselves when they wrap a program, so it is bound first.
        """
        model, guide = self.model, self.guide
        if not self.registering:
            model, guide = _bare(model), _bare(guide)
        if "context" not in self.kwargs:
            return model, guide, self.kwargs
        rest = {name: value for name, value in self.kwargs.items() if name != "context"}
        context = self.kwargs["context"]
        return partial(model, context=context), partial(guide, context=context), rest


def _bare(program: Program) -> Program:
    """Return the program without registration, unless its own ``pyro.param`` statements are needed.

    They are needed for random parameters, whose sites they name, and for parameters with batch dims, of which they
    select the rows of a subsampled plate; AutoGuides create such parameters in their first call.
    """
    if not isinstance(program, PyroModule):
        return program
    stack: list[Any] = [program]
    while stack:  # at each step of training, where Module.modules() would take a while
        module = stack.pop()
        own = module.__dict__
        if own.get("_pyro_samples") or isinstance(module, AutoGuide):
            return partial(_with_own_parameters, program)
        params = own.get("_pyro_params")
        if params and any(event_dim is not None for _, event_dim in params.values()):
            return partial(_with_own_parameters, program)
        stack += [child for child in module._modules.values() if child is not None]
    return partial(torch.nn.Module.__call__, program)


def _with_own_parameters(program: PyroModule, *args: Any, **kwargs: Any) -> Any:
    """Call a module so that its statements read its own parameters, not others of the same names in the store."""
    store = pyro.get_param_store()
    shadowed = {name: (store._params[name], store._constraints[name]) for name in _own_names(program)}
    forget_parameters(store, shadowed)
    _store_frozen(store, program)
    try:
        return program(*args, **kwargs)
    finally:
        forget_parameters(store, _own_names(program))
        for name, (parameter, constraint) in shadowed.items():
            store._params[name], store._constraints[name] = parameter, constraint
            store._param_to_name[parameter] = name


def _store_frozen(store: Any, program: PyroModule) -> None:
    """Put the plain parameters that need no gradient into Pyro's store; its statements would turn the gradient on."""
    for module in program.modules():
        if isinstance(module, PyroModule):
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.requires_grad and not name.endswith("_unconstrained"):
                    full = module._pyro_get_fullname(name)
                    store._params[full], store._constraints[full] = parameter, constraints.real
                    store._param_to_name[parameter] = full


def _own_names(program: PyroModule) -> list[str]:
    """Return the names in the parameter store that the statements of a module would read."""
    root = program._pyro_name
    own = {
        ".".join(part for part in (root, prefix, name) if part)
        for prefix, module in program.named_modules()
        if isinstance(module, PyroModule)
        for name in module._pyro_params
    }
    names = pyro.get_param_store()._params
    return [name for name in names if name in own or (root and name.startswith(f"{root}."))]


@dataclass(frozen=True)
class Call:
    """The arguments of one run of a pair; the run keeps them, for replays.

    Attributes:
        programs: the pair and its data.
        structure: the expected one; None to run one particle with nothing enumerated.
        num_particles: K.
        once: sites that are drawn once, without a particle dim.
        indices: subsample indices by plate, set by the first run of an evaluation and used by all others.
        handlers: effect handlers around both programs.
        validate: keep Pyro's validation setting; otherwise validation is off.
    """

    programs: Programs
    structure: Structure | None
    num_particles: int = 1
    once: frozenset[str] = frozenset()
    indices: dict[str, Tensor] = field(default_factory=dict)
    handlers: tuple[Messenger, ...] = ()
    validate: bool = False

    @property
    def layout(self) -> Layout:
        nesting = 0 if self.structure is None else self.structure.max_plate_nesting
        return Layout(nesting, self.num_particles)

    def traces(
        self, draws: Trace | None = None, *, settled: bool = False, freeze: tuple[Trace, ...] = ()
    ) -> tuple[Trace, Trace]:
        """Return the traces of model and guide.

        Args:
            draws: replay the guide on these instead of drawing.
            settled: they are the guide's trace as it is; it is not run.
            freeze: hold the parameters of the programs, and those that these traces name, constant.
        """
        programs, structure = self.programs, self.structure
        model, guide, kwargs = programs.bound()
        for handler in self.handlers:
            model, guide = handler(model), handler(guide)
        if structure is not None and (structure.enumerated or structure.enumerated_in_guide):
            first = -1 - self.layout.rank
            if structure.enumerated_in_guide:
                guide = EnumMessenger(first)(_InParallel()(self._in_groups(guide)))
                model = EnumMessenger()(_InParallel()(model))
            else:
                model = EnumMessenger(first)(_InParallel()(model))
        model, guide = self._spread(model), self._spread(guide)
        with self._modes(replayed=draws is not None) as stack:
            if freeze:
                stack.enter_context(frozen(trainable(programs.model, programs.guide, *freeze)))
            if settled:
                assert draws is not None
                traces = poutine.trace(poutine.replay(model, trace=draws)).get_trace(*programs.args, **kwargs), draws
            else:
                traces = run_pair(model, guide, programs.args, kwargs, draws)
        self._record_indices(traces)
        return traces

    def released(self, draws: Trace | None = None) -> Trace:
        """Return a trace of the model with its observations drawn, and the latents that ``draws`` lacks.

        Deterministic sites and factors stay, and nothing is summed out.
        """
        model, _, kwargs = self.programs.bound()
        model = self._spread(Released()(model))
        if draws is not None:
            model = poutine.replay(model, trace=draws)
        with self._modes():
            return poutine.trace(model).get_trace(*self.programs.args, **kwargs)

    def _in_groups(self, guide: Program) -> Program:
        """Return a guide whose sites with ``num_samples`` draw a group of values for each particle.

        These get the particles' dim before Pyro draws the group; sites that are summed over exactly get it after that,
        since their values are those of all particles.
        """
        assert self.structure is not None
        rest = frozenset(name for name, info in self.structure.sites.items() if not info.drawn_in_groups)
        if self.num_particles == 1 or len(rest) == len(self.structure.sites):
            return guide
        return Particles(self.num_particles, -self.layout.rank, self.once | rest)(guide)

    def _spread(self, program: Program) -> Program:
        """Return a program with all particles at once, on the minibatch of the evaluation."""
        if self.num_particles > 1:
            program = Particles(self.num_particles, -self.layout.rank, self.once)(program)
        return _FixedSubsample(self.indices)(program) if self.indices else program

    @contextmanager
    def _modes(self, *, replayed: bool = False) -> Iterator[ExitStack]:
        """Set the modes and switches in which programs run."""
        programs = self.programs
        with ExitStack() as stack:
            stack.enter_context(RUNNING)
            if not self.validate:
                stack.enter_context(pyro.validation_enabled(False))
            if not programs.training:
                stack.enter_context(evaluation_mode(programs.model, programs.guide))
                stack.enter_context(kept_buffers(programs.model, programs.guide))
                stack.enter_context(noted_parameters())
            elif replayed:
                stack.enter_context(no_statistics(programs.model, programs.guide))
            yield stack

    def replayed(self, draws: Trace, *, freeze: tuple[Trace, ...] = (), detach: bool = False) -> tuple[Trace, Trace]:
        """Return traces at the guide's draws of an earlier run; with ``detach`` no gradient flows through the draws."""
        if detach:
            draws = draws.copy()
            for site in sample_sites(draws):
                draws.nodes[site["name"]] = {**site, "value": site["value"].detach()}
        return self.traces(draws, freeze=freeze)

    def _record_indices(self, traces: tuple[Trace, Trace]) -> None:
        for trace in traces:
            for site in trace.nodes.values():
                if site["type"] == "sample" and site_is_subsample(site) and site["name"] not in self.indices:
                    drawn = getattr(site["fn"], "subsample_size", None)
                    if drawn is not None and drawn < site["fn"].size and not site["is_observed"]:
                        self.indices[site["name"]] = site["value"]


def _with_own_options(draws: Trace) -> Trace:
    """Draws to replay, whose ``infer`` dicts are copies: enumeration notes in them the dims of one run."""
    copied = draws.copy()
    for name, site in draws.nodes.items():
        if site.get("infer") is not None:
            copied.nodes[name] = {**site, "infer": dict(site["infer"])}
    return copied


def run_pair(
    model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], draws: Trace | None = None
) -> tuple[Trace, Trace]:
    """Return the traces of model and guide; with ``draws``, the guide is replayed on them."""
    if draws is not None:
        guide = poutine.replay(guide, trace=_with_own_options(draws))
    handler = poutine.unwrap(guide)
    if isinstance(handler, Messenger):  # a guide written as an effect handler around the model
        guide(*args, **kwargs)
        return handler.get_traces()
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace
