"""Helpers of the tests of fault kinds: a right value, or a refusal that a user can act on."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_hvae

__all__ = ["close", "on_second_call", "refused", "right_or_refused"]

PACKAGE = Path(pyro_hvae.__file__).parent
ADVICE = re.compile(
    r"\b(use|write|take|give|pass|call|put|draw|mark|set|make|instead|must|should|needs?|wants?|swap(ped)?|leave|"
    r"observe|add|remove|move|mask|compare|only|train|choose|declare)\b"
)


def check_message(error: BaseException, names: tuple[str, ...]) -> None:
    """Assert that the package raised ``error`` itself, in a sentence with advice that names one of ``names``."""
    message = str(error)
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    assert PACKAGE in last.parents, f"{last} raised this, not the package: {type(error).__name__}: {message}"
    assert len(message.split()) >= 6, f"no sentence: {message}"
    assert ADVICE.search(message), f"no advice: {message}"
    if names:
        assert any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names), f"no {names}: {message}"


def close(value: Any, truth: Any, tolerance: float = 1e-8) -> None:
    """Assert that ``value`` has the shape of ``truth`` and differs by at most ``tolerance``."""
    value, truth = (torch.as_tensor(item).detach().double() for item in (value, truth))
    torch.testing.assert_close(value, truth, atol=tolerance, rtol=0.0)


def refused(call: Callable[[], Any], match: str, *names: str) -> None:
    """Assert that ``call`` raises a ValueError or TypeError of the package that matches and names a site or plate."""
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        call()
    check_message(caught.value, names)


def right_or_refused(call: Callable[[], Any], truth: Any, tolerance: float, *names: str) -> None:
    """Assert that ``call`` returns ``truth``, or refuses as :func:`refused` wants."""
    try:
        value = call()
    except (ValueError, TypeError) as error:
        check_message(error, names)
        return
    close(value, truth, tolerance)


def on_second_call(call: Callable[[], Tensor], change: Callable[[], Any]) -> Tensor:
    """Call once, change what the programs look like, and call again."""
    call()
    change()
    return call()
