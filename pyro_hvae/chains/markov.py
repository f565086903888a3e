"""Distribution of a whole sequence given by its conditionals, step by step."""

from __future__ import annotations

from typing import Any, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Conditionals", "MarkovSequence"]


class Conditionals(Protocol):
    """Conditionals p(z_t | z_{t-1}, h_t) of a sequence, where h_t may summarise all that came before.

    ``at`` gives the distribution of one step, ``advance`` the state after its draw, ``joint`` the distributions of all
    steps at once given the whole sequence (..., T, *event), as a list of (number of steps, distribution).
    """

    def at(self, t: int, before: Tensor | None, state: Any) -> TorchDistribution: ...
    def advance(self, t: int, value: Tensor, state: Any) -> Any: ...
    def joint(self, values: Tensor) -> list[tuple[int, TorchDistribution]]: ...


class MarkovSequence(TorchDistribution):
    r"""A sequence :math:`p(z_1)\prod_t p(z_t|z_{t-1},h_t)`, one event of shape (T, \*event).

    Draws go step by step, the density is evaluated at all steps at once.  Steps after the end of a sequence are zero in
    draws, and have no density.

    Args:
        conditionals: see :class:`Conditionals`.
        num_steps: T.
        valid: (N, T), True up to the end of each sequence; None if all have T steps.
        batch_shape: (..., N).
        first: the distribution of the first step, for the shape and support of events.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        conditionals: Conditionals,
        num_steps: int,
        valid: Tensor | None,
        batch_shape: torch.Size,
        first: TorchDistribution,
    ) -> None:
        self.conditionals, self.num_steps, self.valid, self.first = conditionals, num_steps, valid, first
        self._drawn: tuple[Tensor, list[TorchDistribution], bool] | None = None
        super().__init__(batch_shape, torch.Size((num_steps, *first.event_shape)), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.first.has_rsample

    @property
    def support(self) -> Any:
        return constraints.independent(self.first.support, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovSequence:
        batch_shape = torch.Size(batch_shape)
        return MarkovSequence(self.conditionals, self.num_steps, self.valid, batch_shape, self.first)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        values: list[Tensor] = []
        distributions: list[TorchDistribution] = []
        value: Tensor | None = None
        state: Any = None
        for t in range(self.num_steps):
            distribution = self.conditionals.at(t, value, state)
            if distribution.batch_shape != shape:
                distribution = distribution.expand(shape)
            value = distribution.rsample() if distribution.has_rsample else distribution.sample()
            values.append(value)
            distributions.append(distribution)
            state = self.conditionals.advance(t, value, state)
        drawn = torch.stack(values, len(shape))
        if self.valid is not None:
            valid = self.valid.reshape(self.valid.shape + (1,) * (len(self.event_shape) - 1))
            drawn = torch.where(valid, drawn, torch.zeros((), dtype=drawn.dtype, device=drawn.device))
        self._drawn = drawn, distributions, torch.is_grad_enabled()
        return drawn

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.steps_log_prob(value).sum(-1)

    def steps_log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of each step given those before it, (..., T); 0 after the end."""
        own = self._own_steps(value)
        if own is not None:
            return self._counted(own)
        events = len(self.event_shape) - 1
        time = value.dim() - events - 1
        parts, start = [], 0
        for count, distribution in self.conditionals.joint(value):
            parts.append(distribution.log_prob(value.narrow(time, start, count)))
            start += count
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        joined = torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1) if len(parts) > 1 else parts[0]
        return self._counted(joined)

    def _counted(self, steps: Tensor) -> Tensor:
        if self.valid is None:
            return steps
        return torch.where(self.valid, steps, torch.zeros((), dtype=steps.dtype, device=steps.device))

    def _own_steps(self, value: Tensor) -> Tensor | None:
        """Return the log-density of this object's own last draw, from the distributions of the steps that made it.

        None for any other value, and for draws without a gradient where one is wanted now.
        """
        if self._drawn is None or self._drawn[0] is not value:
            return None
        _, distributions, with_gradient = self._drawn
        bases: list[Any] = [getattr(distribution, "base_dist", None) for distribution in distributions]
        if not all(type(base) is dist.Normal for base in bases) or (torch.is_grad_enabled() and not with_gradient):
            return None
        event = len(self.event_shape) - 1
        if event != distributions[0].reinterpreted_batch_ndims:
            return None
        loc = torch.stack([base.loc for base in bases], -event - 1)
        scale = torch.stack([base.scale for base in bases], -event - 1)
        return dist.Normal(loc, scale).to_event(event).log_prob(value)
