r"""The product closest to a posterior by KL(q||p): mean-field variational inference.

.. math:: \min_q \mathrm{KL}\Bigl(\prod_b q_b(z_b)\,\Big\|\,p(z|x)\Bigr) = \log p(x) - \max_q \mathrm{ELBO}(q)

With all other factors held, the best one is :math:`\log q_b(z_b) = \mathrm E_{q_{-b}}[\log p(x, z)] + \text{const}`.
Where that has a closed form, updating the factors in turn is coordinate ascent:

- *Gaussian*: the fixed point has a closed form.  Means are the posterior's, and block b has precision
  :math:`\Lambda_{bb}`, that of the conditional, so it is too narrow where blocks are correlated.
- *tables*: each update sums over the listed configurations.  There may be several local optima: the ascent starts
  from the marginals, from uniform tables and from each of the likeliest configurations, and the best result is kept.

Elsewhere the ELBO is maximised by stochastic gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count, check_number
from pyro_hvae.bounds import TraceELBO
from pyro_hvae.factorized.ascent import ascend, is_tabular
from pyro_hvae.factorized.draws import draw, prepare, with_prior
from pyro_hvae.factorized.exact import exact_posterior
from pyro_hvae.factorized.gaussian import Gaussian
from pyro_hvae.factorized.guide import ProductGuide
from pyro_hvae.factorized.match import match_gaussian, match_weighted
from pyro_hvae.factorized.sites import Latents, latents_of
from pyro_hvae.factorized.tables import Configurations
from pyro_hvae.problem import Problem, of_model
from pyro_hvae.problem.isolation import unchanged

__all__ = ["reverse_kl"]

_DRAWS = 16  # a step


class Adam(NamedTuple):
    """Settings of the stochastic gradients."""

    num_steps: int
    learning_rate: float

    def check(self) -> None:
        check_count("num_steps", self.num_steps)
        check_number("learning_rate", self.learning_rate, 0.0, ends="()")


@of_model
def reverse_kl(
    problem: Problem,
    *,
    families: Mapping[str, Any] | None = None,
    blocks: Sequence[Sequence[str]] = (),
    start: Mapping[str, Tensor] | None = None,
    num_steps: int = 1500,
    learning_rate: float = 0.05,
) -> ProductGuide:
    r"""Fit the product of factors that minimises KL(q(z)||p(z|x)), which has the largest ELBO.

    A closed form for Gaussian posteriors, coordinate ascent for tables of few configurations, and otherwise stochastic
    gradients of the ELBO (Adam, whose rate falls along a cosine): a local optimum in the last two.

    Args:
        problem: a Pyro program with its data, ``reverse_kl(model, *args, **kwargs)``, or a bound problem, whose guide
            is not used.
        families, blocks: as for :func:`forward_kl`.
        start: a value by site at which the search starts; by default tables use several starts, and gradients start at
            the prior's medians.
        num_steps, learning_rate: of the stochastic gradients, with 16 draws a step.

    Returns:
        :class:`ProductGuide`, a guide for these arguments.

    Raises:
        ValueError: for a model without latents, a minibatch that is drawn at random, an improper posterior, unknown
            sites or families, a support that depends on other draws, a ``start`` outside of a site's support, counts
            below one, or an ELBO that becomes NaN or infinite.

    Reference:
        An Introduction to Variational Methods for Graphical Models (Jordan, Ghahramani, Jaakkola and Saul, 1999);
        Automatic Differentiation Variational Inference (Kucukelbir et al., 2017).

    Example:
        >>> from pyro_hvae.conjugate import two_causes
        >>> q = reverse_kl(two_causes, torch.tensor(3.0)).distribution("a")
        >>> q.mean.round(decimals=4), q.variance.round(decimals=4)  # 1/(1 + 1); the marginal's is 2/3
        (tensor(1.), tensor(0.5000))
    """
    adam = Adam(num_steps, learning_rate)
    adam.check()
    problem = with_prior(prepare(problem))
    with unchanged(problem.model):
        latents = latents_of(problem)
        start = checked_start(latents, start)
        guide = ProductGuide(latents, families, blocks, name="reverse_kl")
        posterior = exact_posterior(problem, latents)
        if isinstance(posterior, Gaussian) and guide.gaussian() is not None:
            match_gaussian(guide, posterior.mean, posterior.precision, inverted=True)
            guide.how = "coordinate ascent on a Gaussian"
        elif isinstance(posterior, Configurations) and is_tabular(guide):
            ascend(guide, posterior, start)
            guide.how = "coordinate ascent on tables"
        else:
            initialise(guide, problem, start)
            train(guide, problem, adam)
            guide.how = "gradients of the ELBO"
    return guide


def checked_start(latents: Latents, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Check the values of a start, and expand them to the shapes of their sites."""
    checked = {}
    if start is not None and not isinstance(start, Mapping):
        raise TypeError(f"start must be a mapping from sites to tensors, got {start!r}")
    for name, value in (start or {}).items():
        if name not in latents.sites:
            raise ValueError(f"start names '{name}', which is no latent site; there are {list(latents.sites)}")
        site = latents.sites[name]
        if not isinstance(value, (Tensor, int, float)):
            raise TypeError(f"start of site '{name}' must be a tensor or a number, got {value!r}")
        value = torch.as_tensor(value).to(latents.like.device)
        try:
            value = value.expand(site.shape)
        except RuntimeError:
            raise ValueError(
                f"start of site '{name}' has shape {tuple(value.shape)}, which does not broadcast to its "
                f"{tuple(site.shape)}"
            ) from None
        if not bool(site.support.check(value).all()):
            raise ValueError(f"start of site '{name}' lies outside of its support {site.support}: {value}")
        checked[name] = value
    return checked


