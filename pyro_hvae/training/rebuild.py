"""Build the programs of a run directory again."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import constraints as torch_constraints
from torch.distributions.constraints import Constraint

from pyro_hvae.training.checkpoint import (
    CONFIG,
    STATE,
    CheckpointError,
    find,
    read_config,
    read_state,
    read_weights,
    restore_weights,
)
from pyro_hvae.training.files import as_directory
from pyro_hvae.training.trust import check_trusted

__all__ = ["build", "constraint_from", "constraint_record", "factory_record", "hold", "load"]


def factory_record(factory: Any, *programs: Any) -> dict[str, Any] | None:
    """Return how to build a pair, ``{"factory": import path, "args": {...}}``, from an argument or the programs.

    Raises:
        TypeError: for a factory that is neither such a mapping nor a pair of function (or its path) and arguments.
    """
    if factory is None:
        records = [getattr(program, "factory", None) for program in programs]
        factory = next((record for record in records if isinstance(record, Mapping)), None)
        if factory is None:
            return None
    if isinstance(factory, Mapping) and set(factory) == {"factory", "args"}:
        target, arguments = factory["factory"], factory["args"]
    elif isinstance(factory, tuple) and len(factory) == 2:
        target, arguments = factory
    else:
        raise TypeError(f"factory must be (function or its import path, arguments), got {factory!r}")
    if not isinstance(target, str):
        target = f"{target.__module__}:{target.__qualname__}"
    return {"factory": target, "args": dict(arguments)}


def build(record: Mapping[str, Any], *, source: Any = CONFIG, trust: bool = False) -> tuple[Any, Any]:
    """Call a recorded factory.

    Args:
        source: the file that the record is from.
        trust: call it whatever it is; else only what :func:`~pyro_hvae.training.trust.is_trusted` accepts.

    Raises:
        UntrustedError: naming what would be called.
        CheckpointError: if it cannot be imported or called any more, or returns no pair.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("factory"), str):
        raise CheckpointError(f"{source}: the factory must be an import path with arguments, got {record!r}")
    if not isinstance(record.get("args"), Mapping):
        raise CheckpointError(f"{source}: the arguments of the factory must be a mapping, got {record.get('args')!r}")
    check_trusted(record, source, trust)
    path = record["factory"]
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")[::1]
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
        made = target(**record["args"])
    except (ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the factory {path} that built this run's programs does not work: {error}") from error
    if not isinstance(made, tuple) or len(made) != 2:
        raise CheckpointError(f"the factory {path} returned {type(made).__name__}, no pair (model, guide)")
    return made


def load(
    run_dir: str | os.PathLike[str],
    *,
    which: str = "last",
    programs: tuple[Any, Any] | None = None,
    ema: bool = False,
    trust: bool = False,
) -> tuple[Any, Any]:
    """Build the programs of a run directory again, with its weights.

    A run directory from somebody else is data: its config may name functions of :mod:`pyro_hvae.models`, and networks,
    chains and guides of this library, of torch and of Pyro. Anything else is called only with ``trust=True``.

    Args:
        run_dir: a folder that :func:`pyro_hvae.training.fit` wrote.
        which: ``"last"`` (the last that is whole), ``"best"`` (by validation loss), or the name of a checkpoint
            (``"step-00000100"``).
        programs: (model, guide) that get the weights, for a run whose config has no factory.
        ema: take the exponential moving average of the parameters instead of the parameters.
        trust: call the factory that the config names, whatever it is.

    Returns:
        (model, guide), in evaluation mode where they are modules.

    Raises:
        UntrustedError: naming what would be called, where it is not of this library; a ``CheckpointError`` too.
        CheckpointError: naming the file, if it is missing, damaged, or of another architecture.
    """
    run_dir = as_directory(run_dir)
    config = read_config(run_dir)
    path = find(run_dir, which, config.get("run"))
    weights = read_weights(path)
    if ema:
        weights.update(_averages(read_state(path), path))
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("bound.")}
    if programs is None:
        if config.get("factory") is None:
            raise CheckpointError(
                f"{run_dir / CONFIG} does not say how to build the programs (they were not made by a function of "
                "pyro_hvae.models, and fit() got no factory=): build them, and pass "
                "load(run_dir, programs=(model, guide))"
            )
        programs = build(config["factory"], source=run_dir / CONFIG, trust=trust)
    target = _Pair(*programs, weights, config.get("store", {}))
    restore_weights(target, weights, path)
    for program in programs:
        if isinstance(program, nn.Module):
            program.eval()
    return programs


def _averages(state: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    if not state.get("ema"):
        raise CheckpointError(f"{source / STATE} holds no moving average: the run had no ema=")
    return dict(state["ema"]["parameters"])


class _Pair(nn.Module):
    """Two programs under the names that a checkpoint uses, with the parameters they keep in Pyro's store."""

    def __init__(self, model: Any, guide: Any, weights: Mapping[str, Tensor], store: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.guide = model, guide
        self.store = nn.ParameterDict()
        try:
            stored = {
                key: (str(record["name"]), nn.Parameter(torch.zeros_like(weights[key])), record["constraint"])
                for key, record in store.items()
            }
            kinds = {key: constraint_from(record) for key, (_, _, record) in stored.items()}
            for key, (_, leaf, _) in stored.items():
                self.store[key.removeprefix("store.")] = leaf
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{CONFIG}: its record of stored parameters is damaged ({error!r})") from error
        for key, (name, leaf, _) in stored.items():
            hold(name, leaf, kinds[key])


def hold(name: str, leaf: nn.Parameter, constraint: Any = None) -> None:
    """Make ``leaf`` the unconstrained value of a name in Pyro's parameter store."""
    store = pyro.get_param_store()
    old = store._params.get(name)
    if old is not None:
        store._param_to_name.pop(old, None)
    if constraint is not None:
        store._constraints[name] = constraint
    store._params[name] = leaf
    store._param_to_name[leaf] = name


def constraint_record(constraint: Any) -> dict[str, Any]:
    """Convert a constraint to plain data: its class in ``torch.distributions.constraints`` and its arguments."""
    arguments = {
        name.lstrip("_"): constraint_record(value) if isinstance(value, Constraint) else value
        for name, value in vars(constraint).items()
    }
    return {"class": type(constraint).__name__, "arguments": arguments}


def constraint_from(record: Mapping[str, Any]) -> Any:
    """Invert :func:`constraint_record`.

    Raises:
        CheckpointError: for a constraint that is not torch's or Pyro's.
    """
    # Pyro's module has its own constraints and torch's instances, but not torch's classes
    kind: Any = getattr(constraints, record["class"], None) or getattr(torch_constraints, record["class"], None)
    accepted = isinstance(kind, Constraint) or (isinstance(kind, type) and issubclass(kind, Constraint))
    if not accepted:
        raise CheckpointError(
            f"constraint {record['class']} of a stored parameter is not one of torch's: build the programs, run them "
            "once so that they declare their parameters, and resume with fit(..., resume=True)"
        )
    arguments = {
        name: constraint_from(value) if isinstance(value, Mapping) else value
        for name, value in record["arguments"].items()
    }
    return kind(**arguments) if arguments else kind() if isinstance(kind, type) else kind
