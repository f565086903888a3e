"""Detect changes of the state that a graph depends on: modules, parameters, numbers in modules.

A graph contains the values that the program read from Python while it was traced.  So it belongs to one state of the
modules: their submodules, parameters and buffers, which parameters require a gradient, the addresses of the
parameters, and the numbers and strings among the attributes of the modules (``training``, the rate of a dropout,
a weight that is annealed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

__all__ = ["Watch", "attributes"]

_PLAIN = (bool, int, float, complex, str)
_requires_grad = attrgetter("requires_grad")


def attributes(objective: Any) -> dict[tuple[str, str], Any]:
    """Return the numbers, strings and buffers of all modules, by the name of the module and of the attribute."""
    values: dict[tuple[str, str], Any] = {}
    if isinstance(objective, nn.Module):
        for path, module in objective.named_modules():
            values.update({(path, name): value for name, value in _plain(module)})
            values.update({(path, name): buffer for name, buffer in module._buffers.items()})
    return values


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if type(value) in _PLAIN:
            yield name, value


class Watch:
    """Describe the present state of an objective, at a cost of a few microseconds.

    Each call compares the objects with those of the last call, and derives a new state only after a change.

    Args:
        objective: the module.

    Attributes:
        generation: number of replacements of modules, parameters or buffers so far.
    """

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective
        self.generation = 0
        self._collect()

    def _collect(self) -> None:
        modules = list(self.objective.modules())
        held = [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d]
        self._values: list[Callable[[], Any]] = [d.values for d in held]
        self._objects = list(chain.from_iterable([values() for values in self._values]))
        self._tensors = [value for value in self._objects if isinstance(value, Tensor)]
        self._places = [(vars(module), name) for module in modules for name, _ in _plain(module)]
        self._last: tuple = ()
        self._state: tuple = ()

    def __call__(self) -> tuple:
        """Return the present state; equal and hashable for equal states, the same object if nothing has changed."""
        objects = list(chain.from_iterable([values() for values in self._values]))
        if len(objects) != len(self._objects) or not all(map(is_, objects, self._objects)):
            self._collect()
            self.generation += 1
        try:
            now = (
                [values[name] for values, name in self._places],
                list(map(_requires_grad, self._tensors)),
                list(map(Tensor.data_ptr, self._tensors)),
            )
        except KeyError:  # an attribute has been deleted
            self._collect()
            return self()
        if now != self._last:
            numbers, require, _ = now
            state = self.generation, tuple(numbers), tuple(require), tuple(map(_layout, self._tensors))
            if state != self._state:
                self._state = state
            self._last = now
        return self._state


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
