"""Checks of single arguments, used by every public function: counts, numbers, switches and choices."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ContextError",
    "check_choice",
    "check_context",
    "check_count",
    "check_number",
    "check_switch",
    "sequence_of",
]


class ContextError(ValueError):
    """Error for a context that is missing, of another width, or not wanted.

    Pyro appends the shapes of all sites to the message of an error inside of a trace; they are dropped here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.split("\n", 1)[0])


def check_context(name: str, context: Any, width: int) -> None:
    """Refuse no context where there has to be one, another width than ``width``, and any context where it is 0.

    Args:
        name: of the program or network.
        context: covariates (..., c), class labels (...) of an integer dtype, or None.
        width: c, or the number of classes.

    Raises:
        ContextError: saying what to pass.

    Example:
        >>> check_context("'model'", None, 3)
        Traceback (most recent call last):
        pyro_hvae.arguments.ContextError: 'model' was built for a context of width 3, and got none: pass context=, a tensor (N, 3) with one row for each datum.
    """  # noqa: E501
    if not width:
        if context is not None:
            raise ContextError(f"{name} takes no context, and got one: build it for one, or leave context= out.")
    elif context is None:
        raise ContextError(
            f"{name} was built for a context of width {width}, and got none: pass context=, a tensor (N, {width}) with "
            "one row for each datum."
        )
    elif context.is_floating_point() and context.shape[-1:] != (width,):
        raise ContextError(
            f"{name} was built for a context of width {width}, and got one of shape {tuple(context.shape)}: pass "
            f"context=, a tensor (N, {width}) with one row for each datum."
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no integer of at least ``least``; integers of numpy are accepted, True and False are not.

    Raises:
        ValueError: naming the argument and its value.

    Example:
        >>> check_count("num_draws", 2.5)
        Traceback (most recent call last):
        ValueError: num_draws must be an integer, got 2.5
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {_shown(value)}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, ends: str = "[]"
) -> None:
    """Refuse what is no finite number between two ends.

    Args:
        name, value: of the argument.
        low, high: the ends.
        ends: whether each belongs to the interval: ``"[]"``, ``"()"``, ``"[)"`` or ``"(]"``.

    Raises:
        ValueError: naming the argument, its value and the interval.

    Example:
        >>> check_number("rate", 0.0, 0.0, ends="()")
        Traceback (most recent call last):
        ValueError: rate must be a number above 0, got 0.0
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {_shown(value)}")
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must be a number {_interval(low, high, ends)}, got {value}")


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: naming the argument and its value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {_shown(value)}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is none of some words, and suggest the nearest.

    Raises:
        ValueError: naming the argument, its value and the choices.
    """
    known = list(choices)
    if isinstance(value, str) and value in known:
        return
    close = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    words = " or ".join(map(repr, known)) if len(known) < 3 else f"one of {', '.join(map(repr, known))}"
    raise ValueError(f"{name} must be {words}, got {_shown(value)}{hint}")


def sequence_of(name: str, value: Any) -> list[Any]:
    """Return the entries of a sequence of numbers.

    Raises:
        ValueError: for a string, or what is no sequence.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a sequence of integers, got {value!r}.")
    return list(value)


def _interval(low: float, high: float, ends: str) -> str:
    if high == math.inf:
        return f"of at least {low:g}" if ends[0] == "[" else f"above {low:g}"
    if low == -math.inf:
        return f"of at most {high:g}" if ends[1] == "]" else f"below {high:g}"
    return f"in {ends[0]}{low:g}, {high:g}{ends[1]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}..."
