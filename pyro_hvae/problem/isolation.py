"""Run programs without changing them: generators, buffers, training flags and outer handlers."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from torch import nn

from pyro_hvae.modules import modules_of

__all__ = [
    "RUNNING",
    "evaluating",
    "fingerprint",
    "forget_parameters",
    "isolated",
    "kept_buffers",
    "kept_generators",
    "kept_host_generators",
    "kept_store",
    "no_statistics",
    "noted_parameters",
    "unchanged",
]

RUNNING = threading.RLock()
"""Held while programs run: Pyro's handler stack, parameter store and validation switch belong to the process."""

LIBRARIES = frozenset(("math", "numpy", "pyro", "pyro_hvae", "random", "torch"))
"""Python modules whose attributes are no switches of a program that names them."""

Program = Callable[..., Any]


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore torch's, numpy's and Python's generators afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), kept_host_generators():
        yield


@contextmanager
def kept_host_generators() -> Iterator[None]:
    """Restore numpy's and Python's generators afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


@contextmanager
def kept_buffers(*programs: Program) -> Iterator[None]:
    """Let modules work on copies of their buffers."""
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    copies: dict[int, torch.Tensor] = {}
    for module in modules_of(*programs):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                swapped.append((module._buffers, name, buffer))
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in swapped:
            owner[name] = buffer


@contextmanager
def kept_store() -> Iterator[None]:
    """Remove parameters that programs add to Pyro's store; entered while :data:`RUNNING` is held."""
    store = pyro.get_param_store()
    stored = set(store.keys())
    try:
        yield
    finally:
        forget_parameters(store, set(store.keys()) - stored)


def forget_parameters(store: Any, names: Iterable[str]) -> None:
    """Take parameters out of Pyro's store, of which two names may share one."""
    for name in names:
        store._param_to_name.pop(store._params.pop(name), None)
        store._constraints.pop(name, None)


@contextmanager
def unchanged(*programs: Program) -> Iterator[None]:
    """Draw from programs and leave them as they are.

    Draws advance torch's generator.  Numpy's and Python's generators and Pyro's parameter store are restored.
    Outer handlers are blocked, and modules work on copies of their buffers.
    """
    with RUNNING, kept_host_generators(), poutine.block(), kept_store(), kept_buffers(*programs):
        yield


@contextmanager
def isolated(*programs: Program) -> Iterator[None]:
    """Run programs without side effects.

    Generators are restored, outer handlers are blocked, modules work on copies of their buffers, and parameters that
    the programs add to Pyro's store are removed.
    """
    with RUNNING, kept_generators(), poutine.block(), kept_store(), kept_buffers(*programs):
        yield


_EVALUATION = threading.local()


@contextmanager
def evaluating() -> Iterator[None]:
    """Restore numpy's and Python's generators and Pyro's parameter store after several runs of programs.

    Torch's generator advances, since draws come from it.  Decorates functions that evaluate a problem.
    """
    if getattr(_EVALUATION, "added", None) is not None:  # a part of a larger evaluation
        yield
        return
    _EVALUATION.added = set()
    try:
        with kept_host_generators():
            yield
    finally:
        added, _EVALUATION.added = _EVALUATION.added, None
        if added:
            with RUNNING:
                store = pyro.get_param_store()
                forget_parameters(store, added & set(store.keys()))


@contextmanager
def noted_parameters() -> Iterator[None]:
    """Note parameters that a run adds to Pyro's store, for the evaluation around it to remove.

    Entered while programs run.  Parameters that other threads add between runs, as in training, are not noted.
    """
    added = getattr(_EVALUATION, "added", None)
    if added is None:
        yield
        return
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    finally:
        added |= set(store.keys()) - before


@contextmanager
def no_statistics(*programs: Program) -> Iterator[None]:
    """Normalise by the batch in training mode without updating the running statistics."""
    with ExitStack() as stack:
        for module in modules_of(*programs):
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
                module.track_running_stats = False
                stack.callback(setattr, module, "track_running_stats", True)
        yield


def fingerprint(*programs: Any) -> tuple:
    """Return the switches that programs hold: booleans, strings, None, small integers, modules' training flags.

    Results derived from a run of the programs are derived again when a switch changes.  Attributes of modules are read,
    and for functions the defaults, closures and globals that they name, with the attributes of these.  Deeper
    values are not read, nor are floats, since they do not change the flow of data.
    """
    switches: list[Any] = []
    modules = modules_of(*programs)
    for module in modules:
        switches.append(module.training)
        _switches(vars(module), switches)
    waiting = list(programs)
    while waiting:
        program = waiting.pop()
        if isinstance(program, partial):
            for value in (*program.args, *program.keywords.values()):
                if not _switch(value, switches) and callable(value):
                    waiting.append(value)
            waiting.append(program.func)
        elif not isinstance(getattr(program, "__self__", program), nn.Module):
            _of_function(program, switches)
    return tuple(switches)


def _of_function(function: Any, switches: list[Any]) -> None:
    owner = getattr(function, "__self__", None)
    if owner is not None:
        _switches(getattr(owner, "__dict__", {}), switches)
    code = getattr(function, "__code__", None)
    if code is None:
        _switches(getattr(function, "__dict__", {}), switches)
        return
    values = list(getattr(function, "__defaults__", None) or ())
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a name that has no value yet
            continue
    globals_ = function.__globals__
    values += [globals_[name] for name in code.co_names if name in globals_]
    for value in values:
        if not _switch(value, switches):
            if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in LIBRARIES:
                continue
            if isinstance(value, dict):
                switches += [item for item in value.values() if type(item) in (bool, str) or item is None]
            elif (not isinstance(value, (torch.Tensor, nn.Module)) and not callable(value)) or isinstance(value, type):
                _switches(getattr(value, "__dict__", {}), switches)


def _switches(attributes: Any, switches: list[Any]) -> None:
    for name, value in attributes.items():
        if not (isinstance(name, str) and name.startswith("_")):
            _switch(value, switches)


def _switch(value: Any, switches: list[Any]) -> bool:
    kind = type(value)
    if kind is bool or kind is str or value is None:
        switches.append(value)
    elif kind is int:
        switches.append(min(max(value, -1), 2))  # a counter must not invalidate the results at each step
    else:
        return False
    return True
