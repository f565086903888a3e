r"""The product closest to a posterior by KL(q||p): mean-field variational inference.

.. math:: \min_q \mathrm{KL}\Bigl(\prod_b q_b(z_b)\,\Big\|\,p(z|x)\Bigr) = \log p(x) - \max_q \mathrm{ELBO}(q)

With all other factors held, the best one is :math:`\log q_b(z_b) = \mathrm E_{q_{-b}}[\log p(x, z)] + \text{const}`.
Where that is closed, going round the factors is coordinate ascent:

- *Gaussian*: the fixed point is known at once.  Means are the posterior's, and block b has precision
  :math:`\Lambda_{bb}`, the precision of the conditional, so it is too narrow wherever blocks are correlated.
- *tables*: each round sums the listed configurations.  There may be several local optima; the rounds start from the
  marginals, from uniform tables and from each of the likeliest configurations, and the best end is kept.

Elsewhere the ELBO is maximised by stochastic gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.factorized.families import Bernoulli, Categorical, Family
from pyro_hvae.factorized.forward import gaussian_blocks, match_block
from pyro_hvae.factorized.guide import ProductGuide, TableGiven
from pyro_hvae.factorized.posterior import Configurations, Gaussian, Joint, exact_posterior, joint_of
from pyro_hvae.traces import prior_guide

__all__ = ["reverse_kl"]

Program = Callable[..., Any]


def reverse_kl(
    model: Program,
    *args: Any,
    families: Mapping[str, Any] | None = None,
    blocks: Sequence[Sequence[str]] = (),
    start: Mapping[str, Tensor] | None = None,
    num_steps: int = 1500,
    num_particles: int = 16,
    learning_rate: float = 0.05,
    progress: bool = False,
    **kwargs: Any,
) -> ProductGuide:
    r"""The product of factors that minimises KL(q(z)||p(z|x)): the largest ELBO.

    Closed for Gaussian posteriors, coordinate ascent for tables of few configurations, and otherwise stochastic
    gradients of the ELBO (Adam, whose rate falls along a cosine): a local optimum in the last two.

    Args:
        model: a Pyro program, called with ``args`` and ``kwargs``.
        families, blocks: as for :func:`forward_kl`.
        start: a value by site, around which the search begins; by default tables try several starts, and gradients
            begin at the prior's medians.
        num_steps, num_particles, learning_rate: of the stochastic gradients.
        progress: show a bar for them.

    Returns:
        :class:`ProductGuide`, a guide for these arguments.

    Raises:
        ValueError: for a model without latents, an improper posterior, unknown sites or families, a ``start`` outside
            of a site's support, counts below one, or an ELBO that becomes NaN or infinite.

    Reference:
        An Introduction to Variational Methods for Graphical Models (Jordan, Ghahramani, Jaakkola and Saul, 1999);
        Automatic Differentiation Variational Inference (Kucukelbir et al., 2017).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
        >>> q = reverse_kl(model, torch.tensor(3.0)).distribution("a")
        >>> q.mean.round(decimals=4), q.variance.round(decimals=4)  # 1/(1 + 1); the marginal's is 2/3
        (tensor(1.), tensor(0.5000))
    """
    if num_steps < 1 or num_particles < 1 or not learning_rate > 0:
        raise ValueError(
            "need num_steps >= 1, num_particles >= 1 and learning_rate > 0, got "
            f"{num_steps}, {num_particles}, {learning_rate}"
        )
    joint = joint_of(model, args, kwargs, None)
    start = checked_start(joint, start)
    guide = ProductGuide(joint.latents, families, blocks, name="reverse_kl")
    posterior = exact_posterior(joint)
    if isinstance(posterior, Gaussian) and guide.gaussian() is not None:
        gaussian_blocks(guide, posterior.mean, posterior.precision, inverted=True)
        guide.how = "coordinate ascent on a Gaussian"
    elif isinstance(posterior, Configurations) and of_tables(guide):
        ascend(guide, posterior, start)
        guide.how = "coordinate ascent on tables"
    else:
        begin(guide, joint, start)
        train(guide, joint, num_steps, num_particles, learning_rate, progress)
        guide.how = "gradients of the ELBO"
    return guide


def checked_start(joint: Joint, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The values of a start in the shape of their sites."""
    found = {}
    for name, value in (start or {}).items():
        if name not in joint.latents.sites:
            raise ValueError(f"start names '{name}', which is no latent site; there are {list(joint.latents.sites)}")
        site = joint.latents.sites[name]
        value = torch.as_tensor(value).to(joint.latents.like.device)
        try:
            value = value.expand(site.shape)
        except RuntimeError:
            raise ValueError(
                f"start of site '{name}' has shape {tuple(value.shape)}, which does not broadcast to its "
                f"{tuple(site.shape)}"
            ) from None
        if not bool(site.support.check(value).all()):
            raise ValueError(f"start of site '{name}' lies outside of its support {site.support}: {value}")
        found[name] = value
    return found


