r"""The evidence by weighing draws: marginalisation (seed eq. 1) and Bayes' rule (seed eq. 2).

.. math:: p(x) = \int p(x, z)\,dz = \mathrm E_{q(z|x)}\Bigl[\frac{p(x, z)}{q(z|x)}\Bigr],
          \qquad p(x) = \frac{p(x, z^*)}{p(z^*|x)}.

The first is estimated with the guide as q, or with the prior (simple Monte Carlo), or summed exactly where every
latent is discrete.  The second needs a posterior density at a point; it is estimated from draws of an independence
sampler that has the guide as its proposal (Marginal Likelihood From the Metropolis-Hastings Output, Chib and Jeliazkov,
2001).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import config_enumerate
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hvae.psis import pareto_khat
from pyro_hvae.traces import Structure, log_weights, prior_guide, read, structure

__all__ = ["Evidence", "log_evidence"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Evidence:
    """An estimate of log p(x) for each datum, in nats, with what tells how far to trust it.

    Attributes:
        value: the estimate, shape of the plates common to all sites.
        stderr: its standard error; meaningful where ``khat`` is below 0.7, and 0 where the sum is exact.
        ess: effective number of the draws' weights, between 1 and ``num_samples``.
        khat: Pareto shape of the weights (``-inf``: exact); at or above 0.7 neither value nor error can be trusted.
        num_samples: draws a datum.
        method: how it was obtained.
    """

    value: Tensor
    stderr: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int
    method: str

    def bits_per_dim(self, dims: int) -> Tensor:
        """-log2 p(x) per dimension of a datum.

        Raises:
            ValueError: for ``dims < 1``.
        """
        if dims < 1:
            raise ValueError(f"a datum has at least one dimension, got {dims}")
        return -self.value / (dims * math.log(2.0))

    def __str__(self) -> str:
        worst = float(self.khat.max())
        return (
            f"log p(x) by {self.method}, {self.num_samples} draws: mean {float(self.value.mean()):.4f} nats over "
            f"{self.value.numel()} data, largest standard error {float(self.stderr.max()):.3g}, "
            f"k-hat >= 0.7 for {int((self.khat >= 0.7).sum())} (largest {worst:.2f})"
        )


def log_evidence(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 1000,
    method: str = "importance",
    chunk_size: int | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Evidence:
    r"""Estimate log p(x) for each datum.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.  The guide may be None for ``"prior"``,
            ``"annealed"`` (from the prior) and ``"enumerate"``.
        num_samples: K draws a datum.
        method: ``"importance"`` weighs draws of the guide; ``"prior"`` draws of the prior; ``"bayes"`` divides the
            joint by the posterior density at a point; ``"annealed"`` runs annealed importance sampling from the guide
            with ``num_samples`` chains (see :func:`pyro_hvae.evidence.anneal` for more control); ``"enumerate"`` sums
            exactly over latents that are all discrete.
        chunk_size: draws (or chains) that run at once; memory grows with it, besides K numbers a datum.  By default
            so many that draws times indices of the largest site's plates stay below 20,000.
        progress: show a bar.

    Returns:
        :class:`Evidence`, with the shape of the plates common to all sites.

    Raises:
        ValueError: for an unknown method, counts that are too small, a model without latents, a subsampled plate that
            does not enclose all sites, or a datum for which no draw has a positive weight.

    Reference:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016), where K = 5000 is the custom.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> log_evidence(model, guide, torch.tensor([0.0, 2.0])).value.round(decimals=1)
        tensor([-1.3000, -2.3000])
    """
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(_METHODS)}")
    if guide is None and method in ("importance", "bayes"):
        raise ValueError(f"method {method!r} draws from a guide, and guide is None: use 'prior', or give one")
    least = 1 if method == "enumerate" else 10
    if num_samples < least or (chunk_size is not None and chunk_size < 1):
        raise ValueError(f"need num_samples >= {least} and chunk_size >= 1, got {num_samples} and {chunk_size}")
    return _METHODS[method](model, guide, args, kwargs, num_samples, chunk_size, progress)


def drawn_weights(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int | None,
    progress: bool,
) -> Tensor:
    """Log-weights ``(K, *plates)``, in chunks; refuses what would make them no weights of one datum's evidence."""
    found = structure(model, guide, args, kwargs)
    if not found.drawn:
        raise ValueError(
            f"the model has no latent site that the guide draws (sites: {sorted(found.sites)}): its evidence is its "
            'log-likelihood, and nothing is to be estimated (method="enumerate" sums discrete sites out)'
        )
    partial = [plate for plate in found.subsampled if plate not in found.common]
    if partial:
        raise ValueError(
            f"plate '{partial[0].name}' shows {partial[0].size} of {partial[0].full_size} indices and does not enclose "
            "all sites: the evidence of a part of the data is not that of the whole. Pass the whole data"
        )
    if chunk_size is None:
        chunk_size = default_chunk(found)
    parts = []
    with tqdm(total=num_samples, disable=not progress, desc="log p(x)", unit="draw") as bar:
        for start in range(0, num_samples, chunk_size):
            count = min(chunk_size, num_samples - start)
            parts.append(log_weights(model, guide, *args, num_particles=count, **kwargs))
            bar.update(count)
    weights = torch.cat(parts)
    check_weights(weights)
    return weights


