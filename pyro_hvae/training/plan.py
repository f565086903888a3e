"""What a training run is made of: its batches, its steps and its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.training.averages import Averages
from pyro_hvae.training.feed import Batch, Feed
from pyro_hvae.training.history import History
from pyro_hvae.training.step import EagerStep

__all__ = ["Data", "Records", "Steps", "Transform"]

Transform = Callable[[tuple, dict[str, Any]], Batch]


@dataclass(frozen=True)
class Data:
    """Batches of a run.

    Attributes:
        feed, transform: the batches, and a function of each.
        seed: of their order.
        accumulate: batches per step.
        validation, validate_every: held-out data or None, and steps between validations (None: an epoch).
    """

    feed: Feed
    transform: Transform
    seed: int
    accumulate: int
    validation: Feed | None
    validate_every: int | None


@dataclass(frozen=True)
class Steps:
    """Steps of a run: the step, its eager form, torch's optimiser, its schedule, averages, steps between checks."""

    take: Callable[[Sequence[Batch]], Tensor]
    eager: EagerStep
    optimizer: torch.optim.Optimizer
    schedule: Any
    averages: Averages | None
    check_every: int | None


@dataclass(frozen=True)
class Records:
    """Output of a run: history, folder, steps between checkpoints, number kept, steps between records and terms, and
    the number of the run, which its checkpoints carry."""

    history: History
    run_dir: Path | None
    checkpoint_every: int | None
    keep: int
    log_every: int
    terms_every: int
    number: str | None = None
