"""What a program of a fault's kind may do: give the right value, or be refused in words of this package."""

import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["assert_refusal", "outcome", "right_or_refused"]

ADVICE = (
    r"\b(use|write|give|pass|set|take|make|put|add|draw|train|evaluate|count|wrap|call|move|name|say|choose|leave|"
    r"replace|declare|mark|try|instead)\b"
)


def assert_refusal(error: Exception, names: Sequence[str] = ()) -> None:
    """Assert that an error is a refusal of the package: raised by it, a sentence, with a name and advice.

    Args:
        error: what was raised.
        names: regular expressions of which one must be found in the message, such as a site's or a plate's name.
    """
    message = str(error)
    assert isinstance(error, ValueError | TypeError), f"{type(error).__name__}: {message}"
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename.replace("\\", "/")
    assert re.search(r"/pyro_hvae/(?!.*tests/)", raised_in), f"raised in {raised_in}: {message}"
    assert "Trace Shapes" not in message, f"a message of Pyro: {message}"
    assert not message.startswith("Error while computing"), f"a message of Pyro: {message}"
    assert len(message.split()) >= 6, f"not a sentence: {message}"
    assert not names or any(re.search(name, message) for name in names), f"none of {list(names)} in: {message}"
    assert re.search(ADVICE, message, re.IGNORECASE), f"no advice in: {message}"


def outcome(call: Callable[[], Any], names: Sequence[str] = ()) -> Any:
    """Return what ``call`` gives, or None where it was refused properly; any other error is the test's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except Exception as error:
            if not isinstance(error, ValueError | TypeError):
                raise
            assert_refusal(error, names)
            return None


def right_or_refused(call: Callable[[], Any], truth: Any, tolerance: Any, names: Sequence[str] = ()) -> None:
    """Assert that ``call`` gives the truth within a tolerance, or is refused by the package.

    Args:
        call: returns a number or tensor; called once.
        truth: what it should give.
        tolerance: largest absolute difference; of the same shape or one for all.
        names: as for :func:`assert_refusal`.
    """
    found = outcome(call, names)
    if found is None:
        return
    found, truth = torch.as_tensor(found).detach().double(), torch.as_tensor(truth).double()
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, right {tuple(truth.shape)}"
    equal = found == truth  # infinities too
    close = (found - truth).abs() <= torch.as_tensor(tolerance).double()
    assert (equal | close).all(), f"got {found.tolist()}, right {truth.tolist()}, tolerance {tolerance}"
