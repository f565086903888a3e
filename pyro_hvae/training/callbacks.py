"""Callback protocol, and callbacks: progress bar, TensorBoard, early stopping."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from tqdm.auto import tqdm

from pyro_hvae.arguments import check_count, check_number

if TYPE_CHECKING:
    from pyro_hvae.training.loop import Run

__all__ = ["Callback", "ConsoleLog", "EarlyStopping", "ProgressBar", "TensorBoard"]


class Callback(Protocol):
    """Protocol of callbacks.  Any object with some of these methods is one; all methods are optional.

    A callback with ``state_dict()`` and ``load_state_dict(state)`` (of plain data and tensors) is saved with each
    checkpoint and restored by ``resume=True``.
    """

    def on_start(self, run: Run) -> None:
        """Called before the first step, after a resume."""

    def on_step(self, run: Run, loss: Any) -> None:
        """Called after each step with its 0-dim loss; reading its value synchronises with the device."""

    def on_record(self, run: Run, record: dict[str, Any]) -> None:
        """Called after a record was added to the history."""

    def on_epoch(self, run: Run) -> None:
        """Called after the last batch of an epoch."""

    def on_end(self, run: Run) -> None:
        """Called after training, also after an error."""


class ProgressBar:
    """A ``tqdm`` bar: steps, time left, loss, terms, rate.

    Args:
        total: steps, or None if unknown.
    """

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self._bar: Any = None

    def on_start(self, run: Run) -> None:
        # Refreshed twice a second: a refresh takes about a millisecond.
        self._bar = tqdm(
            total=self.total, initial=run.step, unit="step", dynamic_ncols=True, leave=True, mininterval=0.5
        )

    def on_step(self, run: Run, loss: Any) -> None:
        self._bar.update()

    def on_record(self, run: Run, record: dict[str, Any]) -> None:
        hidden = {"step", "epoch", "seconds"}
        fields = {name: f"{value:.4g}" for name, value in record.items() if name not in hidden and value is not None}
        self._bar.set_postfix(fields, refresh=False)

    def on_end(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.close()


class ConsoleLog:
    """Print a line for each record: steps, loss, time a step and time left; for logs in files.

    Args:
        print: takes a line; by default it goes to standard error.
    """

    def __init__(self, print: Callable[[str], Any] | None = None) -> None:
        self._print = (lambda line: tqdm.write(line, file=sys.stderr)) if print is None else print
        self._start, self._first = 0.0, 0

    def on_start(self, run: Run) -> None:
        self._start, self._first = time.monotonic(), run.step

    def on_record(self, run: Run, record: dict[str, Any]) -> None:
        hidden = {"step", "epoch", "seconds"}
        fields = [f"{name} {value:.6g}" for name, value in record.items() if name not in hidden and value is not None]
        made, total = run.step - self._first, run.total
        each = (time.monotonic() - self._start) / max(made, 1)
        left = "" if total is None else f", {timedelta(seconds=round(each * max(total - run.step, 0)))} left"
        steps = f"step {run.step}" if total is None else f"step {run.step} of {total}"
        self._print(f"{steps}: {', '.join(fields)}, {1000 * each:.1f} ms a step{left}")


class TensorBoard:
    """Write every record as scalars (extra ``tensorboard``).

    Args:
        directory: of the event files.

    Raises:
        ImportError: if tensorboard is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard logging needs tensorboard: pip install 'pyro-hvae[tensorboard]'") from error
        self.directory = directory
        self._writer_class = SummaryWriter
        self._writer: Any = None

    def on_start(self, run: Run) -> None:
        # A resumed run writes the records after the last checkpoint again.
        self._writer = self._writer_class(str(self.directory), purge_step=run.step + 1 if run.step else None)

    def on_record(self, run: Run, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name not in ("step", "epoch") and value is not None:
                self._writer.add_scalar(name.replace("validation_", "validation/"), value, record["step"])

    def on_end(self, run: Run) -> None:
        if self._writer is not None:
            self._writer.close()


class EarlyStopping:
    """Stop when a recorded quantity has not improved for a while.

    Args:
        patience: number of records without improvement before the stop, at least 1.
        monitor: the quantity; smaller is better.
        min_delta: smallest improvement, in its unit (nats a datum for losses).

    Raises:
        ValueError: for ``patience < 1`` or a negative ``min_delta``; when training starts, if there will be no such
            quantity because there is no validation data; at the first record, if it is of another name.

    Example:
        >>> EarlyStopping(patience=0)
        Traceback (most recent call last):
        ValueError: patience must be at least 1, got 0
    """

    def __init__(self, patience: int, *, monitor: str = "validation_loss", min_delta: float = 0.0) -> None:
        check_count("patience", patience)
        check_number("min_delta", min_delta, 0.0)
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(f"monitor must be the name of a recorded quantity, got {monitor!r}")
        self.patience, self.monitor, self.min_delta = patience, monitor, min_delta
        self.best, self.waited = math.inf, 0

    def on_start(self, run: Run) -> None:
        if self.monitor.startswith("validation_") and run.validation is None:
            raise ValueError(
                f"early stopping watches {self.monitor!r}, but fit() got no validation data: give it some, or "
                "monitor='loss'"
            )

    def on_record(self, run: Run, record: dict[str, Any]) -> None:
        if self.monitor not in record:
            kind = "validation_loss" if self.monitor.startswith("validation_") else "loss"
            if kind in record and self.monitor not in run.history.names():
                raise ValueError(
                    f"early stopping watches {self.monitor!r}, which is not recorded; recorded are "
                    f"{', '.join(run.history.names())}: choose one of these as monitor="
                )
            return
        if record[self.monitor] < self.best - self.min_delta:
            self.best, self.waited = record[self.monitor], 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop(f"{self.monitor} has not improved on {self.best:.6g} for {self.waited} records")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
