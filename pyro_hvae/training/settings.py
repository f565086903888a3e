"""What shapes the result of a run, as plain data: recorded when it starts, compared when it is resumed."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_hvae.training.feed import Feed, IterableFeed, TensorFeed

__all__ = ["describe", "describe_feed", "describe_optimizer", "describe_schedule", "differences"]

HASHED = 2**28
"""Bytes of a data set that are hashed; of a larger one, rows at equal distances."""

DEPTH = 5

CHANGES = frozenset(("training", "max_plate_nesting"))
"""Attributes of a bound that its first use sets."""


def describe(value: Any, depth: int = DEPTH) -> Any:
    """Convert a value to JSON: numbers, names of functions with a hash of their code, public attributes of objects.

    Attributes that begin with an underscore, parameters and buffers are left out.

    Example:
        >>> describe({"lr": 0.1, "dtype": torch.float32})
        {'lr': 0.1, 'dtype': 'torch.float32'}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return describe_tensor(torch.as_tensor(value))
    if isinstance(value, type):
        return _name(value)
    if depth == 0:
        return _name(type(value))
    if isinstance(value, Mapping):
        return {str(key): describe(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item, depth - 1) for item in value]
    if isinstance(value, partial):
        parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
        return {name: describe(part, depth - 1) for name, part in parts.items() if part}
    if hasattr(value, "__code__") or hasattr(value, "__func__"):
        return _function(value, depth)
    attributes = {
        name: describe(item, depth - 1)
        for name, item in getattr(value, "__dict__", {}).items()
        if not name.startswith("_") and name not in CHANGES
    }
    if isinstance(value, nn.Module):
        attributes |= {name: describe(child, depth - 1) for name, child in value.named_children()}
    if attributes:
        return {"class": _name(type(value)), **attributes}
    text = repr(value)
    return _name(type(value)) if " at 0x" in text else text


def describe_tensor(value: Tensor) -> str:
    """Return shape, dtype and a hash of the values."""
    rows = value.detach()
    if rows.device.type == "meta":
        return f"{tuple(value.shape)} {value.dtype}"
    size = rows.numel() * rows.element_size()
    if size > HASHED and rows.dim():
        rows = rows[:: -(-size // HASHED)]
    hashed = hashlib.blake2b(digest_size=8)
    for piece in rows.split(max(1, 2**24 * len(rows) // max(size, 1))) if rows.dim() and len(rows) else [rows]:
        hashed.update(piece.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return f"{tuple(value.shape)} {value.dtype} #{hashed.hexdigest()}"


def describe_feed(source: Feed | None) -> Any:
    """Describe data: tensors by their values, other sources by sizes and the shapes of a row."""
    if source is None:
        return None
    if isinstance(source, TensorFeed):
        named = {**{str(place): value for place, value in enumerate(source.args)}, **source.kwargs}
        return {name: describe_tensor(value) for name, value in named.items()}
    if not isinstance(source, IterableFeed) or source.once:
        return {"class": _name(type(getattr(source, "source", source)))}
    args, kwargs = source.example()
    named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    sizes = {"class": _name(type(source.source)), "data_size": source.data_size, "batches": source.batches}
    rows = {name: f"{tuple(value.shape[1:])} {value.dtype}" for name, value in named.items() if hasattr(value, "dtype")}
    return sizes | rows


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Describe class and hyper-parameters, before any step and schedule."""
    groups = []
    for group in optimizer.param_groups:
        values = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
        values["lr"] = group.get("initial_lr", group["lr"])
        groups.append(describe({name: float(v) if isinstance(v, Tensor) else v for name, v in values.items()}))
    return {"class": _name(type(optimizer)), "groups": groups}


def describe_schedule(schedule: Any) -> Any:
    """Describe a scheduler of learning rates, before any step."""
    if schedule is None:
        return None
    hidden = ("optimizer", "_last_lr", "_schedulers", "lr_lambdas")
    found = {name: describe(value) for name, value in vars(schedule).items() if name not in hidden}
    if lambdas := getattr(schedule, "lr_lambdas", None):
        found["lr_lambdas"] = describe(lambdas, DEPTH + 1)
    if parts := getattr(schedule, "_schedulers", None):
        found["schedulers"] = [describe_schedule(part) for part in parts]
    limits = [
        {name: describe(group[name]) for name in ("initial_lr", "max_lr", "min_lr") if name in group}
        for group in schedule.optimizer.param_groups
    ]
    return {"class": _name(type(schedule)), "rates": limits, **found}


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any], *, code: bool = True) -> dict[str, str]:
    """Return what differs between two descriptions: a sentence by the name of each setting.

    Args:
        code: compare the hashes of functions too, which depend on Python's version.
    """
    found = {}
    for name in [*present, *(name for name in recorded if name not in present)]:
        before, now = _flat(name, recorded.get(name)), _flat(name, present.get(name))
        if not code:
            before, now = ({key: _without_hash(value) for key, value in part.items()} for part in (before, now))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed and None in (recorded.get(name), present.get(name)):
            found[name] = f"{name} was {_first(recorded.get(name))}, and is {_first(present.get(name))} now"
        elif changed:
            key = min(changed, key=len)
            found[name] = f"{key} was {_shown(before.get(key))}, and is {_shown(now.get(key))} now"
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: leaf for part, item in value.items() for key, leaf in _flat(f"{name}.{part}", item).items()}
    if isinstance(value, list):
        if len(value) == 1:
            return _flat(name, value[0])
        return {key: leaf for place, item in enumerate(value) for key, leaf in _flat(f"{name}[{place}]", item).items()}
    return {name: value}


def _first(value: Any) -> str:
    """Return the first entry of a description: the class of an object."""
    while isinstance(value, (Mapping, list)) and value:
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return _shown(value)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, str) else repr(value)


def _without_hash(value: Any) -> Any:
    return re.sub(r" code~[0-9a-f]+", "", value) if isinstance(value, str) else value


def _name(kind: Any) -> str:
    module = (getattr(kind, "__module__", "") or "").replace("__mp_main__", "__main__")
    return f"{module}.{getattr(kind, '__qualname__', kind)}".removeprefix("builtins.")


def _function(function: Callable[..., Any], depth: int) -> Any:
    owner = getattr(function, "__self__", None)
    bare: Any = getattr(function, "__func__", function)
    hashed = hashlib.blake2b(_code(bare.__code__) if hasattr(bare, "__code__") else b"", digest_size=6).hexdigest()
    name = f"{_name(bare)} code~{hashed}"
    cells = []
    for cell in getattr(bare, "__closure__", None) or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # a name that has no value yet
            continue
    held: dict[str, Any] = {"defaults": list(getattr(bare, "__defaults__", None) or ()), "closure": cells}
    held = {key: describe(values, depth - 1) for key, values in held.items() if values}
    if owner is not None:
        held["owner"] = describe(owner, depth - 1)
    return {"function": name, **held} if held else name


def _code(code: CodeType) -> bytes:
    parts = [code.co_code, repr(code.co_names).encode()]
    for value in code.co_consts:
        constant = sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)  # sets have no fixed order
        parts.append(_code(value) if isinstance(value, CodeType) else str(constant).encode())
    return b"\0".join(parts)
