"""Kernels over discrete values: binary, categorical, counts, and the table of a discrete Markov chain."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyro_hvae import distributions
from pyro_hvae.arguments import check_count, check_switch
from pyro_hvae.kernels.base import Kernel, halves

__all__ = ["Bernoulli", "Categorical", "DiscretizedLogistic", "NegativeBinomial", "Poisson", "Transition"]


class Bernoulli(Kernel):
    """Independent Bernoulli variables with logits net(parent); values 0. and 1.

    Args:
        net: network to the logits (..., *event_shape).
        event_dim: dims of one event.

    Example:
        >>> Bernoulli(nn.Linear(2, 4))(torch.zeros(3, 2)).event_shape
        torch.Size([4])
    """

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        return dist.Bernoulli(logits=self.parameters_of(parent, context)).to_event(self.event_dim)


class Categorical(Kernel):
    """Independent categorical variables with logits from a network.

    Args:
        net: network to logits (..., *event_shape, C).
        event_dim: dims of one event, not counting the categories: 0 is one variable a datum, with integer
            values.
        num_categories: C. With it, the network yields (..., d * C), read as (..., d, C) (or (..., C) when
            ``event_dim=0``).
        one_hot: values are one-hot vectors (..., *event_shape, C) of floats, which a next kernel's network
            can take, instead of integers (..., *event_shape).
        enumerate: mark the site for parallel enumeration (exact sums over a discrete latent). One variable a
            datum only (``event_dim=0``): Pyro does not enumerate products.

    Example:
        >>> Categorical(nn.Linear(2, 3 * 5), num_categories=5)(torch.zeros(4, 2)).shape()
        torch.Size([4, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        event_dim: int = 1,
        *,
        num_categories: int | None = None,
        one_hot: bool = False,
        enumerate: bool = False,
    ) -> None:
        super().__init__(net, event_dim)
        if num_categories is not None:
            check_count("num_categories", num_categories)
        if enumerate and event_dim:
            raise ValueError(
                f"enumerate=True sums over one variable a datum, but event_dim={event_dim} makes a product "
                "of them. Use event_dim=0, or one site a variable."
            )
        self.num_categories = num_categories
        self.one_hot = one_hot
        if enumerate:
            self.infer = {"enumerate": "parallel"}

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        logits = self.parameters_of(parent, context)
        if self.num_categories is not None and self.event_dim:
            logits = logits.unflatten(-1, (-1, self.num_categories))
        family = dist.OneHotCategorical if self.one_hot else dist.Categorical
        return family(logits=logits).to_event(self.event_dim)


class Transition(Kernel):
    """Discrete Markov kernel p(z = j | parent = i) = softmax(logits[i])_j, from a learnable table.

    One integer-valued variable a datum (event_dim 0). With ``num_parents=None`` it is an initial
    distribution: one row.

    Args:
        num_states: number of states J of this site.
        num_parents: number of states I of the parent, or ``None``.
        probs: starting table (I, J) or (J,), each row a distribution; default uniform, up to noise of sd 0.1 in the
            logits. A probability of zero stays zero in training.
        enumerate: mark the site for parallel enumeration: the sum over its states is then exact, as in the
            forward algorithm. Leave it off for the observation.
        learn: whether the table is a parameter or a constant.

    Raises:
        ValueError: for ``probs`` of another shape, or with a row that is no distribution.

    Example:
        >>> Transition(2, 3)(torch.tensor([0, 2, 1, 1])).probs.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        num_states: int,
        num_parents: int | None = None,
        *,
        probs: Tensor | None = None,
        enumerate: bool = False,
        learn: bool = True,
    ) -> None:
        super().__init__(None, 0)
        shape = (num_states,) if num_parents is None else (num_parents, num_states)
        for name, count in zip(("num_states", "num_parents"), reversed(shape)):
            check_count(name, count)
        check_switch("enumerate", enumerate)
        check_switch("learn", learn)
        if probs is not None and not isinstance(probs, Tensor):
            raise ValueError(f"probs must be a tensor, got {probs!r}.")
        if probs is None:
            logits = 0.1 * torch.randn(shape)
        elif probs.shape != shape:
            raise ValueError(f"probs must have shape {shape}, got {tuple(probs.shape)}.")
        else:
            _check_rows(probs)
            logits = probs.detach().log()
        self.num_states, self.num_parents = num_states, num_parents
        if learn:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        if enumerate:
            self.infer = {"enumerate": "parallel"}

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        logits = self.logits
        if self.num_parents is not None:
            if parent is None:
                raise ValueError(
                    "Transition with num_parents can't start a chain: it needs a parent. Start with "
                    "Transition(num_states)."
                )
            logits = Vindex(logits)[parent.long()]
        return dist.Categorical(logits=logits)

    def extra_repr(self) -> str:
        return f"{self.num_states}" if self.num_parents is None else f"{self.num_states}, {self.num_parents}"


def _check_rows(probs: Tensor) -> None:
    """Refuse a table with a row that is no distribution, naming the first."""
    bad = ~(torch.isfinite(probs).all(-1) & (probs >= 0).all(-1) & ((probs.sum(-1) - 1).abs() < 1e-3))
    if bool(bad.any()):
        row = probs.reshape(-1, probs.shape[-1])[int(bad.reshape(-1).nonzero()[0])]
        raise ValueError(
            f"every row of probs must hold probabilities that sum to one; got {row.tolist()}. Divide each row by "
            "its sum."
        )


class DiscretizedLogistic(Kernel):
    r"""Independent grey levels: logistic bin masses with (a, r) = net(parent).

    .. math:: \mu = mid + \tfrac12 (high - low)\, a,\qquad \log s = r + \log\frac{high - low}{8}

    so that a network near zero starts in the middle of the range with bins of every level likely.

    Args:
        net: network to a and r side by side along the first event dim.
        event_dim: dims of one event, >= 1.
        num_bins: number of levels.
        low: first level, in the units of x.
        high: last level.

    Example:
        >>> DiscretizedLogistic(nn.Linear(2, 2 * 4))(torch.zeros(3, 2)).event_shape
        torch.Size([4])
    """

    def __init__(
        self, net: nn.Module, event_dim: int = 1, *, num_bins: int = 256, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__(net, event_dim)
        if event_dim < 1:
            raise ValueError("DiscretizedLogistic needs event_dim >= 1: its parameters split the first event dim.")
        distributions.DiscretizedLogistic(0.0, 0.0, num_bins, low, high)  # raises for impossible levels
        self.num_bins, self.low, self.high = num_bins, low, high

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        raw_loc, raw_scale = halves(self, self.parameters_of(parent, context))
        span = self.high - self.low
        loc = 0.5 * (self.low + self.high) + 0.5 * span * raw_loc
        log_scale = raw_scale + math.log(span / 8)
        levels = distributions.DiscretizedLogistic(loc, log_scale, self.num_bins, self.low, self.high)
        return levels.to_event(self.event_dim)

    def extra_repr(self) -> str:
        return f"event_dim={self.event_dim}, num_bins={self.num_bins}, low={self.low:g}, high={self.high:g}"


class Poisson(Kernel):
    """Independent Poisson counts with rate softplus(net(parent)) + 1e-6.

    Args:
        net: network to (..., *event_shape).
        event_dim: dims of one event.

    Example:
        >>> Poisson(nn.Linear(2, 4))(torch.zeros(3, 2)).event_shape
        torch.Size([4])
    """

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        rate = F.softplus(self.parameters_of(parent, context)) + 1e-6
        return distributions.Poisson(rate).to_event(self.event_dim)


class NegativeBinomial(Kernel):
    """Independent negative binomial counts: r = softplus(a) + 1e-6 failures, success logits l; (a, l) = net.

    The mean is r exp(l), the variance mean (1 + exp(l)): counts with more spread than :class:`Poisson`
    allows.

    Args:
        net: network to a and l side by side along the first event dim.
        event_dim: dims of one event, >= 1.

    Example:
        >>> NegativeBinomial(nn.Linear(2, 2 * 4))(torch.zeros(3, 2)).event_shape
        torch.Size([4])
    """

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__(net, event_dim)
        if event_dim < 1:
            raise ValueError(
                "NegativeBinomial needs event_dim >= 1: its two parameters are the halves of the first event dim."
            )

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        raw, logits = halves(self, self.parameters_of(parent, context))
        return distributions.NegativeBinomial(F.softplus(raw) + 1e-6, logits=logits).to_event(self.event_dim)
