"""The bound on data that is not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.traces import structure
from pyro_hvae.training.feed import Feed
from pyro_hvae.training.objective import PairObjective

__all__ = ["looking", "per_datum_loss", "validation_record"]


@contextmanager
def looking(objective: nn.Module, seed: int | None = None) -> Iterator[None]:
    """No gradient, evaluation mode, and generators that are put back; seeded, the same noise at each look."""
    modules = [module for module in objective.modules() if module.training]
    with torch.no_grad(), torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module in modules:
                module.training = True


def per_datum_loss(objective: PairObjective, args: tuple, kwargs: Mapping[str, Any], data_size: int | None) -> Tensor:
    """Minus the bound, in nats a datum; of the unweighted bound, where the objective is none."""
    bound, model, guide = objective.bound, objective.model, objective.guide
    kwargs = dict(kwargs)
    if objective.data_size is not None and data_size is not None:
        kwargs["data_size"] = data_size
    if isinstance(bound, DiffusionELBO):  # each row of x a datum; and the programs can't be run in continuous time
        return -bound.per_datum(model, guide, *args, **kwargs).mean()
    plates = structure(model, guide, args, kwargs).common
    if plates and hasattr(bound, "per_datum"):
        return -bound.per_datum(model, guide, *args, **kwargs).mean()
    loss = bound.loss(model, guide, *args, **kwargs)
    loss = loss if isinstance(loss, Tensor) else torch.tensor(loss)
    if "data_size" in kwargs:
        return loss / kwargs["data_size"]
    count = 1
    for plate in plates:
        count *= plate.full_size
    return loss / count


def validation_record(objective: PairObjective, held_out: Feed, transform: Any, seed: int = 0) -> dict[str, float]:
    """``validation_loss`` and ``validation_<term>``, averaged over held-out data, in nats a datum."""
    total: dict[str, Tensor] = {}
    weight = 0
    with looking(objective, seed):
        for args, kwargs in held_out.epoch(0):
            args, kwargs = transform(args, kwargs)
            size = len(next(iter((*args, *kwargs.values()))))
            values = {"loss": per_datum_loss(objective, args, kwargs, held_out.data_size)}
            values.update(objective.terms(args, kwargs))
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value * size
            weight += size
    if not weight:
        raise ValueError("the validation data has no batch")
    return {f"validation_{name}": float(value) / weight for name, value in total.items()}
