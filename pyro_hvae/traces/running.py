"""Run a pair of programs: checked once for new shapes, vectorised over particles, on new draws or given ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_hvae.traces.enumeration import enumerated
from pyro_hvae.traces.parameters import frozen, trainable
from pyro_hvae.traces.reading import Reading
from pyro_hvae.traces.structure import (
    PARTICLES,
    Structure,
    sample_sites,
    signature,
    structure_of,
)
from pyro_hvae.traces.validation import check_particles, check_values

__all__ = ["Particles", "execute", "isolated", "known", "read", "run_pair", "structure", "unregistered"]

Program = Callable[..., Any]


class Particles(Messenger):
    """Put every site, except those named in ``once``, into a leftmost plate of ``num_particles``."""

    def __init__(self, num_particles: int, dim: int, once: frozenset[str]) -> None:
        super().__init__()
        self.frame = CondIndepStackFrame(PARTICLES, dim, num_particles, 0, num_particles)
        self.once = once

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.once and not site_is_subsample(msg):
            msg["cond_indep_stack"] = (self.frame,) + msg["cond_indep_stack"]
            BroadcastMessenger._pyro_sample(msg)


def read(
    model: Program,
    guide: Program,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    once: Callable[[Structure], frozenset[str]] | None = None,
) -> Reading:
    """Run the guide, replay the model on its draws, and return the :class:`Reading`.

    All particles run at once, in a plate to the left of the programs' own.  The first run of a pair on arguments
    of new shapes is preceded by a checked one, with Pyro's validation on and the generator's state restored;
    later runs validate nothing and never wait for the device.

    Args:
        model, guide: Pyro programs, functions or modules.
        args, kwargs: what both are called with.
        num_particles: K >= 1.
        once: from the structure of the pair, the names of the sites to draw once, without a particle dimension.

    Raises:
        ValueError: if the two programs do not fit each other, a site's shape does not fit its plates, an observed
            value is not finite or outside of its distribution's support, or particles that run at once touch each
            other.
    """
    kwargs = {} if kwargs is None else dict(kwargs)
    check_particles(num_particles)
    found = structure(model, guide, args, kwargs)
    single = frozenset() if once is None else once(found)
    if num_particles > 1:
        _check_apart(model, guide, args, kwargs, found, single)
    return execute(model, guide, args, kwargs, found, num_particles, single)


def execute(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    found: Structure,
    num_particles: int,
    once: frozenset[str],
    draws: Trace | None = None,
) -> Reading:
    def run(draws: Trace | None, *, freeze: tuple[Trace, ...] = (), detach: bool = False) -> tuple[Trace, Trace]:
        (run_model, run_guide), rest = bind_context((_bare(model), _bare(guide)), kwargs)
        if any(site.role == "enumerated" for site in found.sites.values()):
            run_model = enumerated(run_model, found, num_particles)
        if num_particles > 1:
            particles = Particles(num_particles, -found.max_plate_nesting - 1, once)
            run_model, run_guide = particles(run_model), particles(run_guide)
        with (
            pyro.validation_enabled(False),
            frozen(trainable(model, guide, *freeze)) if freeze else nullcontext(),
        ):
            return run_pair(run_model, run_guide, args, rest, draws=draws, detach=detach)

    model_trace, guide_trace = run(draws)
    found = _current(found, model_trace, guide_trace, model, guide)
    return Reading(model_trace, guide_trace, found, num_particles, run)


def _check_apart(
    model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], found: Structure, once: frozenset[str]
) -> None:
    """Refuse programs that mix particles: give one of two other draws, and see whether the other's densities change.

    Batch norm in training does mix them, as it mixes data, and is let pass.

    Raises:
        ValueError: naming the sites whose density changed.
    """
    checked = known(model, guide).apart
    key = found.signature, once
    if key in checked:
        return
    programs = [program for program in (model, guide) if isinstance(program, torch.nn.Module)]
    modules = [module for program in programs for module in program.modules()]
    touched: list[str] = []
    if not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training for module in modules):
        with torch.no_grad(), isolated(model, guide), suppress(ValueError, RuntimeError):  # the run itself will say it
            touched = _touched(model, guide, args, kwargs, found, once)
    if touched:
        raise ValueError(
            f"the density of site(s) {touched} in one particle depends on the draws of another. Particles run at once, "
            "along a dim to the left of all plates, and the program sums, averages or indexes over that dim: count "
            "dims from the right, as in z.sum(-1), or use one particle"
        )
    checked.add(key)


def _touched(
    model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], found: Structure, once: frozenset[str]
) -> list[str]:
    """Sites whose density in one of two particles changes with the draws of the other."""

    def replayed(draws: Trace) -> Reading:
        torch.manual_seed(0)  # what else is random in the programs
        return execute(model, guide, args, kwargs, found, 2, once, draws)

    drawn, fresh = (execute(model, guide, args, kwargs, found, 2, once).guide_trace for _ in range(2))
    before = replayed(drawn)
    touched = []
    for kept in (0, 1):
        mixed = drawn.copy()
        for site in sample_sites(mixed):
            value, other = site["value"], fresh.nodes[site["name"]]["value"]
            dim = value.dim() - site["fn"].event_dim - found.max_plate_nesting - 1
            if not site["is_observed"] and dim >= 0 and value.shape[dim] == 2 and value.shape == other.shape:
                parts = [(value if index == kept else other).narrow(dim, index, 1) for index in (0, 1)]
                mixed.nodes[site["name"]] = {**site, "value": torch.cat(parts, dim)}
        after = replayed(mixed)
        for old, new in ((before.log_p, after.log_p), (before.log_q, after.log_q)):
            for name in set(old) - once:
                one, other = (terms[name].expand(2, *terms[name].shape[1:])[kept] for terms in (old, new))
                if not torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True):
                    touched.append(name)
    return sorted(set(touched))


class _EventDims(Messenger):
    """Note the names that programs give to event dims, before a replay puts the guide's options in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[str, ...]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        names = (msg["infer"] or {}).get("event_dims")
        if names:
            self.found[msg["name"]] = tuple(names)


