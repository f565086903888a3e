"""Batches for training, in an order that a resumed run repeats.

The order of an epoch is a function of (seed, epoch), not of the state of a generator: a run that resumes at epoch e,
batch b, or on another number of processes, gets the same batches as a run without interruption.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

__all__ = ["Batch", "Feed", "IterableFeed", "NoFeed", "TensorFeed", "as_batch", "feed", "mixed_seed", "rows_of"]

Batch = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments of the programs."""


class Feed:
    """Source of batches.

    Attributes:
        data_size: N, the number of data; None if unknown.
        batches: the number of batches of an epoch; None if unknown.
    """

    data_size: int | None = None
    batches: int | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number ``start`` on."""
        raise NotImplementedError

    def example(self) -> Batch:
        """Return a first batch, without consuming it or advancing a generator."""
        with torch.random.fork_rng():
            for batch in self.epoch(0):
                return batch
        raise ValueError(
            "the data has no batch: there is nothing to train on (programs that hold their data themselves, and are "
            "called without arguments, are trained on data=())"
        )

    def shard(self, rank: int, world_size: int) -> Feed:
        """Return the feed of process ``rank`` of ``world_size``: its part of each batch."""
        raise NotImplementedError

    def state_dict(self) -> Any:
        """Return the state of the source, if it has one; the state of others is (epoch, batch)."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Restore the source, so that the next ``epoch()`` continues after the last batch."""


