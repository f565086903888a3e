"""Match the factors of a product to a posterior: to parts of a Gaussian, or to moments and tables of weighted draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.factorized.families import Family, expectation, fit_by_gradient
from pyro_hvae.factorized.gaussian import Gaussian
from pyro_hvae.factorized.guide import ConditionalGaussian, ConditionalTable, ProductGuide
from pyro_hvae.factorized.posterior import Posterior
from pyro_hvae.factorized.sites import Latents, support_of

__all__ = ["match", "match_gaussian", "match_weighted"]


def match(guide: ProductGuide, posterior: Posterior, num_samples: int) -> None:
    """Set every factor of a product to the minimum of KL(p||q).

    Raises:
        ValueError: for parameters that would be NaN or infinite.
    """
    guide.khat, guide.ess = posterior.khat, posterior.ess
    guide.how = f"marginals by {posterior.how}"
    if isinstance(posterior, Gaussian) and guide.gaussian() is not None:
        match_gaussian(guide, posterior.mean, posterior.covariance)
        return
    sample = posterior.sample(num_samples)
    match_weighted(guide, sample.values, sample.log_weights.exp())
    for block in guide.blocks:
        factor, site = guide.factor(block[0]), guide.latents.sites[block[0]]
        if not (block[0] in guide.joint or isinstance(factor, Family)):
            weights = guide.latents.spread(sample.log_weights.exp(), site, event=False)
            fit_by_gradient(factor, sample.values[site.name], weights)
    _check_finite(guide)


def match_weighted(guide: ProductGuide, values: Mapping[str, Tensor], weights: Tensor) -> None:
    """Set blocks and factors of :data:`FAMILIES` to the moments and tables of weighted draws.

    Args:
        guide: the product; factors that are other modules stay unchanged.
        values: by site, ``(K, *site.shape)``.
        weights: normalised along dim 0, ``(K, *data)``.
    """
    for block in guide.blocks:
        if block[0] in guide.joint:
            match_block(guide, block, values, weights)
        elif isinstance(factor := guide.factor(block[0]), Family):
            factor.match(values[block[0]], guide.latents.spread(weights, guide.latents.sites[block[0]]))


def _check_finite(guide: ProductGuide) -> None:
    for name in guide.latents.sites:
        for value in guide.factor(name).parameters():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{int((~torch.isfinite(value)).sum())} of {value.numel()} parameters of the factor of site "
                    f"'{name}' would be NaN or infinite: draws with a positive weight lie on the boundary of its "
                    "support, or have no finite moments. Use float64, a better proposal, or another family"
                )


def match_gaussian(guide: ProductGuide, mean: Tensor, matrix: Tensor, *, inverted: bool = False) -> None:
    """Set each block to its part of a Gaussian over all latents, sites concatenated.

    ``matrix`` is the covariance, whose blocks are the marginals' covariances; or with ``inverted`` the precision, whose
    blocks are the conditionals' precisions.
    """
    places = guide.latents.places()
    where = {name: torch.arange(place.start, place.stop, device=mean.device) for name, place in places.items()}
    for block in guide.blocks:
        if block[0] not in guide.joint:
            index, site = where[block[0]], guide.latents.sites[block[0]]
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)[..., index].log()
            guide.factor(block[0]).set(
                guide.latents.unflatten(mean[..., index][None], site)[0],
                guide.latents.unflatten((-0.5 if inverted else 0.5) * diagonal[None], site)[0],
            )
            continue
        index = torch.cat([where[name] for name in block])
        part = matrix[..., index, :][..., :, index]
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(part)) if inverted else part
        size = 0
        for name in block:
            size += len(where[name])
            guide.factor(name).set(mean[..., index[:size]], covariance[..., :size, :size])


def match_block(guide: ProductGuide, block: tuple[str, ...], values: Mapping[str, Tensor], weights: Tensor) -> None:
    """Set a block to the joint tables or joint moments of weighted draws."""
    latents = guide.latents
    first = guide.factor(block[0])
    if isinstance(first, ConditionalTable):
        for position, name in enumerate(block):
            guide.factor(name).set(joint_table(latents, block[: position + 1], values, weights))
        return
    assert isinstance(first, ConditionalGaussian)
    parts = []
    for name in block:
        site = latents.sites[name]
        free = site.to_support.inv(values[name])
        parts.append(free.reshape(len(free), *latents.data_shape, -1))
    flat = torch.cat(parts, -1)
    weights = weights[..., None]
    mean = expectation(weights, flat)
    centred = torch.where(weights > 0, (flat - mean) * weights.sqrt(), 0.0)
    covariance = torch.einsum("k...i,k...j->...ij", centred, centred)
    size = 0
    for part, name in zip(parts, block, strict=True):
        size += part.shape[-1]
        guide.factor(name).set(mean[..., :size], covariance[..., :size, :size])


def joint_table(latents: Latents, names: Sequence[str], values: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Return probabilities ``(*data, V)`` of the joint values of sites with one element per datum."""
    index: Any = 0
    count = 1
    for name in names:
        support = support_of(latents.sites[name])
        assert support is not None
        flat = latents.flatten(values[name], latents.sites[name])[..., 0]
        index = index * len(support) + (flat[..., None] == support.to(flat)).long().argmax(-1)
        count *= len(support)
    table = weights.new_zeros(count, *weights.shape[1:])
    table.scatter_add_(0, index, weights)
    return table.movedim(0, -1)