_REGISTER: ContextVar[bool] = ContextVar("register", default=True)


@contextmanager
def unregistered() -> Iterator[None]:
    """Run modules without their ``pyro.param`` statements, which an optimiser over their parameters does not need.

    Half of what Pyro adds to a small step is registering parameters in its store.  A module with random parameters
    (``PyroSample``) is left to register, since its names are those of its sample sites.
    """
    token = _REGISTER.set(False)
    try:
        yield
    finally:
        _REGISTER.reset(token)


def _bare(program: Program) -> Program:
    """The program without registration, where that is asked for and changes nothing else."""
    if _REGISTER.get() or not isinstance(program, PyroModule):
        return program
    random = any(isinstance(module, PyroModule) and module._pyro_samples for module in program.modules())
    return program if random else partial(torch.nn.Module.__call__, program)


def bind_context(
    programs: tuple[Program, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Program, ...], Mapping[str, Any]]:
    """Bind a keyword ``context`` to the programs: Pyro's handlers take that name for themselves when they wrap one."""
    if "context" not in kwargs:
        return programs, kwargs
    rest = {name: value for name, value in kwargs.items() if name != "context"}
    return tuple(partial(program, context=kwargs["context"]) for program in programs), rest


def run_pair(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    draws: Trace | None = None,
    detach: bool = False,
) -> tuple[Trace, Trace]:
    """The traces of model and guide; with ``draws``, the guide is replayed on them instead of drawing anew."""
    (model, guide), kwargs = bind_context((model, guide), kwargs)
    if draws is not None:
        if detach:
            draws = draws.copy()
            for site in sample_sites(draws):
                draws.nodes[site["name"]] = {**site, "value": site["value"].detach()}
        guide = poutine.replay(guide, trace=draws)
    handler = poutine.unwrap(guide)
    if isinstance(handler, Messenger):  # a guide written as an effect handler around the model
        guide(*args, **kwargs)
        return handler.get_traces()
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace


class _Programs:
    """What is known of a pair, kept as long as both programs live."""

    def __init__(self) -> None:
        self.by_arguments: dict[Any, Structure] = {}
        self.by_signature: dict[tuple, Structure] = {}
        self.checked_routes: set[Any] = set()
        self.dependencies: dict[tuple, Any] = {}
        self.apart: set[tuple] = set()


_KNOWN: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[Any, _Programs]]] = (
    weakref.WeakKeyDictionary()
)


def known(model: Program, guide: Program) -> _Programs:
    """The cache of a pair; a new one at each call for programs that can't be referred to weakly."""
    model_owner, guide_owner = getattr(model, "__self__", model), getattr(guide, "__self__", guide)
    try:
        by_guide = _KNOWN.setdefault(model_owner, weakref.WeakKeyDictionary())
        by_method = by_guide.setdefault(guide_owner, {})
    except TypeError:
        return _Programs()
    key = (getattr(model, "__func__", None), getattr(guide, "__func__", None))
    return by_method.setdefault(key, _Programs())


def structure(model: Program, guide: Program, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Structure:
    """The :class:`Structure` of a pair; found by one checked run for arguments of new shapes, then remembered."""
    kwargs = {} if kwargs is None else kwargs
    cache = known(model, guide)
    key = _argument_key(args, kwargs)
    found = cache.by_arguments.get(key)
    if found is None:
        naming = _EventDims()
        (run_model, run_guide), rest = bind_context((model, guide), kwargs)
        with isolated(model, guide):
            model_trace, guide_trace = run_pair(naming(run_model), naming(run_guide), args, rest)
        found = structure_of(model_trace, guide_trace, naming.found)
        check_values(model_trace, guide_trace)
        cache.by_arguments[key] = cache.by_signature[found.signature] = found
    return found


def _current(found: Structure, model_trace: Trace, guide_trace: Trace, model: Program, guide: Program) -> Structure:
    """The structure of the run that was made, which control flow may have made another than the one probed."""
    names = (
        tuple(s["name"] for s in sample_sites(model_trace)),
        tuple(s["name"] for s in sample_sites(guide_trace)),
    )
    if names == tuple(tuple(entry[0] for entry in part) for part in found.signature):
        return found
    cache = known(model, guide)
    key = signature(model_trace, guide_trace)
    if key not in cache.by_signature:
        cache.by_signature[key] = structure_of(model_trace, guide_trace)
    return cache.by_signature[key]


def _argument_key(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    leaves, spec = tree_flatten((args, dict(kwargs)))
    return (str(spec) if kwargs else len(leaves), *map(_leaf_key, leaves))


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError:
        return type(leaf)
    return leaf


@contextmanager
def isolated(*programs: Program) -> Iterator[None]:
    """Run programs for a look: generators are restored, and outer handlers see nothing.

    Running statistics of batch norm are restored too.
    """
    buffers = [buffer for program in programs if isinstance(program, torch.nn.Module) for buffer in program.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng(), poutine.block():
        yield
    with torch.no_grad():
        for buffer, value in zip(buffers, kept, strict=True):
            # A graph may hold one that no run has touched. Batch norm changes its own without counting a version.
            if not torch.equal(buffer, value):
                buffer.copy_(value)
