"""Kernels over ordered categories, and over counts with more zeros than their family has."""

from __future__ import annotations

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae import distributions
from pyro_hvae.kernels.base import Kernel, pieces

__all__ = ["Ordinal", "ZeroInflated"]


class Ordinal(Kernel):
    r"""Independent ordered categories by the cumulative logit: one location a variable, and cutpoints in common.

    .. math:: P(x \le k) = \mathrm{logistic}(c_{k+1} - \eta),\quad \eta = \mathrm{net}(parent),\qquad
        c_1 < \dots < c_{C-1} \text{ learned for each variable}

    The cutpoints start where all categories have one probability at :math:`\eta = 0`.  Values are 0., 1., ..., C - 1.

    Args:
        net: network to the locations (..., d).
        num_categories: C >= 2.
        num_variables: d >= 1.

    Raises:
        ValueError: for ``num_categories < 2`` or ``num_variables < 1``.

    Reference: Regression models for ordinal data (McCullagh, 1980).

    Example:
        >>> Ordinal(nn.Linear(2, 1, bias=False), 4)(torch.zeros(3, 2)).base_dist.probs[0]
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]], grad_fn=<SelectBackward0>)
    """

    def __init__(self, net: nn.Module, num_categories: int, num_variables: int = 1) -> None:
        super().__init__(net, 1)
        if num_categories < 2 or num_variables < 1:
            raise ValueError(
                f"Ordinal needs num_categories >= 2 and num_variables >= 1, got {num_categories} and {num_variables}."
            )
        self.num_categories = num_categories
        start = torch.logit(torch.arange(1, num_categories) / num_categories)
        self.first = nn.Parameter(start[:1].expand(num_variables, 1).clone())
        # the distances of neighbouring cutpoints are softplus of these
        self.raw_distances = nn.Parameter(start.diff().expm1().log().expand(num_variables, -1).clone())

    @property
    def cutpoints(self) -> Tensor:
        """c (d, C - 1), increasing."""
        return torch.cat([self.first, F.softplus(self.raw_distances)], -1).cumsum(-1)

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        location = self.parameters_of(parent, context).unsqueeze(-1)
        cutpoints = self.cutpoints
        below, above = F.logsigmoid(cutpoints - location), F.logsigmoid(location - cutpoints)
        # logistic(b) - logistic(a) = logistic(b) logistic(-a) (1 - exp(a - b)), without cancellation
        inner = below[..., 1:] + above[..., :-1] + torch.log(-torch.expm1(-cutpoints.diff()))
        return dist.Categorical(logits=torch.cat([below[..., :1], inner, above[..., -1:]], -1)).to_event(1)

    def extra_repr(self) -> str:
        return f"num_categories={self.num_categories}"


class ZeroInflated(Kernel):
    r"""Independent counts that are zero with a probability of their own, and otherwise of a family of counts.

    .. math:: p(x) = \pi\, [x = 0] + (1 - \pi)\, p_{counts}(x),\qquad \pi = \mathrm{logistic}(g)

    Args:
        net: network to the parameters of the counts (see :class:`Poisson`, :class:`NegativeBinomial`), then g - 2, side
            by side along the first event dim; :math:`\pi` is .12 where the network yields 0.
        counts: ``"poisson"`` (2 parameters a variable in all) or ``"negative_binomial"`` (3).
        event_dim: dims of one event, >= 1.

    Raises:
        ValueError: for another name, or ``event_dim < 1``.

    Reference: Zero-inflated Poisson regression (Lambert, 1992).

    Example:
        >>> ZeroInflated(nn.Linear(2, 2 * 4))(torch.zeros(3, 2)).event_shape
        torch.Size([4])
    """

    def __init__(self, net: nn.Module, counts: str = "poisson", event_dim: int = 1) -> None:
        super().__init__(net, event_dim)
        if counts not in ("poisson", "negative_binomial"):
            raise ValueError(f"counts must be 'poisson' or 'negative_binomial', got {counts!r}.")
        if event_dim < 1:
            raise ValueError(
                "ZeroInflated needs event_dim >= 1: its parameters lie side by side along the first event dim."
            )
        self.counts = counts

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        parameters = self.parameters_of(parent, context)
        counts: TorchDistribution
        if self.counts == "poisson":
            raw, gate = pieces(self, parameters, 2)
            counts = distributions.Poisson(F.softplus(raw) + 1e-6)
        else:
            raw, logits, gate = pieces(self, parameters, 3)
            counts = distributions.NegativeBinomial(F.softplus(raw) + 1e-6, logits=logits)
        return dist.ZeroInflatedDistribution(counts, gate_logits=gate - 2.0).to_event(self.event_dim)

    def extra_repr(self) -> str:
        return f"counts={self.counts!r}, event_dim={self.event_dim}"
