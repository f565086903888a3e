"""Data that are no tensors, which a model reads itself: a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

__all__ = ["Reading", "read_arguments", "read_data"]


class Reading(Protocol):
    """What a model's ``read(data)`` returns for data that it can read.

    Attributes:
        x: the observed tensor, the programs' first argument.
        arguments: further keyword arguments of both programs.
        coords: labels by name of dim.
    """

    x: Tensor
    arguments: dict[str, Tensor]
    coords: dict[str, Any]

    def restore(self, site: str, values: np.ndarray, *, observed: bool = False) -> np.ndarray:
        """Return values of a site in the units of the data."""

    def replicates(self, values: Mapping[str, Tensor]) -> Any:
        """Return draws of the observed sites as frames."""


def read_arguments(
    model: Any, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any], Reading | None]:
    """Let the model read its first argument, if that is no tensor and the model reads data.

    Raises:
        TypeError: for a keyword that the data bring along.
    """
    name = "x" if not args else None
    first = kwargs.get("x") if not args else args[0]
    if first is None or isinstance(first, Tensor) or not hasattr(model, "read"):
        return args, dict(kwargs), None
    reading = model.read(first)
    if reading is None:
        return args, dict(kwargs), None
    twice = sorted(set(reading.arguments) & set(kwargs))
    if twice:
        raise TypeError(f"the table brings {twice} along: leave them out, and set entries to NaN instead")
    rest = {key: value for key, value in kwargs.items() if key != name}
    return (reading.x, *args[1:]), rest | reading.arguments, reading


def read_data(model: Any, data: Any) -> Any:
    """Return data of a training run as a mapping of tensors, if the model reads them; else unchanged."""
    if data is None or isinstance(data, Tensor) or not hasattr(model, "read"):
        return data
    reading = model.read(data)
    return data if reading is None else {"x": reading.x, **reading.arguments}