class TensorFeed(Feed):
    """Tensors in memory (or memory-mapped), indexed by whole batches.

    Args:
        tensors: positional and keyword tensors, all with N as leading dimension.
        batch_size: rows a batch over all processes; None for all N.
        shuffle: a new order each epoch.
        drop_last: leave out a smaller last batch.
        seed: of the order.
    """

    def __init__(
        self,
        tensors: Batch,
        *,
        batch_size: int | None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        args, kwargs = tensors
        if any(value.ndim == 0 for value in (*args, *kwargs.values())):
            raise ValueError("the data have N as their leading dimension, and one of the tensors has no dimension")
        sizes = {len(value) for value in (*args, *kwargs.values())}
        if len(sizes) != 1:
            raise ValueError(f"the tensors of the data have different leading sizes: {sorted(sizes)}")
        self.data_size: int = sizes.pop()
        if self.data_size < 1:
            raise ValueError("the data is empty: there is nothing to train on")
        for value in (*args, *(value for name, value in kwargs.items() if name != "mask")):
            _check_finite(value, kwargs.get("mask"))
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.args, self.kwargs = args, kwargs
        self.batch_size = self.data_size if batch_size is None else min(batch_size, self.data_size)
        # All data at once keep their order: they may be a time series.
        self.shuffle, self.drop_last, self.seed = shuffle and batch_size is not None, drop_last, seed
        whole, rest = divmod(self.data_size, self.batch_size)
        self.batches: int = whole + (rest > 0 and not drop_last)
        self.rank, self.world_size = 0, 1

    def shard(self, rank: int, world_size: int) -> TensorFeed:
        smallest = self.data_size % self.batch_size if not self.drop_last else 0
        if (smallest or self.batch_size) % world_size or self.batch_size % world_size:
            raise ValueError(
                f"batches of {self.batch_size} (the last {smallest or self.batch_size}) of {self.data_size} data do "
                f"not divide among {world_size} processes, so their averaged gradients would not be the batch's: "
                "choose a batch_size that does, or drop_last=True"
            )
        part = TensorFeed(
            (self.args, self.kwargs),
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            seed=self.seed,
        )
        part.rank, part.world_size = rank, world_size
        return part

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = None
        if self.shuffle:
            order = torch.randperm(self.data_size, generator=derived(self.seed, epoch))
        whole = order is None and self.batch_size == self.data_size and self.world_size == 1
        for index in range(start, self.batches):
            if whole:
                yield self.args, self.kwargs
                continue
            low = index * self.batch_size
            high = min(low + self.batch_size, self.data_size)
            share = (high - low) // self.world_size
            low += self.rank * share
            high = low + share if self.world_size > 1 else high
            if order is None:
                yield tuple(value[low:high] for value in self.args), {k: v[low:high] for k, v in self.kwargs.items()}
            else:
                rows = order[low:high]
                yield (
                    tuple(value.index_select(0, rows.to(value.device)) for value in self.args),
                    {name: value.index_select(0, rows.to(value.device)) for name, value in self.kwargs.items()},
                )


class NoFeed(Feed):
    """No arguments at all, for programs that hold their data themselves; an epoch is one step, and all one datum."""

    data_size = 1
    batches = 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return iter([((), {})][start:])

    def shard(self, rank: int, world_size: int) -> Feed:
        raise ValueError(
            "programs that are called without data have none to share among processes: let them take the data as "
            "arguments, or train in one process"
        )


class IterableFeed(Feed):
    """Any iterable of batches: :class:`pyro_hvae.data.Batches`, a ``DataLoader``.

    A source with ``state_dict`` and ``load_state_dict`` is saved and restored by these.  For others torch's generator
    is seeded by (seed, epoch) while the iterator is made and its first batch fetched, so that a shuffling
    ``DataLoader`` has the same order in a resumed run; earlier batches are fetched and skipped.  The hidden state of
    other iterables is not restored.
    """

    def __init__(self, source: Iterable[Any], *, seed: int = 0) -> None:
        self.source: Any = source
        self.seed = seed
        self.stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self.once = iter(source) is source
        self.used = self.positioned = False
        try:
            self.batches = len(source)  # type: ignore[arg-type]
        except TypeError:
            self.batches = None
        self.data_size = getattr(source, "data_size", None)
        if self.data_size is None and hasattr(getattr(source, "dataset", None), "__len__"):
            self.data_size = len(source.dataset)  # type: ignore[attr-defined]
        self.rank, self.world_size = 0, 1

    def shard(self, rank: int, world_size: int) -> IterableFeed:
        part = IterableFeed(self.source, seed=self.seed)
        part.rank, part.world_size = rank, world_size
        return part

    def example(self) -> Batch:
        if self.once:  # and the item is put back in front
            for item in self.source:
                self.source = itertools.chain([item], self.source)
                return as_batch(item)
        state = self.state_dict()
        batch = super().example()
        self.used = False
        if state is not None:
            self.load_state_dict(state)
        return batch

    def state_dict(self) -> Any:
        return self.source.state_dict() if self.stateful else None

    def load_state_dict(self, state: Any) -> None:
        if state is not None and self.stateful:
            self.source.load_state_dict(state)
            self.positioned = True

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if self.once and self.used:
            raise ValueError(
                "the data is a one-shot iterator and is used up after one epoch; pass an object that can be iterated "
                "again (a list, a DataLoader, an object with __iter__), or steps= small enough for one pass"
            )
        self.used = True
        if self.stateful:
            if self.positioned and start and self.batches is not None and start >= self.batches:
                return iter(())  # the saved epoch was complete; the source is at the start of the next
            skipped = 0 if self.positioned else start
            self.positioned = False
            batches = iter(self.source)
        else:
            skipped = start
            with torch.random.fork_rng():
                torch.manual_seed(mixed_seed(self.seed, epoch))
                batches = iter(self.source)
                first = list(itertools.islice(batches, 1))
            batches = itertools.chain(first, batches)
        for _ in itertools.islice(batches, skipped):  # skip before the first batch is requested
            pass
        return (self._share(as_batch(item)) for item in batches)

    def _share(self, batch: Batch) -> Batch:
        if self.world_size == 1:
            return batch
        args, kwargs = batch
        size = len(next(iter((*args, *kwargs.values()))))
        if size % self.world_size:
            raise ValueError(f"a batch of {size} does not divide among {self.world_size} processes")
        share = size // self.world_size
        rows = slice(self.rank * share, (self.rank + 1) * share)
        return tuple(value[rows] for value in args), {name: value[rows] for name, value in kwargs.items()}


def feed(
    data: Any,
    *,
    batch_size: int | None,
    shuffle: bool = True,
    drop_last: bool = False,
    seed: int = 0,
) -> Feed:
    """Build a feed from data of any kind.

    Args:
        data: a tensor, an array (memory-mapped or not), a tuple of them (the programs' positional arguments) or a
            mapping (their keyword arguments), all with N as leading dimension; ``()`` for programs without arguments;
            a ``Dataset``; a ``DataLoader`` or any other iterable of batches, which keeps its own batch size.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(data, Feed):
        return data
    if isinstance(data, tuple) and not data:
        return NoFeed()
    if hasattr(data, "to_numpy") and not isinstance(data, (Tensor, np.ndarray)):
        raise TypeError(
            f"data is a {type(data).__name__}, whose rows fit() does not read: pass torch.as_tensor(data.to_numpy()), "
            "or a mapping from names to tensors, for programs that take the columns as keywords; "
            "models.table_vae makes a pair that reads DataFrames"
        )
    if isinstance(data, TensorDataset):
        data = tuple(data.tensors)
    tensors = _as_tensors(data)
    if tensors is not None:
        return TensorFeed(tensors, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed)
    if isinstance(data, Dataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        size = len(data) if batch_size is None else batch_size
        return IterableFeed(DataLoader(data, batch_size=size, shuffle=shuffle, drop_last=drop_last), seed=seed)
    if isinstance(data, Iterable):
        return IterableFeed(data, seed=seed)
    raise TypeError(
        "data must be a tensor, an array, a tuple or mapping of them, a Dataset, a DataLoader or an iterable of "
        f"batches, or () for programs without arguments, got {type(data).__name__}"
    )


def _check_finite(value: Tensor, mask: Any, rows: int = 4096) -> None:
    """Refuse NaN and infinities outside of a mask; in pieces, so that a memory map is not copied."""
    if not value.is_floating_point():
        return
    hides = isinstance(mask, Tensor) and mask.dtype == torch.bool and value.shape[: mask.dim()] == mask.shape
    count, first = 0, None
    for start in range(0, len(value), rows):
        bad = ~torch.isfinite(value[start : start + rows])
        if hides:
            bad &= mask[start : start + rows].reshape(bad.shape[: mask.dim()] + (1,) * (bad.dim() - mask.dim()))
        num_bad = int(bad.sum())
        if num_bad and first is None:
            index = bad.nonzero()[0].tolist()
            first = (start + index[0], *index[1:])
        count += num_bad
    if first is not None:
        raise ValueError(
            f"{count} of {value.numel()} values of the data are NaN or infinite; the first is {value[first].item()} at "
            f"index {first}: drop these data, or pass a mapping with a boolean mask= to programs that take one"
        )


def rows_of(args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """Return the rows of a batch: the leading size of its first tensor with a dim; None without one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
            return len(value)
    return None


def derived(seed: int, epoch: int) -> torch.Generator:
    """Return a generator for one epoch, seeded by ``(seed, epoch)``."""
    return torch.Generator().manual_seed(mixed_seed(seed, epoch))


def mixed_seed(*numbers: int) -> int:
    """Derive one seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def as_batch(item: Any) -> Batch:
    """Convert one item of an iterable to arguments of the programs."""
    if isinstance(item, Mapping):
        return (), {name: _as_tensor(value) for name, value in item.items()}
    if isinstance(item, (tuple, list)):
        return tuple(_as_tensor(value) for value in item), {}
    return (_as_tensor(item),), {}


def _as_tensors(data: Any) -> Batch | None:
    if isinstance(data, (Tensor, np.ndarray)):
        return (_as_tensor(data),), {}
    if isinstance(data, tuple) and data and all(isinstance(value, (Tensor, np.ndarray)) for value in data):
        return tuple(_as_tensor(value) for value in data), {}
    if isinstance(data, Mapping) and data and all(isinstance(value, (Tensor, np.ndarray)) for value in data.values()):
        return (), {name: _as_tensor(value) for name, value in data.items()}
    return None


def _as_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.flags.writeable:
        return torch.from_numpy(value)
    with warnings.catch_warnings():  # torch warns of a read-only memory map; it is only read
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(value)
