"""Save what a run has, when another of its processes is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pyro_hvae.problem.isolation import RUNNING
from pyro_hvae.training import checkpoint
from pyro_hvae.training.history import History
from pyro_hvae.training.lock import RunLock
from pyro_hvae.training.pulse import LostProcessError
from pyro_hvae.training.resume import state_of

if TYPE_CHECKING:
    from pyro_hvae.training.loop import Run

__all__ = ["rescued"]

WAIT = 3.0
"""Seconds that the lock of a process that has been killed may last."""


@contextmanager
def rescued(run: Run) -> Iterator[None]:
    """Write a checkpoint of the last step if another process is lost inside of the block.

    The first process writes it, which has the lock of the run directory, or else the one that gets the lock.  The
    weights are the same on all processes.  The generators of a lost process can't be known, so each process draws new
    noise when the run is resumed.

    Raises:
        LostProcessError: in the place of the error of a collective, with the checkpoint.
    """
    try:
        yield
    except Exception as error:
        what = run.ranks.lost(error)
        if what is None:
            raise
        raise LostProcessError(f"{what}. Training ends after step {run.step}{_saved(run)}") from error


def _saved(run: Run) -> str:
    """Write the checkpoint, if this process may; say what there is to resume from."""
    if run.run_dir is None:
        return "; without run_dir= nothing is saved"
    directory = run.run_dir / "checkpoints"
    name = f"step-{run.step:08d}"
    # A source of batches with a state is ahead of the last step by the batch of the one that failed.
    if run.step and run.saved != run.step and run.feed.state_dict() is None:
        lock = nullcontext() if run.ranks.first else _lock(run)
        if lock is not None:
            with lock, RUNNING:
                state = {**state_of(run, generators=[]), "records": _records(run)}
                number = run.number if run.ranks.first else checkpoint.read_config(run.run_dir).get("run")
                checkpoint.save(directory, name, run.objective.state_dict(), state, keep=run.keep, run=number)
            return f", and {name} is saved: resume=True goes on from there, with new noise"
    last = checkpoint.latest(directory)
    return "; there is no checkpoint yet" if last is None else f"; {last.name} is the last checkpoint"


def _lock(run: Run) -> Any:
    """Return the lock of the run directory; None while another process has it."""
    assert run.run_dir is not None
    end = time.monotonic() + WAIT
    while True:
        try:
            return _released(RunLock(run.run_dir))
        except (RuntimeError, OSError):
            if time.monotonic() > end:
                return None
            time.sleep(0.1)


@contextmanager
def _released(lock: RunLock) -> Iterator[None]:
    try:
        yield
    finally:
        lock.release()


def _records(run: Run) -> int:
    """Return the number of records of the steps that were made; the first process keeps them."""
    if run.ranks.first:
        return len(run.history)
    assert run.run_dir is not None
    path = run.run_dir / "history.jsonl"
    return sum(record["step"] <= run.step for record in History.read(path)) if path.exists() else 0
