"""Locate the first NaN or infinity of a run by replaying the steps from the last good state.

Reading the loss after each step would synchronise with the device, so the sum of the losses is checked every
``check_every`` steps; if it is finite, the state is copied.  If it is not, the steps since the last copy are replayed,
eagerly and one by one, with the same batches and the same noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_hvae.training import checkpoint
from pyro_hvae.training.feed import Batch
from pyro_hvae.training.objective import PairObjective

if TYPE_CHECKING:
    from pyro_hvae.training.loop import Run

__all__ = ["NonFiniteError", "Snapshot", "non_finite_sites", "optimizer_tensors", "replay"]


class NonFiniteError(ArithmeticError):
    """Error: the loss or a gradient became NaN or infinite.

    Attributes:
        step: the step, counted from 1; None if the replay was finite.
        sites: draws, densities and gradients that were not finite, in the order of the programs.
    """

    def __init__(self, message: str, step: int | None, sites: list[str]) -> None:
        super().__init__(message)
        self.step = step
        self.sites = sites


class Snapshot:
    """A copy of tensors that are changed in place."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self.extra: dict[str, Any] = {}

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor], extra: dict[str, Any]) -> None:
        """Copy ``tensors``, and keep ``extra`` (not copied)."""
        tensors = list(tensors)
        if len(tensors) != len(self._tensors) or any(a is not b for a, b in zip(tensors, self._tensors, strict=True)):
            self._tensors = tensors
            self._copies = [tensor.detach().clone() for tensor in tensors]
        else:
            torch._foreach_copy_(self._copies, [tensor.detach() for tensor in tensors])
        self.extra = extra

    @torch.no_grad()
    def restore(self) -> dict[str, Any]:
        """Restore the copies, and return ``extra``."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        return self.extra


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value
        for state in optimizer.state.values()
        if isinstance(state, Mapping)
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def replay(run: Run, generators: Any, until: int) -> tuple[int | None, list[str]]:
    """Replay the steps of a run from its present state, eagerly, up to step ``until``.

    Returns:
        The first step, counted from 1, with a value that is not finite, or the last; and the names of such values.
    """
    sites: list[str] = []
    step: int | None = None
    batches = run.feed.epoch(run.epoch, run.batch)
    checkpoint.restore_generators(generators)
    while run.step < until and not sites:
        group = list(itertools.islice(batches, run.accumulate))
        if not group:
            run.epoch, run.batch = run.epoch + 1, 0
            batches = run.feed.epoch(run.epoch)
            continue
        sites = _replay_step(run, group)
        step = run.step
    return step, sites


def _replay_step(run: Run, group: list[Batch]) -> list[str]:
    """Replay one step, and name its values that are not finite."""
    batches = [run.transform(*batch) for batch in group]
    noise = checkpoint.generators()
    loss = run.eager.gradients(batches)
    run.step += 1
    run.batch += len(group)
    if not math.isfinite(float(loss)):
        checkpoint.restore_generators(noise)
        sites = [name for args, kwargs in batches for name in non_finite_sites(run.objective, args, kwargs)]
        return sites or ["the loss, though every site is finite"]
    if gradients := non_finite_gradients(run.objective):
        return gradients
    run.eager.apply()
    run.objective.advance()
    if run.schedule is not None and not isinstance(run.schedule, ReduceLROnPlateau):
        run.schedule.step()
    return []


def non_finite_sites(objective: PairObjective, args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """Name the draws and log-densities of one run that are not finite, in the order they are computed."""
    diffusion = getattr(objective.guide, "nested", None) or objective.guide
    if getattr(diffusion, "num_layers", 0) is None:  # a diffusion in continuous time has no run
        return []
    bound = objective.bound
    count = getattr(bound, "num_draws", getattr(bound, "num_particles", 1))
    with torch.no_grad():
        try:
            run = objective.problem(args, kwargs, training=True).run(count)
        except ValueError as error:  # the checks of a new structure name the first bad value
            return [str(error)]
        names = [f"the guide's draw of '{name}'" for name, value in run.values.items() if _bad(value)]
        names += [f"log q of '{name}'" for name, value in run.log_q.items() if _bad(value)]
        names += [f"log p of '{name}'" for name, value in run.log_p.items() if _bad(value)]
    return names


def non_finite_gradients(objective: nn.Module) -> list[str]:
    return [
        f"the gradient of {name}"
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None and _bad(parameter.grad)
    ]


def _bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(torch.isfinite(value).all())
