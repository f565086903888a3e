"""Many processes: data in parallel by lightning-fabric, through the wrapped objective.

Each process gets its share of each batch; the wrapped module averages the gradients.  The objective is divided by
the number of data, so the average over shares of equal size is the gradient of the joined batch.  After
the programs are built the noise is seeded for each rank; before, all ranks must build the same programs (Fabric
broadcasts rank 0's parameters).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyro_hvae.training.checkpoint import generators, restore_generators
from pyro_hvae.training.feed import mixed_seed
from pyro_hvae.training.pulse import LostProcessError, Pulse

__all__ = ["Ranks", "seed_rank"]


class Ranks:
    """Collectives; no-ops on one process.  Inside of the block the processes know of one another's signals and ends.

    Args:
        fabric: a ``lightning_fabric.Fabric``, launched, or None.

    Raises:
        ValueError: at the start of the block, for a Fabric of several processes that is not launched.
    """

    def __init__(self, fabric: Any = None) -> None:
        self.fabric = fabric
        self.world_size = 1 if fabric is None else fabric.world_size
        self.rank = 0 if fabric is None else fabric.global_rank
        self._pulse: Pulse | None = None

    def __enter__(self) -> Ranks:
        if self.world_size > 1:
            if not torch.distributed.is_initialized():
                raise ValueError(
                    f"the fabric of {self.world_size} processes is not launched: call fabric.launch() first"
                )
            self._pulse = Pulse(self.rank, self.world_size)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._pulse is None:
            return
        what = None if error is None else self.lost(error)
        self._pulse.leave(error)
        self._pulse = None
        if what is not None and not isinstance(error, LostProcessError):
            raise LostProcessError(what) from error

    def lost(self, error: BaseException) -> str | None:
        """Return which process is lost, if that is the reason of an error; None for other errors."""
        return None if self._pulse is None else self._pulse.reason(error)

    def interrupted(self, received: int | None) -> int | None:
        """Begin a step; return the signal after which all processes stop without it, or None.

        Args:
            received: a signal that this process has received, or None.

        Raises:
            LostProcessError: if another process is lost.
        """
        return received if self._pulse is None else self._pulse.enter(received)

    def device(self, wanted: torch.device | str | None) -> torch.device | str | None:
        """Return where the programs are moved before anything runs: the device of the Fabric, if there is one.

        Raises:
            ValueError: for another device than that of the Fabric.
        """
        if self.fabric is None:
            return wanted
        own = self.fabric.device
        if wanted is not None and torch.device(wanted) not in (own, torch.device(own.type)):
            raise ValueError(f"device={str(wanted)!r}, and the fabric trains on {str(own)!r}: pass one of them")
        return None if own.type == "cpu" else own

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, value: float) -> float:
        if self.world_size == 1:
            return value
        return float(self.fabric.all_reduce(torch.tensor(value, dtype=torch.float64), reduce_op="mean"))

    def any(self, flag: bool) -> bool:
        return flag if self.world_size == 1 else self.mean(float(flag)) > 0

    def barrier(self) -> None:
        if self.world_size > 1:
            self.fabric.barrier()

    def gather_generators(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the state of every rank's generators, in order of rank."""
        if self.world_size == 1:
            return [state]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, state)
        return gathered

    def own_generators(self, states: list[dict[str, Any]], seed: int, step: int) -> dict[str, Any]:
        """Return this rank's state; a new one derived from the seed, if the number of ranks has changed."""
        if len(states) == self.world_size:
            return states[self.rank]
        before = generators()
        seed_rank(seed, self.rank, step)
        fresh = generators()
        restore_generators(before)
        return fresh

    def setup(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Return objective and optimiser, wrapped by Fabric."""
        if self.fabric is None:
            return objective, optimizer
        return self.fabric.setup(objective, optimizer)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch's generator differently on each rank."""
    torch.manual_seed(mixed_seed(seed, rank, step))