def initialise(guide: ProductGuide, problem: Problem, start: Mapping[str, Tensor], count: int = 200) -> None:
    """Initialise the factors around the start, or around the prior's medians on the real line."""
    latents = guide.latents
    with torch.no_grad():
        values = draw(problem, latents, count).values
        for name, site in latents.sites.items():
            if site.support.is_discrete:
                if name in start:
                    values[name][: count * 9 // 10] = start[name].to(values[name])
                continue
            transform = site.to_support
            free = transform.inv(values[name])
            centre = transform.inv(start[name].to(free)) if name in start else free.median(0).values
            values[name] = transform(centre + 0.1 * torch.randn_like(free))
        match_weighted(guide, values, latents.like.new_full((count, *latents.data_shape), 1 / count))


def train(guide: ProductGuide, problem: Problem, adam: Adam) -> None:
    """Train the guide's parameters by stochastic gradients of the ELBO; the model's stay fixed.

    The result is the mean of the second half of the steps, which has less noise than the last one (Acceleration of
    Stochastic Approximation by Averaging, Polyak and Juditsky, 1992).
    """
    problem = problem.with_guide(guide)
    with torch.no_grad():
        structure = problem.run(2).structure
    score = any(not structure.sites[name].has_rsample for name in structure.drawn)
    bound = TraceELBO(_DRAWS, gradient="score" if score else "pathwise")
    parameters = list(guide.parameters())
    optimizer = torch.optim.Adam(parameters, lr=adam.learning_rate)
    means, first = [torch.zeros_like(parameter) for parameter in parameters], adam.num_steps // 2
    for step in range(adam.num_steps):
        fraction = step / adam.num_steps
        cosine = 0.5 * (1 + math.cos(math.pi * fraction))
        optimizer.param_groups[0]["lr"] = adam.learning_rate * (0.01 + 0.99 * cosine)
        with torch.enable_grad():
            estimate = bound.estimate(problem)
            value, loss = estimate.value.sum(), estimate.loss(estimate.surrogate)
            slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
        if not bool(torch.isfinite(value)):
            raise ValueError(
                f"the ELBO is {float(value.detach())} at step {step}: log p(x, z) is not finite at a draw of the "
                "product, or the search diverged. Give a start where it is finite, or a smaller learning_rate"
            )
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        optimizer.step()
        if step >= first:
            for mean, parameter in zip(means, parameters, strict=True):
                mean += (parameter.detach() - mean) / (step - first + 1)
    optimizer.zero_grad()
    with torch.no_grad():
        for mean, parameter in zip(means, parameters, strict=True):
            parameter.copy_(mean)
