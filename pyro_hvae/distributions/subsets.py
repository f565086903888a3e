"""Masks that one random entry, or some, get or lose: the steps of a process that visits the entries in any order."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

__all__ = ["MaskedSubset", "OneRevealed"]


class MaskedSubset(TorchDistribution):
    r"""An array with ``count`` further entries masked: each subset of the entries not masked is as likely.

    .. math:: \log P(z) = -\log\binom{n}{k},\quad n \text{ entries of the array not masked},\ k = \text{count}

    Args:
        value: the array of integers (..., *event), with ``mask_value`` where it is masked.
        count: k, an integer or integers (...).
        mask_value: the state that stands for a mask.
        event_dim: dims of the array.

    Example:
        >>> masked = MaskedSubset(torch.tensor([0, 1, 2, 2]), 1, mask_value=2, event_dim=1)
        >>> masked.log_prob(torch.tensor([[2, 1, 2, 2], [1, 1, 2, 2]])).exp().tolist()
        [0.5, 0.0]
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, value: Tensor, count: Any, mask_value: int, event_dim: int, validate_args: Any = None) -> None:
        lead, event = _split(value, event_dim)
        count = torch.as_tensor(count, device=value.device)
        batch = torch.broadcast_shapes(lead, count.shape)
        self.value, self.count = value.expand(batch + event), count.expand(batch)
        self.mask_value = mask_value
        super().__init__(batch, event, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.mask_value), self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MaskedSubset:
        batch = torch.Size(batch_shape)
        value, count = self.value.expand(batch + self.event_shape), self.count.expand(batch)
        return MaskedSubset(value, count, self.mask_value, self.event_dim, validate_args=self._validate_args)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        value = self.value.expand(shape)
        rank = _noise(value == self.mask_value, self.event_dim).argsort(-1).argsort(-1)
        chosen = (rank < self.count.unsqueeze(-1)).reshape(shape)
        return torch.where(chosen, self.mask_value, value)

    def log_prob(self, value: Tensor) -> Tensor:
        dims = tuple(range(-self.event_dim, 0))
        before, after = self.value == self.mask_value, value == self.mask_value
        free = (~before).sum(dims)
        fits = torch.where(before, after, after | (value == self.value)).flatten(-self.event_dim).all(-1)
        fits = fits & ((after & ~before).sum(dims) == self.count)
        n, k = free.to(torch.get_default_dtype()), self.count
        choices = torch.lgamma(n + 1) - torch.lgamma(k + 1.0) - torch.lgamma(n - k + 1)
        return torch.where(fits, -choices, -torch.inf)


class OneRevealed(TorchDistribution):
    r"""An array with one of its masked entries revealed: which one is uniform, its value has given log-probabilities.

    .. math:: \log P(z) = \mathrm{logp}_{j, z_j} - \log m,\quad m \text{ masked entries, } j \text{ that revealed}

    Args:
        value: the array of integers (..., *event), with the state C where it is masked; at least one entry is.
        logp: normalised log-probabilities (..., *event, C).
        event_dim: dims of the array.

    Example:
        >>> logp = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
        >>> OneRevealed(torch.tensor([2, 2]), logp, 1).log_prob(torch.tensor([2, 1])).exp()
        tensor(0.4000)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, value: Tensor, logp: Tensor, event_dim: int, validate_args: Any = None) -> None:
        lead, event = _split(value, event_dim)
        batch = torch.broadcast_shapes(lead, logp.shape[: logp.dim() - event_dim - 1])
        self.value, self.logp = value.expand(batch + event), logp.expand(batch + event + logp.shape[-1:])
        self.mask_value = logp.shape[-1]
        super().__init__(batch, event, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.mask_value), self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneRevealed:
        batch = torch.Size(batch_shape)
        value = self.value.expand(batch + self.event_shape)
        logp = self.logp.expand(batch + self.event_shape + self.logp.shape[-1:])
        return OneRevealed(value, logp, self.event_dim, validate_args=self._validate_args)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        value = self.value.expand(shape)
        first = _noise(value != self.mask_value, self.event_dim).argmin(-1, keepdim=True)
        places = torch.arange(self.event_shape.numel(), device=value.device)
        drawn = torch.distributions.Categorical(logits=self.logp).sample(torch.Size(sample_shape))
        return torch.where((places == first).reshape(shape), drawn, value)

    def log_prob(self, value: Tensor) -> Tensor:
        masked, changed = self.value == self.mask_value, value != self.value
        index = value.long().clamp(max=self.mask_value - 1).unsqueeze(-1)
        shape = torch.broadcast_shapes(index.shape[:-1], self.logp.shape[:-1])
        logp = torch.gather(self.logp.expand(*shape, -1), -1, index.expand(*shape, 1)).squeeze(-1)
        chosen = torch.where(changed & masked, logp, 0.0).flatten(-self.event_dim).sum(-1)
        valid = (changed.flatten(-self.event_dim).sum(-1) == 1) & ~(changed & ~masked).flatten(-self.event_dim).any(-1)
        count = masked.flatten(-self.event_dim).sum(-1).to(self.logp.dtype)
        return torch.where(valid, chosen - count.log(), -torch.inf)


def _split(value: Tensor, event_dim: int) -> tuple[torch.Size, torch.Size]:
    lead = value.dim() - event_dim
    if event_dim < 1 or lead < 0:
        raise ValueError(f"an array of {event_dim} dims was expected, event_dim >= 1; got shape {tuple(value.shape)}.")
    return value.shape[:lead], value.shape[lead:]


def _noise(taken: Tensor, event_dim: int) -> Tensor:
    """Draw uniform noise by entry, flat over the event, and above all others where an entry can't be chosen."""
    noise = torch.rand(taken.shape, device=taken.device)
    return noise.masked_fill(taken, 2.0).flatten(-event_dim)
