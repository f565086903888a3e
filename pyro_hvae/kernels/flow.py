"""Conditional distributions of other libraries as kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae.kernels.base import Kernel

__all__ = ["Adapted", "Flow"]


class Flow(Kernel):
    """Turn a module that maps a conditioning value to a ``torch`` distribution into a kernel.

    This is the interface of zuko's flows (``zuko.flows.NSF(features, context)``), which are not Pyro
    distributions; no optional package is imported here.

    Args:
        lazy: module with ``lazy(c) -> torch.distributions.Distribution``, c being parent and context joined
            on the last dim, or ``lazy()`` where there is neither.
        event_dim: dims of one event.

    Example:
        >>> class Lazy(nn.Module):
        ...     def forward(self, c):
        ...         return torch.distributions.MultivariateNormal(c, torch.eye(2))
        >>> Flow(Lazy())(torch.zeros(5, 2)).shape()
        torch.Size([5, 2])
    """

    def __init__(self, lazy: nn.Module, event_dim: int = 1) -> None:
        super().__init__(lazy, event_dim)

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        net = self.net
        result: Any = net() if parent is None and context is None else self.parameters_of(parent, context)
        if isinstance(result, TorchDistribution):
            return result
        return Adapted(result)


class Adapted(TorchDistribution):
    """Add Pyro's methods to a ``torch`` distribution.

    Args:
        base: the distribution, with ``sample`` or ``rsample``, ``log_prob`` and ``expand``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: torch.distributions.Distribution) -> None:
        self.base_dist = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.base_dist.has_rsample

    @property
    def support(self) -> Any:
        try:
            return self.base_dist.support
        except (NotImplementedError, AttributeError):
            return torch.distributions.constraints.independent(
                torch.distributions.constraints.real, len(self.event_shape)
            )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Adapted:
        return Adapted(self.base_dist.expand(torch.Size(batch_shape)))
