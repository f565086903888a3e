"""Bounds on data without training: evaluation mode, fixed noise, generators restored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem.isolation import RUNNING, kept_generators
from pyro_hvae.training.feed import Batch, Feed, rows_of
from pyro_hvae.training.objective import PairObjective

__all__ = ["evaluate_batch", "evaluating", "validation_record"]

QUALITY = ("ess", "log_weight_variance")
"""Terms that are diagnostics of weights, and no part of a bound in nats."""


@contextmanager
def evaluating(objective: PairObjective, seed: int | None = None) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore the generators afterwards.

    Args:
        seed: of torch's, numpy's and Python's generators; None keeps their state.
    """
    with RUNNING, torch.no_grad(), kept_generators(), evaluation_mode(objective):
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
        yield


def evaluate_batch(
    objective: PairObjective, args: tuple, kwargs: Mapping[str, Any], *, check: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the terms of a batch from one run, 0-dim, in nats a datum.

    The loss is minus the unweighted bound, and for CUBO and EUBO the estimate: smaller is better.  Call it inside of
    :func:`evaluating`.

    Args:
        check: check observed values against the support of their likelihood.
    """
    problem, bound = objective.problem(args, kwargs, training=not check), objective.bound
    if not hasattr(bound, "evaluate"):
        loss = torch.as_tensor(objective.loss(problem))
        return loss / objective.count(problem), {}
    evaluation = bound.evaluate(problem)
    count = objective.count(problem)
    total = evaluation.total() if bound.from_above else -evaluation.total()
    terms = {
        name: term.mean() if name in QUALITY else term.sum() * evaluation.scale / count
        for name, term in evaluation.terms.items()
    }
    return total / count, terms


def validation_record(
    objective: PairObjective,
    held_out: Feed,
    transform: Callable[[tuple, dict[str, Any]], Batch],
    *,
    seed: int = 0,
    check: bool = True,
) -> dict[str, float]:
    """Return ``validation_loss`` and ``validation_<term>``, averaged over held-out data, in nats a datum.

    Args:
        seed: of the noise.
        check: check observed values, which are the same at each validation.
    """
    total: dict[str, Tensor] = {}
    weight = 0
    with evaluating(objective, seed):
        for args, kwargs in held_out.epoch(0):
            args, kwargs = transform(args, kwargs)
            rows = rows_of(args, kwargs) or 1
            if objective.data_size is not None and held_out.data_size is not None:
                kwargs = {**kwargs, "data_size": held_out.data_size}
            loss, terms = evaluate_batch(objective, args, kwargs, check=check)
            for name, value in {"loss": loss, **terms}.items():
                total[name] = total.get(name, 0.0) + value * rows
            weight += rows
    if not weight:
        raise ValueError("the validation data has no batch")
    return {f"validation_{name}": float(value) / weight for name, value in total.items()}
