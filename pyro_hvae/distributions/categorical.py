"""Categories of which some have probability zero."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["Categorical"]


class Categorical(dist.Categorical):
    """Pyro's, with a divergence that takes probabilities of zero without indexing by a mask, so that it compiles.

    Example:
        >>> p, q = Categorical(probs=torch.tensor([0.5, 0.5])), Categorical(logits=torch.tensor([0.0, -torch.inf]))
        >>> torch.distributions.kl_divergence(q, p), torch.distributions.kl_divergence(p, q)
        (tensor(0.6931), tensor(inf))
    """


@register_kl(Categorical, Categorical)
def _kl_categorical_categorical(q: Categorical, p: Categorical) -> Tensor:
    possible = q.logits > -torch.inf
    log_q = torch.where(possible, q.logits, 0.0)
    log_p = torch.where(possible, p.logits, 0.0)
    return torch.where(possible, log_q.exp() * (log_q - log_p), 0.0).sum(-1)
