r"""The product closest to a posterior by KL(p||q): its marginals (seed eq. 18-26).

.. math:: \min_q \mathrm{KL}\Bigl(p(z|x)\,\Big\|\,\prod_b q_b(z_b)\Bigr)
          = \underbrace{\mathrm{KL}\Bigl(p\,\Big\|\,\prod_b p(z_b|x)\Bigr)}_{\text{total correlation}}
          + \sum_b \min_{q_b} \mathrm{KL}\bigl(p(z_b|x)\,\|\,q_b\bigr)

The first part is what any product loses.  The second is zero where a factor can be the marginal, and is otherwise
least, for an exponential family, where the expectations of its sufficient statistics are those of the posterior.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.factorized.families import Bernoulli, Categorical, Family, fit_by_gradient
from pyro_hvae.factorized.guide import GaussianGiven, ProductGuide, TableGiven
from pyro_hvae.factorized.posterior import (
    Configurations,
    Gaussian,
    Joint,
    Posterior,
    Weighted,
    elements_of,
    exactly,
)
from pyro_hvae.factorized.sites import Latents, support_of
from pyro_hvae.factorized.tables import eliminated
from pyro_hvae.psis import good_khat

__all__ = ["forward_kl", "match", "total_correlation"]

Program = Callable[..., Any]


def forward_kl(
    model: Program,
    *args: Any,
    proposal: Program | None = None,
    families: Mapping[str, Any] | None = None,
    blocks: Sequence[Sequence[str]] = (),
    num_samples: int = 10_000,
    **kwargs: Any,
) -> ProductGuide:
    r"""The product of factors that minimises KL(p(z|x)||q(z)): the posterior's marginals.

    Exact where every latent is discrete, by enumeration or, with many of them, variable elimination; and where the
    posterior is Gaussian.  Elsewhere draws of ``proposal`` are weighted (with smoothed weights), and each factor is
    matched to them: by expectations of its sufficient statistics where it is an exponential family, else by gradient.

    Args:
        model: a Pyro program, called with ``args`` and ``kwargs``.
        proposal: a guide to draw from; by default the prior.  The result may serve as the proposal of a second call.
        families: factor by site: a name, or a callable that returns a module whose ``forward()`` returns a
            distribution of the site's batch and event shape.  By default the support decides: Normal, LogNormal, Beta,
            Dirichlet, Bernoulli, Categorical or Poisson (:data:`pyro_hvae.factorized.FAMILIES`).
        blocks: groups of sites that are kept joint, such as ``[("z1", "z2")]``; a block of one site keeps the elements
            of its event joint.
        num_samples: K >= 100 weighted draws.

    Returns:
        :class:`ProductGuide`, a guide for these arguments, with ``khat`` and ``ess`` of the weights behind it.

    Raises:
        ValueError: for a model without latents, an improper posterior, unknown sites or families, a family that does
            not live on its site's support, or weights that are NaN, infinite or all zero.

    Warns:
        UserWarning: where k-hat says that the weighted draws are not to be trusted.

    Reference:
        Divergence Measures and Message Passing (Minka, 2005).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
        >>> guide = forward_kl(model, torch.tensor(3.0))
        >>> q = guide.distribution("a")
        >>> q.mean.round(decimals=4), q.variance.round(decimals=4)  # the marginal: 1 - 1/3
        (tensor(1.), tensor(0.6667))
    """
    joint, posterior = exactly(model, args, kwargs, proposal, num_samples)
    guide = ProductGuide(joint.latents, families, blocks, name="forward_kl")
    if posterior is None and set_tables(guide, joint):
        return guide
    if posterior is None:
        posterior = Weighted(joint, [joint.base], num_samples)
    match(guide, posterior, num_samples)
    worst = float(posterior.khat.max())
    good = good_khat(num_samples)
    if worst > good:
        warnings.warn(
            f"k-hat of the weights is {worst:.2f}, above {good:.2f} for {int((posterior.khat > good).sum())} of "
            f"{posterior.khat.numel()} data: the proposal is too far from the posterior for the matched moments to be "
            "trusted. Give a better proposal, such as the result of this call or a trained guide",
            stacklevel=2,
        )
    return guide


def total_correlation(model: Program, *args: Any, blocks: Sequence[Sequence[str]] = (), **kwargs: Any) -> Tensor:
    r"""What any product loses: :math:`\mathrm{KL}(p\,\|\,\prod_b p_b) = \sum_b H(p_b) - H(p)` of a posterior, in nats.

    Args:
        model: a Pyro program, called with ``args`` and ``kwargs``.
        blocks: groups of sites that are kept joint.

    Returns:
        Tensor of the shape of the plates common to all sites.

    Raises:
        ValueError: where the posterior is neither Gaussian nor a table of few configurations: its entropy is not
            known there, and :func:`compare_guides` gives KL(p||q) of a fitted product, which is at least the total
            correlation.

    Reference:
        Information Theoretical Analysis of Multivariate Correlation (Watanabe, 1960).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
        >>> total_correlation(model, torch.tensor(3.0))  # -log(1 - 1/4)/2, as the correlation is -1/2
        tensor(0.1438)
    """
    joint, posterior = exactly(model, args, kwargs, None, 100)
    guide = ProductGuide(joint.latents, None, blocks)
    if not isinstance(posterior, (Configurations, Gaussian)):
        raise ValueError(
            "the total correlation is known for Gaussian posteriors and for tables of few configurations; for others "
            "compare_guides(model, ...) gives KL(p||q) of the fitted product, which is at least the total correlation"
        )
    match(guide, posterior, 100)
    return divergence_from(posterior, guide)


def set_tables(guide: ProductGuide, joint: Joint) -> bool:
    """Set all factors to marginal tables by variable elimination; False where that can't be done."""
    factors = {name: guide.factor(name) for name in guide.latents.sites}
    if not all(isinstance(factor, (Bernoulli, Categorical)) for factor in factors.values()):
        return False
    tables = eliminated(joint)
    if tables is None:
        return False
    for name, factor in factors.items():
        factor.from_tables(tables[name])
    guide.khat = joint.latents.like.new_full(joint.latents.data_shape, -torch.inf)
    guide.how = "marginals by variable elimination"
    return True


