r"""Mean field on tables, by coordinate ascent over the listed configurations.

With all other factors held, the best one is :math:`\log q_b(z_b) = \mathrm E_{q_{-b}}[\log p(x, z)] + \text{const}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_hvae.factorized.families import Bernoulli, Categorical
from pyro_hvae.factorized.guide import ConditionalTable, ProductGuide
from pyro_hvae.factorized.match import match_weighted
from pyro_hvae.factorized.tables import Configurations

__all__ = ["ascend", "coordinate_ascent", "is_tabular"]


def is_tabular(guide: ProductGuide) -> bool:
    """Whether every factor is a table."""
    return all(isinstance(guide.factor(name), (Bernoulli, Categorical, ConditionalTable)) for name in guide.keys)


def ascend(guide: ProductGuide, posterior: Configurations, start: Mapping[str, Tensor]) -> None:
    """Run coordinate ascent from several starts; set the factors to the best result for each datum."""
    latents = guide.latents
    groups = groups_of(guide, posterior)
    log_joint = posterior.log_joint.clamp(min=-1e6)  # finite, since 0 times -inf is NaN
    data = log_joint.reshape(len(log_joint), -1)
    shape = [len(codes.unique()) for codes in groups]

    def tables(weights: Tensor) -> list[Tensor]:
        """Sum weights of the configurations ``(K, N)`` into one table per group ``(V, N)``."""
        return [weights.new_zeros(v, weights.shape[1]).index_add_(0, c, weights) for v, c in zip(shape, groups)]

    uniform = torch.full_like(data, 1 / len(data))
    starts = [posterior.log_weights.exp().reshape(data.shape), uniform]
    likeliest = data.topk(min(8, len(data)), 0).indices
    starts += [0.1 * uniform + 0.9 * (torch.arange(len(data))[:, None].to(top) == top) for top in likeliest]
    if start:
        agree = torch.ones_like(data)
        for name, value in start.items():
            same = latents.flatten(posterior.values[name], latents.sites[name]) == latents.flatten(
                value[None], latents.sites[name]
            )
            agree = agree * same.all(-1).reshape(data.shape)
        starts = [0.1 * uniform + 0.9 * agree / agree.sum(0)]
    best, weights = torch.full_like(data[0], -torch.inf), uniform
    for first in starts:
        elbo, q = coordinate_ascent(data, tables(first), groups)
        better = elbo > best + 1e-12
        best = torch.where(better, elbo, best)
        weights = torch.where(better, q, weights)
    weights = weights.reshape(posterior.log_joint.shape)
    match_weighted(guide, posterior.values, weights)


def groups_of(guide: ProductGuide, posterior: Configurations) -> list[Tensor]:
    """Return for each factor the index of its value in each configuration, ``(K,)``."""
    where = guide.latents.places()
    groups = []
    for block in guide.blocks:
        if block[0] not in guide.joint:
            groups += [posterior.index[:, column] for column in where[block[0]]]
            continue
        code = torch.zeros_like(posterior.index[:, 0])
        for name in block:
            (column,) = where[name]
            code = code * posterior.sizes[column] + posterior.index[:, column]
        groups.append(code)
    return groups


def coordinate_ascent(
    log_joint: Tensor, tables: list[Tensor], groups: list[Tensor], max_sweeps: int = 2000
) -> tuple[Tensor, Tensor]:
    """Update the factors in turn until they converge; return the ELBO ``(N,)`` and q ``(K, N)``."""
    floor = torch.finfo(log_joint.dtype).tiny
    logs = [(table / table.sum(0)).clamp(min=floor).log() for table in tables]
    log_q = torch.stack([log[codes] for log, codes in zip(logs, groups)]).sum(0)
    for _ in range(max_sweeps):
        moved = 0.0
        for place, codes in enumerate(groups):
            others = (log_q - logs[place][codes]).exp()
            mean = torch.zeros_like(logs[place]).index_add_(0, codes, others * log_joint)
            new = mean.log_softmax(0).clamp(min=math.log(floor))
            moved = max(moved, float((new.exp() - logs[place].exp()).abs().max()))
            log_q = log_q + (new - logs[place])[codes]
            logs[place] = new
        if moved < 1e-13 or (log_joint.dtype != torch.float64 and moved < 1e-6):
            break
        log_q = torch.stack([log[codes] for log, codes in zip(logs, groups)]).sum(0)
    q = log_q.exp()
    return (q * (log_joint - log_q)).sum(0), q
