"""Public functions of a problem: called with programs and data, or with a bound problem in their place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from pyro_hvae.problem.isolation import evaluating
from pyro_hvae.problem.problem import Problem

__all__ = ["of_model", "of_pair", "problem_of"]

P = ParamSpec("P")
R = TypeVar("R")


def problem_of(model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any], **options: Any) -> Problem:
    """Return the problem that a public function was called with.

    Args:
        model: a Pyro program; or a bound problem, without other arguments.

    Raises:
        TypeError: for a bound problem together with a guide or data.
    """
    if not isinstance(model, Problem):
        return Problem(model, guide, args, kwargs, **options)
    if guide is not None or args or kwargs:
        raise TypeError(
            "a problem has its guide and its data bound already; call this with the problem alone, or with model, "
            "guide and data"
        )
    return model


def of_pair(function: Callable[Concatenate[Problem, P], R]) -> Callable[..., R]:
    """Give a function of a problem the signature ``(model, guide, *args, options, **kwargs)``.

    Keywords that the function names are its own; all others go to the programs.
    """
    options = _options(function)

    @functools.wraps(function)
    def verb(model: Any, guide: Any = None, *args: Any, **kwargs: Any) -> R:
        own = {name: kwargs.pop(name) for name in options & kwargs.keys()}
        with evaluating():
            problem = problem_of(model, guide, args, kwargs)
            problem.settle()
            return function(problem, **own)  # type: ignore[call-arg]

    verb.__signature__ = _signature(function, ("model", "guide"))  # type: ignore[attr-defined]
    return verb


def of_model(function: Callable[Concatenate[Problem, P], R]) -> Callable[..., R]:
    """Give a function of a problem without a guide the signature ``(model, *args, options, **kwargs)``."""
    options = _options(function)

    @functools.wraps(function)
    def verb(model: Any, *args: Any, **kwargs: Any) -> R:
        own = {name: kwargs.pop(name) for name in options & kwargs.keys()}
        with evaluating():
            return function(problem_of(model, None, args, kwargs), **own)  # type: ignore[call-arg]

    verb.__signature__ = _signature(function, ("model",))  # type: ignore[attr-defined]
    return verb


def _options(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def _signature(function: Callable[..., Any], programs: tuple[str, ...]) -> inspect.Signature:
    kinds = inspect.Parameter
    own = inspect.signature(function)
    options = [p for p in own.parameters.values() if p.kind is kinds.KEYWORD_ONLY]
    front = [kinds(name, kinds.POSITIONAL_OR_KEYWORD, annotation="Program") for name in programs]
    return own.replace(
        parameters=[
            *front,
            kinds("args", kinds.VAR_POSITIONAL, annotation="Any"),
            *options,
            kinds("kwargs", kinds.VAR_KEYWORD, annotation="Any"),
        ]
    )