# Tables


def of_tables(guide: ProductGuide) -> bool:
    return all(isinstance(guide.factor(name), (Bernoulli, Categorical, TableGiven)) for name in guide.keys)


def ascend(guide: ProductGuide, posterior: Configurations, start: Mapping[str, Tensor]) -> None:
    """Coordinate ascent from several starts; the factors are set to the best end of each datum."""
    latents = guide.latents
    groups = groups_of(guide, posterior)
    log_joint = posterior.log_joint.clamp(min=-1e6)  # finite, so that no probability of 0 meets a logarithm of 0
    data = log_joint.reshape(len(log_joint), -1)
    shape = [len(codes.unique()) for codes in groups]

    def tables(weights: Tensor) -> list[Tensor]:
        """Of each group, ``(V, N)``, from weights of the configurations ``(K, N)``."""
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
    for begun in starts:
        elbo, q = rounds(data, tables(begun), groups)
        better = elbo > best + 1e-12
        best = torch.where(better, elbo, best)
        weights = torch.where(better, q, weights)
    weights = weights.reshape(posterior.log_joint.shape)
    for block in guide.blocks:
        if block[0] in guide.joint:
            match_block(guide, block, posterior.values, weights)
        else:
            site = latents.sites[block[0]]
            guide.factor(block[0]).match(posterior.values[block[0]], latents.spread(weights, site))


def groups_of(guide: ProductGuide, posterior: Configurations) -> list[Tensor]:
    """For each factor, which of its values each configuration has: ``(K,)`` integers."""
    where, start = {}, 0
    for name, count in posterior.elements.items():
        where[name] = range(start, start + count)
        start += count
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


def rounds(log_joint: Tensor, tables: list[Tensor], groups: list[Tensor], most: int = 2000) -> tuple[Tensor, Tensor]:
    """Go round the factors until nothing moves; the ELBO ``(N,)`` and q of every configuration ``(K, N)``."""
    floor = torch.finfo(log_joint.dtype).tiny
    logs = [(table / table.sum(0)).clamp(min=floor).log() for table in tables]
    log_q = torch.stack([log[codes] for log, codes in zip(logs, groups)]).sum(0)
    for _ in range(most):
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


# Gradients


def begin(guide: ProductGuide, joint: Joint, start: Mapping[str, Tensor], count: int = 200) -> None:
    """Put the factors around the start, or around the prior's medians on the real line."""
    with torch.no_grad():
        values, _, _ = joint.draws(prior_guide(joint.model), count)
        for name, site in guide.latents.sites.items():
            if site.support.is_discrete:
                if name in start:
                    values[name][: count * 9 // 10] = start[name].to(values[name])
                continue
            transform = site.to_support
            free = transform.inv(values[name])
            centre = transform.inv(start[name].to(free)) if name in start else free.median(0).values
            values[name] = transform(centre + 0.1 * torch.randn_like(free))
        weights = guide.latents.like.new_full((count, *guide.latents.data_shape), 1 / count)
        for block in guide.blocks:
            if block[0] in guide.joint:
                match_block(guide, block, values, weights)
            elif isinstance(factor := guide.factor(block[0]), Family):
                factor.match(values[block[0]], guide.latents.spread(weights, guide.latents.sites[block[0]]))


def train(
    guide: ProductGuide, joint: Joint, num_steps: int, num_particles: int, learning_rate: float, progress: bool
) -> None:
    """Stochastic gradients of the ELBO over the guide's parameters; the model's stay as they are."""
    with torch.no_grad():
        found = joint.readings(guide, joint.draws(guide, 2)[0])[0].structure
    rigid = any(not found.sites[name].has_rsample for name in found.drawn)
    bound = TraceELBO(num_particles, gradient="score" if rigid else "pathwise")
    free = list(guide.parameters())
    optimizer = torch.optim.Adam(free, lr=learning_rate)
    for step in trange(num_steps, disable=not progress, desc="reverse KL", unit="step"):
        fraction = step / num_steps
        optimizer.param_groups[0]["lr"] = learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))
        with torch.enable_grad():
            loss = bound.differentiable_loss(joint.model, guide, *joint.args, **joint.kwargs)
            slopes = torch.autograd.grad(loss, free, allow_unused=True)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the ELBO is {-float(loss.detach())} at step {step}: log p(x, z) is not finite at a draw of the "
                "product, or the search ran off. Give a start where it is finite, or a smaller learning_rate"
            )
        for parameter, slope in zip(free, slopes):
            parameter.grad = slope
        optimizer.step()
