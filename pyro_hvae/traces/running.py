"""Run a pair of programs: checked once for new shapes, vectorised over particles, on new draws or given ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
    Plate,
    Structure,
    sample_sites,
    signature,
    structure_of,
)
from pyro_hvae.traces.validation import check_particles, check_values

__all__ = ["given", "isolated", "known", "log_joint", "log_weights", "read", "run_pair", "structure", "unregistered"]

Program = Callable[..., Any]


class _Particles(Messenger):
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
        ValueError: if the two programs do not fit each other, a site's shape does not fit its plates, or an
            observed value is not finite or outside of its distribution's support.
    """
    kwargs = {} if kwargs is None else dict(kwargs)
    check_particles(num_particles)
    found = structure(model, guide, args, kwargs)
    single = frozenset() if once is None else once(found)

    return _executed(model, guide, args, kwargs, found, num_particles, single)


def _executed(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    found: Structure,
    num_particles: int,
    once: frozenset[str],
    draws: Trace | None = None,
) -> Reading:
    def execute(draws: Trace | None, *, freeze: tuple[Trace, ...] = (), detach: bool = False) -> tuple[Trace, Trace]:
        (run_model, run_guide), rest = bind_context((_bare(model), _bare(guide)), kwargs)
        if any(site.role == "enumerated" for site in found.sites.values()):
            run_model = enumerated(run_model, found, num_particles)
        if num_particles > 1:
            particles = _Particles(num_particles, -found.max_plate_nesting - 1, once)
            run_model, run_guide = particles(run_model), particles(run_guide)
        with (
            pyro.validation_enabled(False),
            frozen(trainable(model, guide, *freeze)) if freeze else nullcontext(),
        ):
            return run_pair(run_model, run_guide, args, rest, draws=draws, detach=detach)

    model_trace, guide_trace = execute(draws)
    found = _current(found, model_trace, guide_trace, model, guide)
    return Reading(model_trace, guide_trace, found, num_particles, execute)


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


def given(
    model: Program,
    guide: Program,
    values: Mapping[str, Tensor],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Reading:
    """Read a pair at given draws instead of the guide's own.

    Args:
        values: for every site that the guide draws, S values on the leftmost dimension, or one without it.

    Raises:
        ValueError: if a drawn site has no value, or their numbers of draws differ.
    """
    kwargs = {} if kwargs is None else dict(kwargs)
    found = structure(model, guide, args, kwargs)
    missing = sorted(set(found.drawn) - set(values))
    if missing:
        raise ValueError(f"no value was given for site(s) {missing} that the guide draws; given: {sorted(values)}")
    with isolated(model, guide):
        _, draws = run_pair(model, guide, args, kwargs)
    counts = set()
    for name in found.drawn:
        node, value = draws.nodes[name], values[name]
        extra = value.dim() - node["value"].dim()
        particle_dim = found.max_plate_nesting + node["fn"].event_dim + 1
        if extra > 0:
            counts.add(value.shape[0])
            value = value.reshape(value.shape[0], *(1,) * (particle_dim - value.dim()), *value.shape[1:])
        else:
            counts.add(1)
        draws.nodes[name] = {**node, "value": value}
    if len(counts) > 1:
        raise ValueError(f"sites come with different numbers of draws: {sorted(counts)}")
    count = counts.pop() if counts else 1
    if count == 1:
        for name in found.drawn:
            node = draws.nodes[name]
            node["value"] = node["value"].reshape(node["fn"].shape())
    return _executed(model, guide, args, kwargs, found, count, frozenset(), draws)


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Log-weights :math:`\log p(x_n, z_{kn}) - \log q(z_{kn}|x_n)` of ``num_particles`` draws, without gradient.

    Args:
        num_particles: K >= 1.
        chunk_size: how many particles run at once; all of them by default.  Memory grows with it, the result
            does not depend on it but for the order of the random numbers.

    Returns:
        Tensor of shape ``(K, *plates)`` in nats.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> log_weights(model, model, num_particles=3)
        tensor([0., 0., 0.])
    """
    check_particles(num_particles)
    size = num_particles if chunk_size is None else chunk_size
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    chunks = []
    with torch.no_grad():
        for start in range(0, num_particles, size):
            count = min(size, num_particles - start)
            chunks.append(read(model, guide, args, kwargs, num_particles=count).log_weights)
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


def log_joint(
    model: Program,
    values: Mapping[str, Tensor],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    plates: tuple[Plate, ...],
    max_plate_nesting: int,
    num_particles: int,
) -> dict[str, Tensor]:
    """log p of each site of the model at given latent values, each of shape ``(K, *plates)``, gradients live.

    Args:
        values: for each latent site its value, with K as the leftmost batch dimension.
        plates: the plates that a datum indexes; what they scale stays out, as in a :class:`Reading`.
        max_plate_nesting: how many plate dimensions the model has, without the particles'.

    Raises:
        ValueError: if a latent site of the model is not among ``values``.
    """
    kwargs = {} if kwargs is None else kwargs
    draws = Trace()
    for name, value in values.items():
        draws.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    (model,), kwargs = bind_context((model,), kwargs)
    run = model if num_particles == 1 else _Particles(num_particles, -max_plate_nesting - 1, frozenset())(model)
    with pyro.validation_enabled(False):
        trace = poutine.trace(poutine.replay(run, trace=draws)).get_trace(*args, **kwargs)
    missing = [s["name"] for s in sample_sites(trace) if not s["is_observed"] and s["name"] not in values]
    if missing:
        raise ValueError(f"no value was given for the model's latent sites {missing}; given: {sorted(values)}")
    found = Structure({}, plates, (), max_plate_nesting, ())

    def no_rerun(*_: Any, **__: Any) -> tuple[Trace, Trace]:
        raise RuntimeError("a log joint has no guide to replay")

    reading = Reading(trace, Trace(), found, num_particles, no_rerun)
    return {site["name"]: reading.log_prob(site) for site in sample_sites(trace)}


class _Programs:
    """What is known of a pair, kept as long as both programs live."""

    def __init__(self) -> None:
        self.by_arguments: dict[Any, Structure] = {}
        self.by_signature: dict[tuple, Structure] = {}
        self.checked_routes: set[Any] = set()
        self.dependencies: dict[tuple, Any] = {}


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
    kept = [(buffer._version, buffer.clone()) for buffer in buffers]
    with torch.random.fork_rng(), poutine.block():
        yield
    with torch.no_grad():
        for buffer, (version, value) in zip(buffers, kept, strict=True):
            if buffer._version != version:  # a graph may hold one that no run has touched
                buffer.copy_(value)
