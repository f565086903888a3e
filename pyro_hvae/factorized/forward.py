r"""The product closest to a posterior by KL(p||q): its marginals (seed eq. 18-26).

.. math:: \min_q \mathrm{KL}\Bigl(p(z|x)\,\Big\|\,\prod_b q_b(z_b)\Bigr)
          = \underbrace{\mathrm{KL}\Bigl(p\,\Big\|\,\prod_b p(z_b|x)\Bigr)}_{\text{total correlation}}
          + \sum_b \min_{q_b} \mathrm{KL}\bigl(p(z_b|x)\,\|\,q_b\bigr)

The first part does not depend on q.  The second is zero where each factor can be the marginal.  For an exponential
family it is least where the expectations of the sufficient statistics are those of the posterior.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.factorized.draws import log_density, prepare
from pyro_hvae.factorized.exact import check_num_samples, exact_posterior
from pyro_hvae.factorized.families import Bernoulli, Categorical
from pyro_hvae.factorized.gaussian import Gaussian, gaussian_kl
from pyro_hvae.factorized.guide import ProductGuide
from pyro_hvae.factorized.match import match
from pyro_hvae.factorized.posterior import Weighted
from pyro_hvae.factorized.sites import latents_of
from pyro_hvae.factorized.tables import Configurations, eliminated
from pyro_hvae.problem import Problem, of_model
from pyro_hvae.problem.isolation import unchanged
from pyro_hvae.weights import good_khat

__all__ = ["divergence_from", "forward_kl", "total_correlation"]

Program = Callable[..., Any]


@of_model
def forward_kl(
    problem: Problem,
    *,
    proposal: Program | None = None,
    families: Mapping[str, Any] | None = None,
    blocks: Sequence[Sequence[str]] = (),
    num_samples: int = 10_000,
) -> ProductGuide:
    r"""Fit the product of factors that minimises KL(p(z|x)||q(z)): the posterior's marginals.

    Exact where every latent is discrete, by enumeration or, with many of them, variable elimination; and for
    linear-Gaussian models, in which every site that depends on a latent is Normal, with a mean that is affine in the
    latents by its operations, and a covariance that does not depend on them.  Elsewhere draws of ``proposal`` are
    weighted (with smoothed weights), and each factor is matched to them: by expectations of its sufficient statistics
    where it is an exponential family, else by gradient.

    Args:
        problem: a Pyro program with its data, ``forward_kl(model, *args, **kwargs)``, or a bound problem.
        proposal: a guide to draw from; by default the guide of the problem if it has one, else the prior.  The result
            may serve as the proposal of a second call.
        families: factor by site: a name, or a callable that returns a module whose ``forward()`` returns a
            distribution of the site's batch and event shape.  By default the support decides: Normal, LogNormal, Beta,
            Dirichlet, Bernoulli, Categorical or Poisson (:data:`pyro_hvae.factorized.FAMILIES`).
        blocks: groups of sites that are kept joint, such as ``[("z1", "z2")]``; a block of one site keeps the elements
            of its event joint.
        num_samples: K >= 100 weighted draws.

    Returns:
        :class:`ProductGuide`, a guide for these arguments, with ``khat`` and ``ess`` of the weights behind it.

    Raises:
        ValueError: for a model without latents, a minibatch that is drawn at random, an improper posterior, unknown
            sites or families, a family with another support than its site's, a support that depends on other
            draws, weights that are NaN, infinite or all zero, or parameters that would be NaN or infinite.

    Warns:
        UserWarning: where k-hat is too high for the weighted draws to be reliable.

    Reference:
        Divergence Measures and Message Passing (Minka, 2005).

    Example:
        >>> from pyro_hvae.conjugate import two_causes
        >>> guide = forward_kl(two_causes, torch.tensor(3.0))
        >>> q = guide.distribution("a")
        >>> q.mean.round(decimals=4), q.variance.round(decimals=4)  # the marginal: 1 - 1/3
        (tensor(1.), tensor(0.6667))
    """
    check_num_samples(num_samples)
    problem = prepare(problem, proposal)
    with unchanged(problem.model, problem.guide):
        latents = latents_of(problem)
        guide = ProductGuide(latents, families, blocks, name="forward_kl")
        exact = exact_posterior(problem, latents)
        if exact is None and set_tables(guide, problem):
            return guide
        posterior = Weighted([problem], latents, num_samples) if exact is None else exact
        match(guide, posterior, num_samples)
    worst = float(posterior.khat.max())
    good = good_khat(num_samples)
    if worst > good:
        warnings.warn(
            f"k-hat of the weights is {worst:.2f}, above {good:.2f} for {int((posterior.khat > good).sum())} of "
            f"{posterior.khat.numel()} data: the proposal is too far from the posterior for the matched moments to be "
            "trusted. Give a better proposal, such as the result of this call or a trained guide",
            stacklevel=3,
        )
    return guide


@of_model
def total_correlation(problem: Problem, *, blocks: Sequence[Sequence[str]] = ()) -> Tensor:
    r"""Compute the total correlation :math:`\mathrm{KL}(p\,\|\,\prod_b p_b) = \sum_b H(p_b) - H(p)`, in nats.

    Args:
        problem: a Pyro program with its data, ``total_correlation(model, *args, **kwargs)``, or a bound problem.
        blocks: groups of sites that are kept joint.

    Returns:
        Tensor of the shape of the plates common to all sites.

    Raises:
        ValueError: where the posterior is neither Gaussian nor a table of few configurations: its entropy is
            unknown there, and :func:`compare_guides` gives KL(p||q) of a fitted product, which is at least the total
            correlation.

    Reference:
        Information Theoretical Analysis of Multivariate Correlation (Watanabe, 1960).

    Example:
        >>> from pyro_hvae.conjugate import two_causes
        >>> total_correlation(two_causes, torch.tensor(3.0))  # -log(1 - 1/4)/2, as the correlation is -1/2
        tensor(0.1438)
    """
    problem = prepare(problem)
    with unchanged(problem.model, problem.guide):
        latents = latents_of(problem)
        guide = ProductGuide(latents, None, blocks)
        posterior = exact_posterior(problem, latents)
        if posterior is None:
            raise ValueError(
                "the total correlation has a closed form for posteriors of linear-Gaussian models, and for tables of "
                "few configurations; for others compare_guides(model, ...) gives KL(p||q) of the fitted product, which "
                "is at least the total correlation"
            )
        match(guide, posterior, 100)
        return divergence_from(posterior, guide)


def set_tables(guide: ProductGuide, problem: Problem) -> bool:
    """Set all factors to marginal tables by variable elimination; return whether it succeeded."""
    latents = guide.latents
    factors = {name: guide.factor(name) for name in latents.sites}
    if not all(isinstance(factor, (Bernoulli, Categorical)) for factor in factors.values()):
        return False
    tables = eliminated(problem, latents)
    if tables is None:
        return False
    for name, factor in factors.items():
        factor.from_tables(tables[name])
    guide.khat = latents.like.new_full(latents.data_shape, -torch.inf)
    guide.how = "marginals by variable elimination"
    return True


def divergence_from(posterior: Configurations | Gaussian, guide: ProductGuide) -> Tensor:
    """Return KL(p||q) of an exact posterior and the product of its marginals."""
    if isinstance(posterior, Gaussian):
        moments = guide.gaussian()
        assert moments is not None
        return gaussian_kl(posterior.mean, posterior.covariance, *moments)
    with torch.no_grad():
        log_q = log_density(posterior.problem.with_guide(guide), posterior.latents, posterior.values)
    terms = posterior.log_weights.exp() * (posterior.log_weights - log_q)
    return torch.where(posterior.log_weights == -torch.inf, 0.0, terms).sum(0)