def default_chunk(found: Structure) -> int:
    """How many draws run at once so that memory stays bounded, whatever the number of data."""
    largest = max(math.prod(plate.size for plate in site.plates) for site in found.sites.values())
    return max(1, 20_000 // max(1, largest))


def check_weights(weights: Tensor) -> None:
    """Refuse NaN, +inf, and data for which no draw has any weight.

    Raises:
        ValueError: with the count and first index of such data.
    """
    invalid = (torch.isnan(weights) | (weights == torch.inf)).any(0)
    empty = (weights == -torch.inf).all(0)
    for bad, what in (
        (invalid, "have a log-weight that is NaN or +inf (an improper posterior, or a density without a bound)"),
        (empty, "have no draw with a positive weight (log p(x, z) is -inf at every draw)"),
    ):
        if bool(bad.any()):
            first = tuple(int(i) for i in bad.nonzero()[0])
            where = f"; the first has index {first}" if first else ""
            raise ValueError(f"{int(bad.sum())} of {bad.numel()} data {what}{where}")


def weighed(weights: Tensor, method: str) -> Evidence:
    """The log of the average weight, its standard error by the delta method, and its diagnostics."""
    count = weights.shape[0]
    normalised = weights.log_softmax(0)
    square = (2 * normalised).logsumexp(0).exp()
    return Evidence(
        value=weights.logsumexp(0) - math.log(count),
        stderr=((count * square - 1).clamp(min=0) / (count - 1)).sqrt(),
        ess=1 / square,
        khat=pareto_khat(weights),
        num_samples=count,
        method=method,
    )


def _importance(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int | None,
    progress: bool,
) -> Evidence:
    assert guide is not None
    return weighed(drawn_weights(model, guide, args, kwargs, num_samples, chunk_size, progress), "importance")


def _prior(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int | None,
    progress: bool,
) -> Evidence:
    weights = drawn_weights(model, prior_guide(model), args, kwargs, num_samples, chunk_size, progress)
    return weighed(weights, "prior")


def _bayes(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int | None,
    progress: bool,
) -> Evidence:
    r"""log p(x, z*) less log p(z*|x), with p(z*|x) = q(z*) E_post[a(z, z*)] / E_q[a(z*, z)].

    a(z, z') = min(1, w(z')/w(z)) accepts a proposal of the independence sampler.  The two expectations have draws of
    their own; z* is the draw of median weight, among those that are possible, of a third set, where the posterior is
    neither thin nor the guide.
    """
    assert guide is not None
    third = num_samples // 3
    sizes = (third, third, num_samples - 2 * third)
    pilot, posterior, proposal = (
        drawn_weights(model, guide, args, kwargs, size, chunk_size, progress) for size in sizes
    )
    at_point = pilot.masked_fill(pilot == -torch.inf, torch.nan).nanquantile(0.5, 0, interpolation="nearest")
    normalised = posterior.log_softmax(0)
    accepted = (at_point - posterior).clamp(max=0.0)
    into = (normalised + accepted).logsumexp(0)
    out = (proposal - at_point).clamp(max=0.0).logsumexp(0) - math.log(sizes[2])
    value = at_point - into + out
    # Delta method: a self-normalised average in the denominator, a plain one in the numerator.
    share = normalised.exp()
    into_error = (share**2 * (accepted.exp() - into.exp()) ** 2).sum(0) / (2 * into).exp()
    terms = (proposal - at_point).clamp(max=0.0).exp()
    out_error = terms.var(0) / sizes[2] / (2 * out).exp()
    together = torch.cat([posterior, proposal])
    return Evidence(
        value=value,
        stderr=(into_error + out_error).sqrt(),
        ess=1 / (2 * together.log_softmax(0)).logsumexp(0).exp(),
        khat=pareto_khat(together),
        num_samples=num_samples,
        method="bayes",
    )


def _enumerate(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int | None,
    progress: bool,
) -> Evidence:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    try:
        with torch.no_grad():
            value = read(config_enumerate(model), nothing, args, kwargs).log_weights[0]
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f'method="enumerate" sums over latents that are all discrete and finite: {error}') from error
    check_weights(value[None])
    exact = torch.zeros_like(value)
    return Evidence(value, exact, torch.ones_like(value), torch.full_like(value, -torch.inf), 1, "enumerate")


def _annealed(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int | None,
    progress: bool,
) -> Evidence:
    from pyro_hvae.evidence.annealed import anneal

    base = "prior" if guide is None else "guide"
    size = chunk_size or default_chunk(structure(model, prior_guide(model) if guide is None else guide, args, kwargs))
    parts: list[Tensor] = []
    moves = None
    for start in range(0, num_samples, size):
        count = min(size, num_samples - start)
        options: dict[str, Any] = {"base": base, "num_chains": count, "moves": moves, "progress": progress}
        chains = anneal(model, guide, *args, **options, **kwargs)
        parts.append(chains.log_weights)
        moves = chains.moves
    weights = torch.cat(parts)
    check_weights(weights)
    return weighed(weights, "annealed")


_METHODS: dict[str, Callable[..., Evidence]] = {
    "importance": _importance,
    "prior": _prior,
    "bayes": _bayes,
    "enumerate": _enumerate,
    "annealed": _annealed,
}