def divergence_from(posterior: Configurations | Gaussian, guide: ProductGuide) -> Tensor:
    """KL(p||q) of an exact posterior and a product that is its marginals."""
    if isinstance(posterior, Configurations):
        with torch.no_grad():
            log_q = posterior.joint.density(guide, posterior.values)
        terms = posterior.log_weights.exp() * (posterior.log_weights - log_q)
        return torch.where(posterior.log_weights == -torch.inf, 0.0, terms).sum(0)
    moments = guide.gaussian()
    assert moments is not None
    return gaussian_kl(posterior.mean, posterior.covariance, *moments)


def gaussian_kl(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """KL of two Gaussians, ``(*data, D)`` and ``(*data, D, D)`` to ``(*data)``."""
    factor, other = torch.linalg.cholesky(covariance), torch.linalg.cholesky(other_covariance)
    solved = torch.linalg.solve_triangular(other, factor, upper=False)
    shift = torch.linalg.solve_triangular(other, (mean - other_mean)[..., None], upper=False)
    logs = other.diagonal(dim1=-2, dim2=-1).log().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return logs + 0.5 * ((solved**2).sum((-2, -1)) + (shift**2).sum((-2, -1)) - mean.shape[-1])


def match(guide: ProductGuide, posterior: Posterior, num_samples: int) -> None:
    """Set every factor of a product to what minimises KL(p||q)."""
    guide.khat, guide.ess = posterior.khat, posterior.ess
    guide.how = f"marginals by {posterior.how}"
    if isinstance(posterior, Gaussian) and guide.gaussian() is not None:
        gaussian_blocks(guide, posterior.mean, posterior.covariance)
        return
    values, log_weights, _ = posterior.draws(num_samples)
    weights = log_weights.exp()
    for block in guide.blocks:
        if block[0] in guide.joint:
            match_block(guide, block, values, weights)
            continue
        (name,) = block
        factor, site = guide.factor(name), guide.latents.sites[name]
        if isinstance(factor, Family):
            factor.match(values[name], guide.latents.spread(weights, site))
        else:
            fit_by_gradient(factor, values[name], guide.latents.spread(weights, site, event=False))


def gaussian_blocks(guide: ProductGuide, mean: Tensor, matrix: Tensor, *, inverted: bool = False) -> None:
    """Set each block to the part of a Gaussian over all latents, sites side by side, that belongs to it.

    ``matrix`` is the covariance, whose parts are those of the marginals; or with ``inverted`` the precision, whose
    parts are the precisions of the conditionals.
    """
    where, start = {}, 0
    for name, site in guide.latents.sites.items():
        where[name] = torch.arange(start, start + elements_of(guide.latents, site), device=mean.device)
        start += len(where[name])
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
        known = 0
        for name in block:
            known += len(where[name])
            guide.factor(name).set(mean[..., index[:known]], covariance[..., :known, :known])


def match_block(guide: ProductGuide, block: tuple[str, ...], values: Mapping[str, Tensor], weights: Tensor) -> None:
    """Joint tables or joint moments of a block, from weighted draws."""
    latents = guide.latents
    first = guide.factor(block[0])
    if isinstance(first, TableGiven):
        for position, name in enumerate(block):
            guide.factor(name).set(joint_table(latents, block[: position + 1], values, weights))
        return
    assert isinstance(first, GaussianGiven)
    parts = []
    for name in block:
        site = latents.sites[name]
        free = site.to_support.inv(values[name])
        parts.append(free.reshape(len(free), *latents.data_shape, -1))
    flat = torch.cat(parts, -1)
    weights = weights[..., None]
    mean = (weights * flat).sum(0)
    centred = (flat - mean) * weights.sqrt()
    covariance = torch.einsum("k...i,k...j->...ij", centred, centred)
    known = 0
    for part, name in zip(parts, block):
        known += part.shape[-1]
        guide.factor(name).set(mean[..., :known], covariance[..., :known, :known])


def joint_table(latents: Latents, names: Sequence[str], values: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Probabilities ``(*data, V)`` of the joint values of sites with one element a datum."""
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
