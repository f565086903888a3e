"""Attributes that are computed once an object, and stores that forget their oldest entries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

__all__ = ["Bounded", "cached"]

T = TypeVar("T")
MOST = 64


class cached(Generic[T]):
    """Compute an attribute at its first reading.

    Python 3.11's ``functools.cached_property`` holds one lock for all objects of a class while it computes.  Where the
    computation waits for another lock, as programs do for that of Pyro's global state, two threads then wait for each
    other.  Here two threads may compute the same attribute, and the first result stays.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> cached[T] | T:
        if instance is None:
            return self
        return vars(instance).setdefault(self.name, self.function(instance))


class Bounded(OrderedDict[Any, Any]):
    """A dictionary that forgets its oldest entries above ``MOST`` of them."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > MOST:
            self.popitem(last=False)
