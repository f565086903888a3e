"""Bring data to the programs: the split of held-out rows, and the device and dtype of the parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.arguments import check_number
from pyro_hvae.training.feed import Batch, Feed, TensorFeed, derived, feed

__all__ = ["Move", "held_out", "move_programs"]

SPLIT = 2**31
"""Takes the place of an epoch in the seed of a split."""


def held_out(whole: Feed, validation: Any, batch_size: int | None) -> tuple[Feed, Feed | None]:
    """Return training data and held-out data.

    Args:
        whole: the data.
        validation: held-out data, None, or the fraction of ``whole`` that is held out: rows at random, or the last rows
            where the data keep their order.

    Raises:
        ValueError: for a fraction outside of (0, 1), one that leaves either side without data, or a fraction of data
            that are no tensors in memory.
    """
    if validation is None:
        return whole, None
    if isinstance(validation, bool) or not isinstance(validation, (int, float)):
        return whole, feed(validation, batch_size=batch_size, shuffle=False)
    check_number("validation, a fraction of the data,", validation, 0.0, 1.0, ends="()")
    if not isinstance(whole, TensorFeed):
        raise ValueError(
            f"validation={validation} holds out rows of tensors and arrays; these data are an iterable: split them, "
            "and pass the held-out part as validation="
        )
    count = round(validation * whole.data_size)
    if not 0 < count < whole.data_size:
        raise ValueError(f"validation={validation} of {whole.data_size} data leaves {count} held out: pass another one")
    order = torch.arange(whole.data_size)
    if whole.shuffle:
        order = torch.randperm(whole.data_size, generator=derived(whole.seed, SPLIT))
    first, second = (rows.sort().values for rows in (order[:-count], order[-count:]))
    rest = TensorFeed(
        _rows(whole, first),
        batch_size=batch_size,
        shuffle=whole.shuffle,
        drop_last=whole.drop_last,
        seed=whole.seed,
    )
    return rest, TensorFeed(_rows(whole, second), batch_size=batch_size, shuffle=False)


def _rows(whole: TensorFeed, rows: Tensor) -> Batch:
    args = tuple(value.index_select(0, rows.to(value.device)) for value in whole.args)
    return args, {name: value.index_select(0, rows.to(value.device)) for name, value in whole.kwargs.items()}


def move_programs(device: torch.device | str | None, *programs: Any) -> None:
    """Move the programs that are modules.

    Raises:
        ValueError: for a device that torch does not know or does not have, or programs that are no modules.
    """
    if device is None:
        return
    modules = [program for program in programs if isinstance(program, nn.Module)]
    if not modules:
        raise ValueError(
            f"device={str(device)!r} moves programs that are modules, and neither is one: make their tensors there"
        )
    try:
        torch.empty(0, device=device)
        for module in modules:
            module.to(device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} can't be used: {str(error).splitlines()[0]}") from error


class Move:
    """Move each batch to the device of the parameters, and its floating-point tensors to their dtype.

    A copy to an accelerator starts from pinned memory, and nothing waits for it.  Where the dtypes differ, one warning
    is given.

    Args:
        transform: called with the moved batch.
        model, guide: programs; parameters of modules say where to.
    """

    def __init__(self, transform: Callable[[tuple, dict[str, Any]], Batch], model: Any, guide: Any) -> None:
        modules = [program for program in (model, guide) if isinstance(program, nn.Module)]
        own = [p for module in modules for p in module.parameters() if p.is_floating_point()]
        devices, dtypes = {p.device for p in own}, {p.dtype for p in own}
        self.device = devices.pop() if len(devices) == 1 else None
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.transform = transform
        self.moves = self._warned = False

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Batch:
        return self.transform(tuple(map(self._one, args)), {name: self._one(value) for name, value in kwargs.items()})

    def _one(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = self.dtype if value.is_floating_point() and self.dtype is not None else value.dtype
        device = value.device if self.device is None else self.device
        if value.dtype == dtype and value.device == device:
            return value
        if value.dtype != dtype and not self._warned:
            self._warned = True
            warnings.warn(
                f"the data are {value.dtype} and the parameters {dtype}: each batch is converted. Convert the data "
                f"once, as in x.to({dtype}), or the programs",
                UserWarning,
                stacklevel=4,
            )
        self.moves = True
        if value.device.type == "cpu" and device.type == "cuda":
            value = value.pin_memory()
        return value.to(device, dtype, non_blocking=True)
