"""A bracket around log p(x): annealing from below, and in reverse from above."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.evidence.annealed import Chains, anneal
from pyro_hvae.evidence.importance import check_weights

__all__ = ["Sandwich", "evidence_sandwich"]


@dataclass(frozen=True)
class Sandwich:
    """A bracket of log p(x) for each datum, in nats, shape of the plates common to all sites.

    Attributes:
        lower: mean log-weight of the forward chains, less 1.96 of its standard errors; ``-inf`` where a chain started
            at latents under which the datum is impossible, as draws of a prior may be.
        upper: mean log-weight of the reverse chains, plus 1.96 of its standard errors.
        upper_is_bound: whether the reverse chains started at given posterior draws.  Otherwise they started where the
            forward chains ended, and ``upper`` is an estimate that is low where those did not reach the posterior.
        forward, reverse: the chains themselves.
    """

    lower: Tensor
    upper: Tensor
    upper_is_bound: bool
    forward: Chains
    reverse: Chains

    @property
    def width(self) -> Tensor:
        """upper - lower, in nats."""
        return self.upper - self.lower

    def __str__(self) -> str:
        kind = "a bound in expectation" if self.upper_is_bound else "an estimate, since no posterior draws were given"
        return (
            f"log p(x), mean over {self.lower.numel()} data: from {float(self.lower.mean()):.4f} to "
            f"{float(self.upper.mean()):.4f} nats (mean width {float(self.width.mean()):.4f}, largest "
            f"{float(self.width.max()):.4f}); above: {kind}"
        )


def evidence_sandwich(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    *args: Any,
    posterior_samples: Mapping[str, Tensor] | None = None,
    num_chains: int = 16,
    **kwargs: Any,
) -> Sandwich:
    r"""Bracket log p(x) for each datum by annealed importance sampling both ways.

    For data simulated from the model, the latents that they were simulated from are exact posterior draws, one for
    each datum (:func:`pyro_hvae.traces.simulate` gives both); then both sides are bounds in expectation, and the
    bracket tells how well annealing works for this model.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; guide None anneals from the prior.
        posterior_samples: posterior draws by site, ``num_chains`` on the leftmost dim, or one for each datum without
            that dim, which every chain then starts from, after moves that leave the posterior as it is.
        num_chains: K >= 2 for each datum and direction.
        kwargs: also those of :func:`pyro_hvae.evidence.anneal`: ``betas``, ``num_leapfrog``, ``num_moves``,
            ``base``, ``num_refreshes`` (20), ``progress``.

    Returns:
        :class:`Sandwich`.

    Raises:
        ValueError: for ``num_chains < 2``, for ``resample=True``, or as :func:`pyro_hvae.evidence.anneal`.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse, Ghahramani and Adams, 2015); On
        the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_hvae.traces import simulate
        >>> _ = torch.manual_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> latents, (x,), _ = simulate(model, (torch.zeros(2),))
        >>> bracket = evidence_sandwich(model, None, x, posterior_samples=latents, num_chains=64, betas=50)
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
        >>> bool(((bracket.lower <= exact) & (exact <= bracket.upper)).all()), bracket.upper_is_bound
        (True, True)
    """
    if num_chains < 2:
        raise ValueError(f"a standard error needs num_chains >= 2, got {num_chains}")
    if kwargs.get("resample"):
        raise ValueError("resampled chains are not independent, so the bracket would have no standard error")
    options: dict[str, Any] = {"num_chains": num_chains, **kwargs}
    if guide is None:
        options.setdefault("base", "prior")
    forward = anneal(model, guide, *args, **options)
    check_weights(forward.log_weights)
    if posterior_samples is None:
        path = forward.moves.path
        starts = path.constrain(path.revived(path.unconstrain(forward.values), torch.isfinite(forward.log_weights)))
    else:
        places = {name: forward.values[name] for name in forward.moves.path.transforms}
        starts = _starts(posterior_samples, places, num_chains)
    options["moves"] = forward.moves
    reverse = anneal(model, guide, *args, reverse_from=starts, **{"num_refreshes": 20, **options})
    check_weights(reverse.log_weights)
    low, below = _mean_and_error(forward.log_weights)
    high, above = _mean_and_error(reverse.log_weights)
    return Sandwich(low - 1.96 * below, high + 1.96 * above, posterior_samples is not None, forward, reverse)


def _mean_and_error(weights: Tensor) -> tuple[Tensor, Tensor]:
    none = (weights == -torch.inf).any(0)  # a chain without weight: no bound but -inf, and no spread
    error = weights.masked_fill(none, 0.0).std(0) / weights.shape[0] ** 0.5
    return weights.mean(0), error


def _starts(samples: Mapping[str, Tensor], like: Mapping[str, Tensor], num_chains: int) -> dict[str, Tensor]:
    found = {}
    for name, value in like.items():
        if name not in samples:
            raise ValueError(
                f"posterior_samples has no site '{name}'; given: {sorted(samples)}. For draws of the model's latents "
                'where the guide draws sites of its own, anneal from the prior (base="prior")'
            )
        given = samples[name]
        single = given.numel() * num_chains == value.numel()
        if not single and given.numel() != value.numel():
            raise ValueError(
                f"posterior_samples['{name}'] has shape {tuple(given.shape)}; one draw for each datum has "
                f"{tuple(value.shape[1:])}, and {num_chains} chains have {tuple(value.shape)}: set num_chains"
            )
        found[name] = given.reshape(value.shape[1:]).expand(value.shape) if single else given
    return found
