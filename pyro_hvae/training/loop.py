r"""Training loop.

The optimiser minimises the objective's loss divided by the number of data (see :mod:`pyro_hvae.training.objective`),
one fused optimiser over every parameter of model and guide.  Terms and validation restore the generators,
so logging does not change the training.

Programs, parameters and buffers are in use under :data:`pyro_hvae.problem.isolation.RUNNING`, so that other threads may
evaluate the same programs during training.
"""

from __future__ import annotations

import copy
import itertools
import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_hvae.bounds import Regularised
from pyro_hvae.problem.isolation import RUNNING
from pyro_hvae.training import checkpoint
from pyro_hvae.training.distributed import Ranks
from pyro_hvae.training.evaluate import evaluate_batch, evaluating, validation_record
from pyro_hvae.training.feed import Batch, rows_of
from pyro_hvae.training.nonfinite import NonFiniteError, Snapshot, optimizer_tensors, replay
from pyro_hvae.training.objective import PairObjective
from pyro_hvae.training.plan import Data, Records, Steps
from pyro_hvae.training.rescue import rescued
from pyro_hvae.training.resume import restore_run, state_of
from pyro_hvae.training.signals import Signals

__all__ = ["Run"]


class Run:
    """A training run; callbacks get it, and checkpoints save its state.

    Attributes:
        model, guide: the programs.
        objective: the loss in nats a datum, as a module.
        eager: the step without compilation, for the search for NaN.
        optimizer, schedule, averages: torch's optimiser, its schedule and the moving averages, or None.
        step, epoch, batch: optimiser steps made, epochs finished, batches of the present epoch used.
        history: the records.
        run_dir: folder of the run, or None.
        stopped: the reason of an early end, or None.
        interrupted: the signal that ended the run, on all processes, or None.
    """

    def __init__(
        self,
        objective: PairObjective,
        data: Data,
        steps: Steps,
        records: Records,
        callbacks: Sequence[Any],
        ranks: Ranks,
    ) -> None:
        self.objective, self.model, self.guide = objective, objective.model, objective.guide
        self.optimizer, self.schedule, self.averages = steps.optimizer, steps.schedule, steps.averages
        self.feed, self.transform, self.accumulate, self.seed = data.feed, data.transform, data.accumulate, data.seed
        self.validation, self.validate_every = data.validation, data.validate_every
        self.history, self.run_dir, self.number = records.history, records.run_dir, records.number
        self.checkpoint_every, self.keep = records.checkpoint_every, records.keep
        self.log_every, self.terms_every, self.check_every = records.log_every, records.terms_every, steps.check_every
        self.callbacks, self.ranks = callbacks, ranks
        self.step = self.epoch = self.batch = 0
        self.stopped: str | None = None
        self.best = math.inf
        self.keeps_best = False
        self._best_weights: dict[str, Tensor] | None = None
        self._take_step, self.eager = steps.take, steps.eager
        device = self.eager.parameters[0].device
        self.sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._last: Batch | None = None
        self.pending: Any = None
        self._limits: tuple[int | None, int | None] = (None, None)
        self.since_record = self.rows = self.terms_due = 0
        self.signals = Signals()
        self.interrupted: int | None = None
        self._validated = False
        self.saved = -1
        self._snapshot = Snapshot()
        self._clock = time.perf_counter()
        self._on_step = [callback.on_step for callback in callbacks if hasattr(callback, "on_step")]

    @property
    def rate(self) -> float:
        """The present learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def total(self) -> int | None:
        """Steps of the whole run, or None where the number of batches is unknown."""
        steps, epochs = self._limits
        if epochs is None or self.feed.batches is None:
            return steps
        return epochs * -(-self.feed.batches // self.accumulate)

    def stop(self, reason: str) -> None:
        """Stop the run after this step."""
        self.stopped = reason

    # -- the loop

    def train(self, steps: int | None, epochs: int | None) -> None:
        """Train until ``steps`` or ``epochs`` in all are done, :meth:`stop` is called, or a signal arrives."""
        self._limits = steps, epochs
        self._call("on_start")
        try:
            with self.signals, rescued(self):
                if self.pending is not None:
                    checkpoint.restore_generators(self.pending)
                self._take_snapshot()
                while not self._done(steps, epochs):
                    self._epoch(steps)
                self._check()
                if self.since_record and self.interrupted is None:
                    self._record(final=True)
                    self.saved = -1  # a checkpoint of this step lacks the record
                if self.validation is not None and math.isinf(self.best) and self.interrupted is None:
                    self._validate()
                    self.saved = -1
                if self.run_dir is not None and self.saved != self.step:
                    self.save()
        except BaseException:
            with suppress(Exception):  # the first error is raised
                self._call("on_end")
            raise
        self._call("on_end")
        if signal.SIGTERM in (self.signals.received, self.interrupted):
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
        if self.pending is not None:  # skipping batches may have drawn from the generators
            checkpoint.restore_generators(self.pending)
            self.pending = None
        used = self.batch
        while True:
            self.interrupted = self.ranks.interrupted(self.signals.received)
            if self.interrupted is not None:
                return self.stop(signal.Signals(self.interrupted).name)
            group = list(itertools.islice(batches, self.accumulate))
            if not group:
                break
            self._one(group)
            used += len(group)
            if (steps is not None and self.step >= steps) or self.stopped is not None:
                return
        if not used:
            raise ValueError("the data has no batch: an epoch of it is empty")
        self.epoch, self.batch = self.epoch + 1, 0
        if self.validation is not None and self.validate_every is None:
            self._validate()
        self._call("on_epoch")
        # By default, save at the end of an epoch, after 1000 steps at least.
        if self.run_dir is not None and self.checkpoint_every is None and self.step - self.saved >= 1000:
            self.save()

    def _one(self, group: list[Batch]) -> None:
        batches = [self.transform(*batch) for batch in group]
        rows = sum(rows_of(*batch) or 1 for batch in batches)
        loss = self._take_step(batches)
        self.sum.add_(loss, alpha=rows)
        self.step += 1
        self.batch += len(group)
        self.since_record += 1
        self.rows += rows
        with RUNNING:
            self.objective.advance()
            if self.averages is not None:
                self.averages.update()
        if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        for on_step in self._on_step:
            on_step(self, loss)
        if self.check_every is not None and self.step % self.check_every == 0:
            self._take_snapshot()
        if self.step % self.log_every == 0:
            self._record(batch=group[-1])
        if self.validate_every is not None and self.validation is not None and self.step % self.validate_every == 0:
            self._validate()
        if self._save_due() and not self._last_step():  # the last step is saved with the last record
            self.save()
        self._last = group[-1]

    # -- records

    def _record(self, batch: Batch | None = None, final: bool = False) -> None:
        self._check()
        now = time.perf_counter()
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.ranks.mean(float(self.sum) / self.rows),
            "rate": self.rate,
            "seconds": now - self._clock,
        }
        if isinstance(self.objective.bound, Regularised):
            record["divergence_weight"] = self.objective.bound.weights_at(int(self.objective.bound.step))[0]
        batch = self._last if batch is None else batch
        if batch is not None and (final or self.step >= self.terms_due):
            self.terms_due = self.step + self.terms_every
            record.update(self._terms(batch))
        self.sum.zero_()
        self.since_record = self.rows = 0
        self._clock = time.perf_counter()
        self._add(record)

    def _terms(self, batch: Batch) -> dict[str, float]:
        """Return the terms on a batch, and the unweighted bound if the objective is no bound."""
        bound = self.objective.bound
        if not hasattr(bound, "evaluate"):
            return {}
        with evaluating(self.objective):
            loss, terms = evaluate_batch(self.objective, *self.transform(*batch))
            values = {name: float(value) for name, value in terms.items()}
        if not (bound.is_bound or bound.from_above):
            values["bound"] = -float(loss)
        return values

    def _validate(self) -> None:
        assert self.validation is not None
        with RUNNING, nullcontext() if self.averages is None else self.averages.applied():
            record = validation_record(self.objective, self.validation, self.transform, check=not self._validated)
        self._validated = True
        record = {"step": self.step, "epoch": self.epoch} | {k: self.ranks.mean(v) for k, v in record.items()}
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(record["validation_loss"])
        improved = record["validation_loss"] < self.best
        if improved and self.keeps_best:
            self._keep_best()
        self.best = min(self.best, record["validation_loss"])
        self._add(record)
        if improved and self.run_dir is not None:
            self.save("best")

    def _keep_best(self) -> None:
        """Copy the weights that were validated: the averages, if there are any."""
        with RUNNING, nullcontext() if self.averages is None else self.averages.applied():
            self._best_weights = {name: value.clone() for name, value in self.objective.state_dict().items()}

    def restore_best(self) -> None:
        """Give the programs the weights of the best validation, of an earlier part of a resumed run too."""
        weights = self._best_weights
        if weights is None and self.run_dir is not None and (self._directory / "best").is_dir():
            best = self._directory / "best"
            checkpoint.verify(best, self.number)
            weights = checkpoint.read_weights(best)
            if self.averages is not None:
                weights |= checkpoint.read_state(best)["ema"]["parameters"]
        if weights is not None:
            own = {name: value for name, value in weights.items() if not name.startswith("bound.")}
            with RUNNING:
                checkpoint.restore_weights(self.objective, {**self.objective.state_dict(), **own}, Path("best"))

    def _add(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        self._call("on_record", record)

    def _call(self, moment: str, *args: Any) -> None:
        for callback in self.callbacks:
            if hasattr(callback, moment):
                getattr(callback, moment)(self, *args)

    # -- NaN and infinities

    def _take_snapshot(self) -> None:
        """Check the losses, and copy the state."""
        if self.check_every is None:
            return
        self._check()
        with RUNNING:
            tensors = [*self.objective.parameters(), *self.objective.buffers(), self.sum]
            tensors += optimizer_tensors(self.optimizer)
            if self.averages is not None:
                tensors += self.averages.parameters.values()
            self._snapshot.take(tensors, self._position())

    def _position(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "since": self.since_record,
            "rows": self.rows,
            "feed": self.feed.state_dict(),
            "generators": checkpoint.generators(),
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "schedule": None if self.schedule is None else copy.deepcopy(self.schedule.state_dict()),
        }

    def _check(self) -> None:
        if self.check_every is None or not self.ranks.any(not math.isfinite(float(self.sum))):
            return
        bad_step, self.stopped = self.step, "loss is not finite"
        last = self._snapshot.restore()
        self.go_to(last)
        saved = "" if self.run_dir is None else f"; the last checkpoint is {checkpoint.latest(self._directory)}"
        step, sites = replay(self, last["generators"], bad_step)
        self._snapshot.restore()
        self.go_to(last)
        checkpoint.restore_generators(last["generators"])
        if not sites:
            raise NonFiniteError(
                f"the loss became NaN or infinite between steps {last['step'] + 1} and {bad_step}, but not when these "
                f"steps were made again eagerly; the parameters are those of step {last['step']}{saved}", None, []
            )  # fmt: skip
        raise NonFiniteError(
            f"step {step}: not finite: {'; '.join(sites[:6])}. The parameters are those of step {last['step']}, the "
            f"last with a finite loss{saved}", step, sites,
        )  # fmt: skip

    def go_to(self, position: dict[str, Any]) -> None:
        """Restore counts, data, rates and schedule of a snapshot."""
        self.step, self.epoch, self.batch = position["step"], position["epoch"], position["batch"]
        self.since_record, self.rows = position["since"], position["rows"]
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
        with RUNNING:
            state = state_of(self)
            if self.ranks.first:
                checkpoint.save(
                    self._directory,
                    f"step-{self.step:08d}" if name is None else name,
                    self.objective.state_dict(),
                    state,
                    keep=self.keep if name is None else None,
                    run=self.number,
                )
        if name is None:
            self.saved = self.step

    def restore(self, source: Path, changed: frozenset[str] = frozenset()) -> None:
        """Continue from a checkpoint.

        Args:
            changed: settings that are this run's where they differ from the checkpoint's.

        Raises:
            CheckpointError: if it is damaged or does not fit; nothing is changed then.
        """
        with RUNNING:
            restore_run(self, source, changed)
