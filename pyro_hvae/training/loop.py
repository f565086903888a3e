r"""Training as a person would do it every day: one loop, kept by a :class:`Run`.

The optimiser minimises the bound's loss divided by the number of data (see :mod:`pyro_hvae.training.objective`),
one fused optimiser over every parameter of model and guide.  Looking (terms, validation) leaves the generators as
they were, so what is logged, and how often, has no influence on what is learned.
"""

from __future__ import annotations

import copy
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_hvae.training import checkpoint
from pyro_hvae.training.averages import Averages
from pyro_hvae.training.evaluate import looking, per_datum_loss, validation_record
from pyro_hvae.training.feed import Batch, Feed
from pyro_hvae.training.history import History
from pyro_hvae.training.nonfinite import NonFiniteError, Snapshot, optimizer_tensors, replay
from pyro_hvae.training.objective import PairObjective
from pyro_hvae.training.step import EagerStep

__all__ = ["Run"]

Transform = Callable[[tuple, dict[str, Any]], Batch]


class Run:
    """A training run: what callbacks see, and what is saved.

    Attributes:
        model, guide: the programs.
        objective: the loss in nats a datum, as a module.
        eager: the step without a compiler, which the search for NaN uses.
        optimizer, schedule, averages: torch's optimiser, its schedule and the moving averages, or None.
        step, epoch, batch: optimiser steps made, epochs finished, batches of the present epoch used.
        history: the records.
        run_dir: where the run is kept, or None.
        stopped: why it ended before its time, or None.
    """

    def __init__(
        self,
        objective: PairObjective,
        step: Callable[[Sequence[Batch]], Tensor],
        eager: EagerStep,
        feed: Feed,
        transform: Transform,
        *,
        seed: int,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        averages: Averages | None,
        accumulate: int,
        validation: Feed | None,
        validate_every: int | None,
        history: History,
        run_dir: Path | None,
        checkpoint_every: int | None,
        keep: int,
        log_every: int,
        terms_every: int,
        check_every: int | None,
        callbacks: Sequence[Any],
        ranks: Any,
    ) -> None:
        self.objective, self.optimizer, self.schedule, self.averages = objective, optimizer, schedule, averages
        self.model, self.guide = objective.model, objective.guide
        self.feed, self.transform, self.accumulate, self.seed = feed, transform, accumulate, seed
        self.validation, self.validate_every = validation, validate_every
        self.history, self.run_dir, self.checkpoint_every, self.keep = history, run_dir, checkpoint_every, keep
        self.log_every, self.terms_every, self.check_every = log_every, terms_every, check_every
        self.callbacks, self.ranks = callbacks, ranks
        self.step = self.epoch = self.batch = 0
        self.stopped: str | None = None
        self.best = math.inf
        self._take_step, self.eager = step, eager
        device = eager.parameters[0].device
        self._sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._last: Batch | None = None
        self._pending: Any = None
        self._limits: tuple[int | None, int | None] = (None, None)
        self._since_record = self._terms_due = 0
        self._signal: int | None = None
        self._saved = -1
        self._snapshot = Snapshot()
        self._clock = time.perf_counter()
        self._on_step = [callback.on_step for callback in callbacks if hasattr(callback, "on_step")]

    @property
    def rate(self) -> float:
        """The present learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def stop(self, reason: str) -> None:
        """End the run after this step."""
        self.stopped = reason

    # -- the loop

    def train(self, steps: int | None, epochs: int | None) -> None:
        """Train until ``steps`` or ``epochs`` in all are done, :meth:`stop` is called, or a signal arrives."""
        self._limits = steps, epochs
        self._call("on_start")
        try:
            with self._signals():
                if self._pending is not None:
                    checkpoint.restore_generators(self._pending)
                self._look()
                while not self._done(steps, epochs):
                    self._epoch(steps)
                self._check()
                if self._since_record and self._signal is None:
                    self._record(final=True)
                    self._saved = -1  # a checkpoint of this very step does not know of the record
                if self.run_dir is not None and self._saved != self.step:
                    self.save()
        except BaseException:
            with suppress(Exception):  # what went wrong first is what to tell
                self._call("on_end")
            raise
        self._call("on_end")
        if self._signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)

    def _done(self, steps: int | None, epochs: int | None) -> bool:
        over = (steps is not None and self.step >= steps) or (epochs is not None and self.epoch >= epochs)
        return over or self.stopped is not None

    def _save_due(self) -> bool:
        every = self.checkpoint_every if self.run_dir is not None else None
        return every is not None and self.step % every == 0

    def _last_step(self) -> bool:
        steps, epochs = self._limits
        in_last_epoch = epochs is not None and self.epoch + 1 >= epochs
        return self.step == steps or (in_last_epoch and self.batch == self.feed.batches)

    def _epoch(self, steps: int | None) -> None:
        batches = self.feed.epoch(self.epoch, self.batch)
        if self._pending is not None:  # skipping batches may have drawn from the generators
            checkpoint.restore_generators(self._pending)
            self._pending = None
        seen = self.batch
        while group := list(itertools.islice(batches, self.accumulate)):
            self._one(group)
            seen += len(group)
            if (steps is not None and self.step >= steps) or self.stopped is not None:
                return
        if not seen:
            raise ValueError("the data has no batch: an epoch of it is empty")
        self.epoch, self.batch = self.epoch + 1, 0
        if self.validation is not None and self.validate_every is None:
            self._validate()
        self._call("on_epoch")
        # Unless asked otherwise, save at the end of an epoch, though not after each of many short ones.
        if self.run_dir is not None and self.checkpoint_every is None and self.step - self._saved >= 1000:
            self.save()

    def _one(self, group: list[Batch]) -> None:
        self.objective.step = self.step
        loss = self._take_step([self.transform(*batch) for batch in group])
        self._sum += loss
        self.step += 1
        self.batch += len(group)
        self._since_record += 1
        if self.averages is not None:
            self.averages.update()
        if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        for on_step in self._on_step:
            on_step(self, loss)
        if self.check_every is not None and self.step % self.check_every == 0:
            self._look()
        if self.step % self.log_every == 0:
            self._record(batch=group[-1])
        if self.validate_every is not None and self.validation is not None and self.step % self.validate_every == 0:
            self._validate()
        if self._signal is not None:
            self.stop(signal.Signals(self._signal).name)
        elif self._save_due() and not self._last_step():  # which is saved with the last record
            self.save()
        self._last = group[-1]

    # -- looking

    def _record(self, batch: Batch | None = None, final: bool = False) -> None:
        self._check()
        now = time.perf_counter()
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.ranks.mean(float(self._sum) / self._since_record),
            "rate": self.rate,
            "seconds": now - self._clock,
        }
        batch = self._last if batch is None else batch
        if batch is not None and (final or self.step >= self._terms_due):
            self._terms_due = self.step + self.terms_every
            with looking(self.objective):
                args, kwargs = self.transform(*batch)
                record.update({name: float(value) for name, value in self.objective.terms(args, kwargs).items()})
                if not getattr(self.objective.bound, "is_bound", True):
                    record["bound"] = -float(per_datum_loss(self.objective, args, kwargs, self.feed.data_size))
        self._sum.zero_()
        self._since_record = 0
        self._clock = time.perf_counter()
        self._add(record)

    def _validate(self) -> None:
        assert self.validation is not None
        with nullcontext() if self.averages is None else self.averages.applied():
            record = validation_record(self.objective, self.validation, self.transform)
        record = {"step": self.step, "epoch": self.epoch} | {k: self.ranks.mean(v) for k, v in record.items()}
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(record["validation_loss"])
        improved = record["validation_loss"] < self.best
        self.best = min(self.best, record["validation_loss"])
        self._add(record)
        if improved and self.run_dir is not None:
            self.save("best")

    def _add(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        self._call("on_record", record)

    def _call(self, moment: str, *args: Any) -> None:
        for callback in self.callbacks:
            if hasattr(callback, moment):
                getattr(callback, moment)(self, *args)

    # -- going wrong

    def _look(self) -> None:
        """Check what was done, and keep a copy of it."""
        if self.check_every is None:
            return
        self._check()
        tensors = [*self.objective.parameters(), *self.objective.buffers(), self._sum]
        tensors += optimizer_tensors(self.optimizer)
        if self.averages is not None:
            tensors += self.averages.parameters.values()
        self._snapshot.take(tensors, self._position())

    def _position(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "since": self._since_record,
            "feed": self.feed.state_dict(),
            "generators": checkpoint.generators(),
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "schedule": None if self.schedule is None else copy.deepcopy(self.schedule.state_dict()),
        }

    def _check(self) -> None:
        if self.check_every is None or not self.ranks.any(not math.isfinite(float(self._sum))):
            return
        bad_step, self.stopped = self.step, "loss is not finite"
        last = self._snapshot.restore()
        self.go_to(last)
        kept = "" if self.run_dir is None else f"; the last checkpoint is {checkpoint.latest(self._directory)}"
        step, found = replay(self, last["generators"], bad_step)
        self._snapshot.restore()
        self.go_to(last)
        checkpoint.restore_generators(last["generators"])
        if not found:
            raise NonFiniteError(
                f"the loss became NaN or infinite between steps {last['step'] + 1} and {bad_step}, but not when these "
                f"steps were made again eagerly; the parameters are back at step {last['step']}{kept}", None, []
            )  # fmt: skip
        raise NonFiniteError(
            f"step {step}: not finite: {'; '.join(found[:6])}. The parameters are back at step {last['step']}, the "
            f"last that was looked at and found good{kept}", step, found,
        )  # fmt: skip

    def go_to(self, position: dict[str, Any]) -> None:
        """Put counts, data, rates and schedule back to where a snapshot was taken."""
        self.step, self.epoch, self.batch = position["step"], position["epoch"], position["batch"]
        self._since_record = position["since"]
        self.feed.load_state_dict(position["feed"])
        for group, rate in zip(self.optimizer.param_groups, position["rates"], strict=True):
            group["lr"] = rate
        if self.schedule is not None:
            self.schedule.load_state_dict(position["schedule"])

    # -- saving

    @property
    def _directory(self) -> Path:
        assert self.run_dir is not None
        return self.run_dir / "checkpoints"

    def save(self, name: str | None = None) -> None:
        """Write a checkpoint; only rank 0 writes."""
        self._check()
        state = self._state()
        if self.ranks.first:
            numbered = name is None
            checkpoint.save(
                self._directory,
                f"step-{self.step:08d}" if name is None else name,
                self.objective.state_dict(),
                state,
                keep=self.keep if numbered else None,
            )
        if name is None:
            self._saved = self.step

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seed": self.seed,
            "sum": self._sum,
            "since": self._since_record,
            "feed": self.feed.state_dict(),
            "terms_due": self._terms_due,
            "records": len(self.history),
            "best": self.best,
            "stopped": None if self._signal is not None else self.stopped,
            "products": getattr(self._take_step, "state_dict", lambda: None)(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "ema": None if self.averages is None else self.averages.state_dict(),
            "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in self.callbacks],
            "generators": self.ranks.gather_generators(checkpoint.generators()),
        }

    def restore(self, source: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: if it is damaged or does not fit; nothing is changed then.
        """
        weights, state = checkpoint.read_weights(source), checkpoint.read_state(source)
        try:
            probe = copy.deepcopy(self.optimizer.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, TypeError) as error:
            raise checkpoint.CheckpointError(f"{source}: its optimiser does not fit this run's ({error})") from error
        try:
            checkpoint.restore_weights(self.objective, weights, source)
        except checkpoint.CheckpointError:
            self.optimizer.load_state_dict(probe)
            raise
        for what, own in (("schedule", self.schedule), ("ema", self.averages)):
            if (own is None) != (state[what] is None):
                raise checkpoint.CheckpointError(
                    f"{source} was written {'with' if own is None else 'without'} {what}=, this run is not: resume "
                    "with the arguments that it was started with"
                )
            if own is not None:
                own.load_state_dict(state[what])
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self._since_record, self._terms_due = state["since"], state["terms_due"]
        self.feed.load_state_dict(state["feed"])
        self._sum.copy_(state["sum"])
        if state.get("products") and hasattr(self._take_step, "load_state_dict"):
            self._take_step.load_state_dict(state["products"])
        self.best, self.stopped, self._saved = state["best"], state["stopped"], state["step"]
        for callback, kept in zip(self.callbacks, state["callbacks"], strict=False):
            if kept is not None:
                callback.load_state_dict(kept)
        self.history.truncate(state["records"])
        self._pending = self.ranks.own_generators(state["generators"], self.seed, self.step)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM finish the step; a second acts as it always does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: Any) -> None:
            self._signal = number
            signal.signal(number, before[number])

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
