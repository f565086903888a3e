"""What a file may call: names of this library, of torch and of Pyro that only build programs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyro_hvae.training.files import CheckpointError

__all__ = ["UntrustedError", "check_trusted", "is_trusted", "names_in"]

PARTS = ("", ".models", ".kernels", ".nn", ".chains", ".diffusion", ".bounds")
MODULES = (*(f"pyro_hvae{part}" for part in PARTS), "torch.nn", "torch.optim", "pyro.infer.autoguide")
"""Modules whose public classes of networks, chains, bounds, guides and optimisers a file may call."""

FUNCTIONS = frozenset(("pyro_hvae.bounds.warm_up",))
"""Functions that a file may call, besides the public functions of :mod:`pyro_hvae.models` and Pyro's ``init_to_*``."""

ASSEMBLERS = frozenset(("pyro_hvae.cli.specs.make_pair", "amortize"))
"""Build programs from a specification, whose names are checked one by one, or from a model."""

CALLED = ("class_path", "object", "factory", "pair", "model", "guide")
"""Entries of a specification that name what is called or imported."""


class UntrustedError(CheckpointError):
    """Error: a file names something that reading it would execute, and the caller did not say that it is trusted."""


def is_trusted(path: str) -> bool:
    """Whether a name is one that any file may call; nothing is imported that is not imported already.

    Example:
        >>> is_trusted("pyro_hvae.models:vae"), is_trusted("torch.nn.Linear"), is_trusted("os:system")
        (True, True, False)
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")[::1]
    if module_name not in MODULES or not name.isidentifier() or name.startswith("_"):
        return False
    module = importlib.import_module(module_name)
    if name not in getattr(module, "__all__", dir(module)):
        return False
    target = getattr(module, name, None)
    if f"{module_name}.{name}" in FUNCTIONS:
        return True
    if isinstance(target, type):
        return issubclass(target, (nn.Module, torch.optim.Optimizer))
    starts = "init_to_" if module_name == "pyro.infer.autoguide" else None
    if not inspect.isfunction(target):
        return False
    if starts is not None:
        return name.startswith(starts)
    own = getattr(importlib.import_module("pyro_hvae.models"), name, None) is target
    return own and target.__module__.partition(".")[0] == "pyro_hvae"


def names_in(spec: Any) -> list[str]:
    """Return the names that building a specification would call or import, at any depth.

    Example:
        >>> names_in({"pair": "os.system", "pair_args": {"net": {"class_path": "torch.nn.Linear", "args": [1, 2]}}})
        ['os.system', 'torch.nn.Linear']
    """
    if isinstance(spec, Mapping):
        found = [spec[key] for key in CALLED if isinstance(spec.get(key), str) and not spec[key].startswith("$")]
        return found + [name for value in spec.values() for name in names_in(value)]
    if isinstance(spec, (list, tuple)):
        return [name for value in spec for name in names_in(value)]
    return []


def check_trusted(spec: Any, source: Any, trust: bool) -> None:
    """Refuse a specification that names anything else than :func:`is_trusted` accepts.

    Args:
        spec: the content of a file, or a part of it.
        source: the file, for the message.
        trust: accept any name.

    Raises:
        UntrustedError: with the names.
    """
    if trust:
        return
    names = list(dict.fromkeys(names_in(spec)))
    others = [name for name in names if name.replace(":", ".") not in ASSEMBLERS and not is_trusted(name)]
    if others:
        raise UntrustedError(
            f"{source} would call {', '.join(map(repr, others))}, which is not of this library. If you trust whoever "
            "wrote it, pass trust=True (on the command line --trust); to read the weights alone, build the programs, "
            "and pass load(run_dir, programs=(model, guide))"
        )
