"""Pairs of the registry on torch's ``meta`` device, which stands in for an accelerator.

Tensors of that device have no values: reading one (``item``, ``tolist``, ``bool``, ``equal``, indexing by a mask)
raises, and so does an operation on a tensor of it and one of the CPU, except for a CPU tensor without dims.
The default device stays the CPU, as a user has it, so a tensor that the package makes without naming a device
meets the program's in an operation and raises.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_hvae import devices
from tests.pair import Pair, build

__all__ = ["Wait", "build_on_meta", "moved", "no_waits", "on_meta"]

aten = torch.ops.aten
HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARIES = tuple(os.path.dirname(str(library.__file__)) for library in (torch, pyro))
META = torch.device("meta")


class Wait(AssertionError):
    """Raised for a copy between the device and the host in a step."""


class _ProgramsOnMeta(TorchFunctionMode):
    """Make the tensors on ``meta`` that programs of the tests create; those of the package stay on the default."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None and _called_by_tests():
            kwargs["device"] = META
        return func(*args, **kwargs)


def _called_by_tests() -> bool:
    frame: Any = sys._getframe(2)
    return bool(frame.f_code.co_filename.startswith(HERE))


@contextmanager
def on_meta() -> Iterator[None]:
    """Run programs of the tests on ``meta``."""
    with _ProgramsOnMeta():
        yield


class _NoCopies(TorchDispatchMode):
    """Raise at a copy from the CPU to the device, which an accelerator waits for; the tests' own are let through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if func is aten._to_copy.default else args[1]
            if source.device.type == "cpu" and result.is_meta and not _line_of_tests():
                raise Wait(f"{func} of a tensor of shape {tuple(source.shape)} from the CPU")
        return result


def _line_of_tests() -> bool:
    """Whether the innermost line that is none of torch or Pyro, and none of this file, is one of the tests."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(LIBRARIES):
            return bool(name.startswith(HERE))
        frame = frame.f_back
    return False


@contextmanager
def no_waits() -> Iterator[None]:
    """Refuse what makes a step wait for the device: reads of values, copies between host and device.

    Reads raise on ``meta`` anyway, except behind :func:`pyro_hvae.devices.has_values`, which checks before the first
    step ask.  Here it raises, too.
    """

    def asked(*tensors: Any) -> bool:
        raise Wait("a step asks whether its tensors have values")

    before, devices.has_values = devices.has_values, asked
    try:
        with _NoCopies():
            yield
    finally:
        devices.has_values = before


def build_on_meta(name: str) -> Pair:
    """Return a pair of the registry with parameters, data and everything that its programs hold on ``meta``."""
    pair = build(name)
    pair.model, pair.guide = moved(pair.model), moved(pair.guide)
    pair.args, pair.kwargs = moved(pair.args), moved(dict(pair.kwargs))
    pyro.clear_param_store()  # modules that were run while the pair was made have other parameters now
    return pair


def moved(value: Any, seen: set[int] | None = None) -> Any:
    """Return a value with its tensors on ``meta``: of modules, closures, partial functions, handlers, containers.

    Everything but tensors, lists and tuples is changed in place, so that programs remain the same objects.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return value.to(META)
    if type(value) in (tuple, list):
        return type(value)(moved(inner, seen) for inner in value)
    if id(value) in seen or isinstance(value, type):
        return value
    seen.add(id(value))
    if isinstance(value, partial) and isinstance(value.func, partial):  # Pyro's wrapper, which holds the same twice
        moved(value.func, seen)
    elif isinstance(value, partial):
        parts = moved((value.func, value.args, dict(value.keywords)), seen)
        value.__setstate__((*parts, vars(value)))  # type: ignore[attr-defined]
    elif isinstance(value, dict):
        for name, inner in value.items():
            value[name] = moved(inner, seen)
    elif isinstance(value, nn.Module):
        value.to(META)
        for module in value.modules():
            _attributes(module, seen)
    elif isinstance(value, (Messenger, Constraint)):
        _attributes(value, seen)
    for cell in getattr(value, "__closure__", None) or ():
        cell.cell_contents = moved(cell.cell_contents, seen)
    return value


def _attributes(owner: Any, seen: set[int]) -> None:
    for name, inner in vars(owner).items():
        if isinstance(inner, (Tensor, tuple, list, dict, partial, Messenger)) or getattr(inner, "__closure__", None):
            vars(owner)[name] = inner if name in ("_parameters", "_buffers", "_modules") else moved(inner, seen)
