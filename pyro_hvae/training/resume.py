"""Save and restore the state of a run as plain data and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_hvae.training import checkpoint
from pyro_hvae.training.checkpoint import CheckpointError

if TYPE_CHECKING:
    from pyro_hvae.training.loop import Run

__all__ = ["restore_run", "state_of"]

FACTORED = frozenset(("Adafactor", "Muon"))
"""Optimisers whose state has other shapes than their parameters."""

PROGRESS = frozenset(("last_epoch", "_step_count", "_last_lr", "best", "num_bad_epochs", "cooldown_counter"))
"""Entries of a scheduler's state that say how far it is."""


def state_of(run: Run, generators: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the state of a run besides the weights; on several processes each must call this.

    Args:
        generators: of each process; None collects them.
    """
    if generators is None:
        generators = run.ranks.gather_generators(checkpoint.generators())
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
        "stopped": None if run.interrupted is not None else run.stopped,
        "optimizer_class": type(run.optimizer).__name__,
        "parameters": _parameters(run),
        "optimizer": run.optimizer.state_dict(),
        "schedule_class": type(run.schedule).__name__,
        "schedule": None if run.schedule is None else run.schedule.state_dict(),
        "ema": None if run.averages is None else run.averages.state_dict(),
        "callbacks": [[type(c).__name__, c.state_dict()] for c in run.callbacks if hasattr(c, "state_dict")],
        "generators": generators,
    }


def restore_run(run: Run, source: Path, changed: frozenset[str] = frozenset()) -> None:
    """Restore a run from a checkpoint; everything is checked before anything is changed.

    Args:
        changed: settings that are taken from this run where they differ from the checkpoint's: ``"optimizer"``,
            ``"schedule"``, ``"ema"``, ``"bound"``.

    Raises:
        CheckpointError: if it is damaged or does not fit; nothing is changed then.
    """
    weights, state = checkpoint.read_weights(source), checkpoint.read_state(source)
    missing = sorted({"epoch", "batch", "seed", "sum", "optimizer", "schedule", "ema", "generators"} - set(state))
    if missing:
        raise CheckpointError(f"{source / checkpoint.STATE} lacks {missing}")
    own = run.objective.state_dict()
    if "bound" in changed:  # the state of another bound is not this one's
        weights = {name: value for name, value in weights.items() if not name.startswith("bound.")}
        own = {name: value for name, value in own.items() if not name.startswith("bound.")}
    checkpoint.check_weights(own, weights, source, dtypes=True)
    same_class = state.get("optimizer_class", type(run.optimizer).__name__) == type(run.optimizer).__name__
    if same_class or "optimizer" not in changed:
        _check_optimizer(run, state, source)
    for what, present in (("schedule", run.schedule), ("ema", run.averages)):
        if (present is None) != (state[what] is None) and what not in changed:
            raise CheckpointError(
                f"{source} was written {'with' if present is None else 'without'} {what}=, this run is not: resume "
                "with the arguments that it was started with"
            )
    if run.averages is not None and state["ema"] is not None:
        _check_averages(run.averages.parameters, state["ema"].get("parameters", {}), source)

    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    if same_class:
        _restore_optimizer(run.optimizer, state["optimizer"], keep=bool({"optimizer", "schedule"} & changed))
    _restore_schedule(run, state, "schedule" in changed)
    if run.averages is not None:
        if state["ema"] is None:
            run.averages.restart()
        else:
            run.averages.load_state_dict(state["ema"])
    run.step, run.epoch, run.batch = state["step"], state["epoch"], state["batch"]
    run.since_record, run.rows, run.terms_due = state["since"], state["rows"], state["terms_due"]
    run.feed.load_state_dict(state["feed"])
    run.sum.copy_(state["sum"])
    run.best, run.stopped, run.saved = state["best"], state["stopped"], state["step"]
    _restore_callbacks(run, state.get("callbacks", []))
    run.history.truncate(state["records"])
    run.pending = run.ranks.own_generators(state["generators"], run.seed, run.step)


def _parameters(run: Run) -> list[list[Any]]:
    """Return name and shape of each parameter, in the optimiser's order."""
    names = {id(p): name for name, p in run.objective.named_parameters()}
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    return [[names.get(id(p), ""), list(p.shape)] for p in held]


def _check_optimizer(run: Run, state: Mapping[str, Any], source: Path) -> None:
    """Refuse a state of another optimiser, of other parameters, or of the same in another order."""
    where, kind = source / checkpoint.STATE, type(run.optimizer).__name__
    if state.get("optimizer_class", kind) != kind:
        raise CheckpointError(
            f"{where} holds the state of {state['optimizer_class']}, and this run's optimiser is {kind}: pass the same "
            "optimizer="
        )
    own, recorded = _parameters(run), state.get("parameters")
    if recorded is not None and recorded != own:
        shorter = min(len(own), len(recorded))
        place = next((i for i in range(shorter) if recorded[i] != own[i]), shorter)
        then, now = (str(part[place]) if place < len(part) else "nothing" for part in (recorded, own))
        raise CheckpointError(
            f"{where}: the optimiser's parameters differ: number {place} is {then} in the file, and {now} here. Build "
            "the programs, with their parameters in the same order, as they were"
        )
    groups, saved = run.optimizer.param_groups, state["optimizer"]
    try:
        counts = [len(group["params"]) for group in saved["param_groups"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        states = saved["state"]
        known = set(states) <= set(numbers)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where} holds no state of an optimiser ({error!r})") from error
    if counts != [len(group["params"]) for group in groups] or not known or len(set(numbers)) != len(numbers):
        raise CheckpointError(f"{where}: the optimiser has {counts} parameters by group, and this run's has "
                              f"{[len(group['params']) for group in groups]}")  # fmt: skip
    held = [p for group in groups for p in group["params"]]
    for number, parameter, (owner, _) in zip(numbers, held, own, strict=True):
        for name, value in dict(states.get(number, {})).items():
            _check_moment(name, value, parameter, owner or "a parameter", kind, where)


def _check_moment(name: str, value: Any, parameter: Tensor, owner: str, kind: str, where: Path) -> None:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return
    if value.shape != parameter.shape and kind not in FACTORED:
        raise CheckpointError(
            f"{where}: {name} of {owner} has shape {tuple(value.shape)}, and the parameter "
            f"{tuple(parameter.shape)}: it is the state of another model"
        )
    if not value.is_floating_point() and parameter.is_floating_point():
        raise CheckpointError(f"{where}: {name} of {owner} is {value.dtype}, no floating-point number")


def _check_averages(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: Path) -> None:
    if set(own) != set(saved) or any(own[name].shape != saved[name].shape for name in own):
        raise CheckpointError(
            f"{source / checkpoint.STATE}: the moving averages are of other parameters: {sorted(set(own) ^ set(saved))}"
        )


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], *, keep: bool) -> None:
    """Load an optimiser's state; ``keep`` keeps the hyper-parameters of this run."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    if keep:
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)


def _restore_schedule(run: Run, state: Mapping[str, Any], changed: bool) -> None:
    if run.schedule is None or state["schedule"] is None:
        return
    saved = state["schedule"]
    if changed:
        if state.get("schedule_class") != type(run.schedule).__name__:
            return
        saved = {**run.schedule.state_dict(), **{name: value for name, value in saved.items() if name in PROGRESS}}
    run.schedule.load_state_dict(saved)


def _restore_callbacks(run: Run, saved: list[Any]) -> None:
    """Restore callbacks by their class, in order."""
    if saved and not isinstance(saved[0], (list, tuple)):  # version 0.1: in the order of all callbacks
        saved = [[type(c).__name__, value] for c, value in zip(run.callbacks, saved, strict=False) if value is not None]
    waiting = list(saved)
    for callback in run.callbacks:
        match = next((item for item in waiting if item[0] == type(callback).__name__), None)
        if match is not None and hasattr(callback, "load_state_dict"):
            waiting.remove(match)
            callback.load_state_dict(match[1])
