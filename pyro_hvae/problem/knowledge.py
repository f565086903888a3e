"""Cache of results derived for a pair of programs; it lives as long as both."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_hvae.problem.cached import Bounded
from pyro_hvae.problem.structure import Structure

__all__ = ["Knowledge", "argument_key", "knowledge_of"]


class Knowledge:
    """Structures of one pair by their signature, and by the kind of arguments that last had them.

    The second is a guess; every run is compared with it.  ``facts`` holds results that do not depend on a structure.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._structures: Bounded = Bounded()
        self._guesses: Bounded = Bounded()
        self.facts: dict[Any, Any] = Bounded()

    def guess(self, key: tuple) -> Structure | None:
        """Return the structure that arguments of this kind had last."""
        return self._guesses.get(key)

    def find(self, signature: tuple) -> Structure | None:
        return self._structures.get(signature)

    def keep(self, structure: Structure, key: tuple) -> Structure:
        """Cache a structure for a kind of arguments; return the cached one of the same signature, if any."""
        with self._lock:
            known = self._structures.get(structure.signature)
            if known is None:
                known = self._structures[structure.signature] = structure
            self._guesses[key] = known
        return known


_CACHE: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[Any, Knowledge]]] = (
    weakref.WeakKeyDictionary()
)
_LOCK = threading.Lock()


def knowledge_of(model: Any, guide: Any) -> Knowledge:
    """Return the cache of a pair; a new one for programs that can't be referred to weakly."""
    model_owner, guide_owner = _owner(model), _owner(guide)
    with _LOCK:
        try:
            by_guide = _CACHE.setdefault(model_owner, weakref.WeakKeyDictionary())
            by_method = by_guide.setdefault(guide_owner, {})
        except TypeError:
            return Knowledge()
        key = (getattr(model, "__func__", None), getattr(guide, "__func__", None))
        return by_method.setdefault(key, Knowledge())


def _owner(program: Any) -> Any:
    return program if isinstance(program, partial) else getattr(program, "__self__", program)


def argument_key(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """Return the kind of arguments: shapes and types of arrays, values of switches and sizes, types of all else."""
    leaves: Any = (*args, *kwargs.values())
    if any(isinstance(leaf, CONTAINERS) for leaf in leaves):
        leaves, spec = tree_flatten((args, dict(kwargs)))
        return (str(spec), *map(_leaf_key, leaves))
    return (len(args), *kwargs, *map(_leaf_key, leaves))


CONTAINERS = (list, tuple, dict)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if isinstance(leaf, np.ndarray):
        return leaf.shape, leaf.dtype.str
    return (type(leaf), leaf) if isinstance(leaf, (bool, int, str)) or leaf is None else type(leaf)
