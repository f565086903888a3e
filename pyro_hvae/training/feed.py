"""Batches for training, in an order that a resumed run can find again.

The order of an epoch is a function of (seed, epoch), not of the state of a generator: a run that resumes at epoch e,
batch b, or on another number of processes, sees what the run never interrupted would have seen.
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

__all__ = ["Batch", "Feed", "IterableFeed", "TensorFeed", "as_batch", "feed", "rows_of"]

Batch = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments of the programs."""


class Feed:
    """Where batches come from.

    Attributes:
        data_size: N, how many data there are; None if unknown.
        batches: how many batches an epoch has; None if unknown.
    """

    data_size: int | None = None
    batches: int | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""
        raise NotImplementedError

    def example(self) -> Batch:
        """A first batch to look at; nothing is used up, and no generator moves."""
        with torch.random.fork_rng():
            for batch in self.epoch(0):
                return batch
        raise ValueError("the data has no batch: there is nothing to train on")

    def shard(self, rank: int, world_size: int) -> Feed:
        """The part of each batch that process ``rank`` of ``world_size`` sees."""
        raise NotImplementedError

    def state_dict(self) -> Any:
        """What the source itself remembers, if anything; (epoch, batch) is all there is to know of the others."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Put the source back, so that the next ``epoch()`` goes on after the batch last handed out."""


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
            raise ValueError("the data have N as their leading dimension, and a tensor of it has no dimension at all")
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
        # All data at once stay in their order, which may mean something: a series in time.
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


class IterableFeed(Feed):
    """Any iterable of batches: :class:`pyro_hvae.data.Batches`, a ``DataLoader``.

    A source with ``state_dict`` and ``load_state_dict`` is saved and put back by these.  For others torch's generator
    is seeded by (seed, epoch) while the iterator is made and its first batch fetched, so that a shuffling
    ``DataLoader`` has the same order in a resumed run; batches already seen are skipped by fetching them.  An
    iterable with a hidden state of its own cannot be brought back.
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
        if self.once:  # put it back
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
                "the data is a one-shot iterator and is used up after one epoch; pass something that can be iterated "
                "again (a list, a DataLoader, an object with __iter__), or steps= small enough for one pass"
            )
        self.used = True
        if self.stateful:
            if self.positioned and start and self.batches is not None and start >= self.batches:
                return iter(())  # this epoch was over when it was saved; the source stands before the next
            skipped = 0 if self.positioned else start
            self.positioned = False
            batches = iter(self.source)
        else:
            skipped = start
            with torch.random.fork_rng():
                torch.manual_seed(derived(self.seed, epoch).initial_seed())
                batches = iter(self.source)
                first = list(itertools.islice(batches, 1))
            batches = itertools.chain(first, batches)
        for _ in itertools.islice(batches, skipped):  # now, not when the first batch is asked for
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
    """Batches of whatever ``data`` is.

    Args:
        data: a tensor, an array (memory-mapped or not), a tuple of them (the programs' positional arguments) or a
            mapping (their keyword arguments), all with N as leading dimension; a ``Dataset``; a ``DataLoader`` or
            any other iterable of batches, which keeps its own batch size.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(data, Feed):
        return data
    if hasattr(data, "to_numpy") and not isinstance(data, (Tensor, np.ndarray)):
        raise TypeError(
            f"data is a {type(data).__name__}, whose rows fit() does not read: pass torch.as_tensor(data.to_numpy()), "
            "or a mapping from names to tensors, for programs that take the columns as keywords"
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
        f"data must be a tensor, an array, a tuple or mapping of them, a Dataset, a DataLoader or an iterable of "
        f"batches, got {type(data).__name__}"
    )


def _check_finite(value: Tensor, mask: Any, rows: int = 4096) -> None:
    """Refuse NaN and infinities where a mask does not hide them; in pieces, so that a memory map is not copied."""
    if not value.is_floating_point():
        return
    hides = isinstance(mask, Tensor) and mask.dtype == torch.bool and value.shape[: mask.dim()] == mask.shape
    count, first = 0, None
    for start in range(0, len(value), rows):
        bad = ~torch.isfinite(value[start : start + rows])
        if hides:
            bad &= mask[start : start + rows].reshape(bad.shape[: mask.dim()] + (1,) * (bad.dim() - mask.dim()))
        here = int(bad.sum())
        if here and first is None:
            index = bad.nonzero()[0].tolist()
            first = (start + index[0], *index[1:])
        count += here
    if first is not None:
        raise ValueError(
            f"{count} of {value.numel()} values of the data are NaN or infinite; the first is {value[first].item()} at "
            f"index {first}: drop these data, or pass a mapping with a boolean mask= to programs that take one"
        )


def rows_of(args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """Rows of a batch: the leading size of its first tensor that has one; None if there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
            return len(value)
    return None


def derived(seed: int, epoch: int) -> torch.Generator:
    """A generator for one epoch, unlike those of other epochs and seeds."""
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def as_batch(item: Any) -> Batch:
    """One item of an iterable as arguments of the programs."""
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
    with warnings.catch_warnings():  # a memory map opened for reading; torch warns, and nothing here writes to it
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(value)
