"""Batches by index over whole tensors in memory.

Collating single images costs more than a training step of a small model. Batches are therefore indexed from whole
tensors, one ``index_select`` per tensor and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count, check_switch
from pyro_hvae.data.images import check_finite

__all__ = ["Batches"]


class Batches:
    """Batches over whole tensors in memory, by index.

    An item is the argument of the programs: a tensor, a tuple of several, or a dict of named ones. An epoch in progress
    can be saved and continued: :meth:`state_dict` holds the state of the generator and the position.

    Args:
        *tensors: each (N, ...); all have the same N.
        batch_size: data in one batch, >= 1.
        shuffle: a new order each epoch, from ``seed``.
        drop_last: leave out a smaller last batch.
        seed: of the order.
        device: all tensors are moved there once.
        transform: called on each batch's first tensor (``x`` of those named, if there is one), e.g. :func:`binarize`.
        **named: tensors by name, e.g. ``x=``, ``context=``, ``mask=``.

    Attributes:
        data_size: N.
        epoch: number of epochs completed.

    Raises:
        ValueError: for no tensors, tensors by position and by name at once, several N, none at all, NaN or
            infinities (where ``mask`` is not False) or ``batch_size < 1``.

    Example:
        >>> batches = Batches(torch.arange(5.0), torch.arange(5) * 10, batch_size=2, shuffle=False)
        >>> [(x.tolist(), label.tolist()) for x, label in batches]
        [([0.0, 1.0], [0, 10]), ([2.0, 3.0], [20, 30]), ([4.0], [40])]
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        **named: Tensor,
    ) -> None:
        if bool(tensors) == bool(named):
            raise ValueError("give tensors either by position or by name, at least one.")
        values = named or {f"tensor {number}": value for number, value in enumerate(tensors)}
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        sizes = {name: len(value) if value.dim() else 0 for name, value in values.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"all tensors must have the same number of data; they have {sizes}.")
        self.data_size = next(iter(sizes.values()))
        if not self.data_size:
            raise ValueError("there are no data: N = 0.")
        check_count("batch_size", batch_size)
        check_count("seed", seed, 0)
        check_switch("shuffle", shuffle)
        check_switch("drop_last", drop_last)
        if drop_last and batch_size > self.data_size:
            raise ValueError(f"drop_last leaves no batch: batch_size is {batch_size}, N is {self.data_size}.")
        for name, value in values.items():
            mask = named.get("mask") if name == "x" else None
            check_finite(value, name, mask if mask is not None and mask.shape == value.shape else None)
        self._values = {name: value.to(device) for name, value in values.items()}
        self._named = bool(named)
        self._transformed = "x" if "x" in self._values else next(iter(self._values))
        self.batch_size, self.shuffle, self.drop_last, self.transform = batch_size, shuffle, drop_last, transform
        self._generator = torch.Generator().manual_seed(seed)
        self._start_of_epoch = self._generator.get_state()
        self._position, self._resume = 0, False
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.data_size, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def dataset(self) -> Tensor:
        """The first tensor, under the name that a ``DataLoader`` has for its data; its length is N."""
        return self._values[self._transformed]

    def __iter__(self) -> Iterator[Any]:
        """Yield one epoch; after :meth:`load_state_dict` the rest of the saved epoch."""
        if self._resume:
            self._generator.set_state(self._start_of_epoch)
        else:
            self._start_of_epoch, self._position = self._generator.get_state(), 0
        self._resume = False
        order = torch.randperm(self.data_size, generator=self._generator) if self.shuffle else None
        for position in range(self._position, len(self)):
            start = position * self.batch_size
            stop = min(start + self.batch_size, self.data_size)
            batch = {
                name: value[start:stop] if order is None else value.index_select(0, order[start:stop].to(value.device))
                for name, value in self._values.items()
            }
            if self.transform is not None:
                batch[self._transformed] = self.transform(batch[self._transformed])
            self._position = position + 1
            if self._position == len(self):
                self.epoch += 1
            if self._named:
                yield batch
            else:
                yield tuple(batch.values()) if len(batch) > 1 else batch[self._transformed]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the order after the last batch."""
        done = self._position == len(self)
        return {
            "generator": self._generator.get_state() if done else self._start_of_epoch.clone(),
            "position": 0 if done else self._position,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; the next iteration yields the rest of its epoch.

        Raises:
            ValueError: for a position beyond the number of batches.
        """
        if not 0 <= state["position"] < len(self):
            raise ValueError(
                f"the state is at batch {state['position']}, but an epoch has {len(self)}: it was saved with "
                "other data or another batch_size."
            )
        self._start_of_epoch, self._position = state["generator"], state["position"]
        self.epoch, self._resume = state["epoch"], True
