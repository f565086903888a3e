"""Save and restore the state of a run as plain data and tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_hvae.training import checkpoint

if TYPE_CHECKING:
    from pyro_hvae.training.loop import Run

__all__ = ["restore_run", "state_of"]


def state_of(run: Run) -> dict[str, Any]:
    """Return the state of a run besides the weights; on several processes each must call this."""
    return {
        "step": run.step,
        "epoch": run.epoch,
        "batch": run.batch,
        "seed": run.seed,
        "sum": run.sum,
        "since": run.since_record,
        "rows": run.rows,
        "feed": run.feed.state_dict(),
        "terms_due": run.terms_due,
        "records": len(run.history),
        "best": run.best,
        "stopped": None if run.signals.received is not None else run.stopped,
        "optimizer": run.optimizer.state_dict(),
        "schedule": None if run.schedule is None else run.schedule.state_dict(),
        "ema": None if run.averages is None else run.averages.state_dict(),
        "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in run.callbacks],
        "generators": run.ranks.gather_generators(checkpoint.generators()),
    }


def restore_run(run: Run, source: Path) -> None:
    """Restore a run from a checkpoint.

    Raises:
        CheckpointError: if it is damaged or does not fit; nothing is changed then.
    """
    weights, state = checkpoint.read_weights(source), checkpoint.read_state(source)
    try:
        before = copy.deepcopy(run.optimizer.state_dict())
        run.optimizer.load_state_dict(state["optimizer"])
    except (KeyError, ValueError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{source}: its optimiser does not fit this run's ({error})") from error
    try:
        checkpoint.restore_weights(run.objective, weights, source)
    except checkpoint.CheckpointError:
        run.optimizer.load_state_dict(before)
        raise
    for what, own in (("schedule", run.schedule), ("ema", run.averages)):
        if (own is None) != (state[what] is None):
            raise checkpoint.CheckpointError(
                f"{source} was written {'with' if own is None else 'without'} {what}=, this run is not: resume "
                "with the arguments that it was started with"
            )
        if own is not None:
            own.load_state_dict(state[what])
    run.step, run.epoch, run.batch = state["step"], state["epoch"], state["batch"]
    run.since_record, run.rows, run.terms_due = state["since"], state["rows"], state["terms_due"]
    run.feed.load_state_dict(state["feed"])
    run.sum.copy_(state["sum"])
    run.best, run.stopped, run.saved = state["best"], state["stopped"], state["step"]
    for callback, saved in zip(run.callbacks, state["callbacks"], strict=False):
        if saved is not None:
            callback.load_state_dict(saved)
    run.history.truncate(state["records"])
    run.pending = run.ranks.own_generators(state["generators"], run.seed, run.step)
