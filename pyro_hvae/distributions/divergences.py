"""Kullback-Leibler divergences that torch and Pyro have in the other direction only; importing this registers them."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, register_kl

__all__: list[str] = []


@register_kl(MultivariateNormal, Independent)
def _kl_full_diagonal(p: MultivariateNormal, q: Independent) -> Tensor:
    """Return KL(N(m, P) || N(l, diag(s^2))), nats (...)."""
    base = q.base_dist
    if not isinstance(base, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    scaled = p.scale_tril / base.scale.unsqueeze(-1)
    square = (scaled**2).sum((-2, -1)) + (((p.loc - base.loc) / base.scale) ** 2).sum(-1)
    volume = base.scale.log().sum(-1) - p.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (square - p.event_shape[0]) + volume
