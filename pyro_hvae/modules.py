"""The modules of a program, and evaluation mode; the ground of both towers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

__all__ = ["evaluation_mode", "modules_of"]


def modules_of(*programs: Any) -> list[nn.Module]:
    """Return the modules that programs are or are bound to, with their children, each once.

    Pyro's handlers wrap programs into partial functions; their arguments are searched too.
    """
    by_id: dict[int, nn.Module] = {}
    for program in programs:
        if isinstance(program, partial):
            bound = (program.func, *program.args, *program.keywords.values())
            by_id.update((id(module), module) for module in modules_of(*filter(callable, bound)))
            continue
        owner = getattr(program, "__self__", program)
        if isinstance(owner, nn.Module):
            by_id.update((id(module), module) for module in owner.modules())
        held = getattr(owner, "_held", None)  # programs held without registration as submodules
        if isinstance(held, tuple):
            by_id.update((id(module), module) for module in modules_of(*held))
    return list(by_id.values())


@contextmanager
def evaluation_mode(*programs: Any) -> Iterator[None]:
    """Run modules in evaluation mode; those that were in training mode return to it."""
    changed = [module for module in modules_of(*programs) if module.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True
