"""A bracket around log p(x): annealing from below, and in reverse from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count
from pyro_hvae.evidence.annealed import Chains, run_chains, tuned_moves
from pyro_hvae.evidence.bases import base_problem
from pyro_hvae.evidence.moves import Moves
from pyro_hvae.evidence.path import Path
from pyro_hvae.notebook import html_table
from pyro_hvae.problem import Problem, of_pair
from pyro_hvae.weights import check_weights

__all__ = ["Sandwich", "evidence_sandwich", "posterior_starts"]


@dataclass(frozen=True)
class Sandwich:
    """A bracket of log p(x) for each datum, in nats, shape of the plates common to all sites.

    Attributes:
        lower: mean log-weight of the forward chains, less 1.96 of its standard errors; ``-inf`` where a chain started
            at latents under which the datum is impossible, as draws of a prior may be.
        upper: mean log-weight of the reverse chains, plus 1.96 of its standard errors.
        upper_is_bound: whether the reverse chains started at posterior draws.  Otherwise they started where the forward
            chains ended, and ``upper`` is an estimate that is low where those did not reach the posterior.
        forward, reverse: the chains.
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
        (_, ends), *widths, (_, kind) = self._facts().items()
        return f"{self._title()}: {ends} ({', '.join(map(' '.join, widths))}); above: {kind}"

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._facts())

    def _title(self) -> str:
        who = f"mean over {self.lower.numel()} data" if self.lower.dim() else "all data together"
        return f"log p(x), {who}"

    def _facts(self) -> dict[str, str]:
        widths = {"mean width": self.width.mean(), "largest width": self.width.max()}
        if not self.lower.dim():
            widths = {"width": self.width}
        return {
            "bracket": f"from {float(self.lower.mean()):.4f} to {float(self.upper.mean()):.4f} nats",
            **{name: f"{float(width):.4f}" for name, width in widths.items()},
            "above": "a bound in expectation" if self.upper_is_bound else "an estimate, without posterior draws",
        }


@of_pair
def evidence_sandwich(
    problem: Problem,
    *,
    posterior_samples: Mapping[str, Tensor] | None = None,
    base: str | None = None,
    num_chains: int = 16,
    betas: int | str | Sequence[float] | Tensor = 100,
    num_leapfrog: int = 5,
    num_moves: int = 1,
    num_refreshes: int = 20,
    resample: bool = False,
    moves: Moves | None = None,
    progress: bool = False,
) -> Sandwich:
    r"""Bracket log p(x) for each datum by annealed importance sampling both ways.

    For data simulated from the model, the latents that they were simulated from are exact posterior draws, one for
    each datum (:meth:`~pyro_hvae.problem.Problem.simulate` gives both); then both sides are bounds in expectation, and
    the bracket measures how well annealing works for this model.  Latents are continuous, discrete or both, as in
    :func:`pyro_hvae.evidence.anneal`.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; or a bound
            :class:`~pyro_hvae.problem.Problem` instead of all of these.
        posterior_samples: posterior draws by site, ``num_chains`` on the leftmost dim, or one for each datum without
            that dim; then every chain starts from it, after moves that leave the posterior invariant.
        base: the base, ``"guide"`` or ``"prior"``; by default the guide, and the prior without one.
        num_chains: K >= 2 for each datum and direction.
        betas, num_leapfrog, num_moves, num_refreshes, progress: as in :func:`pyro_hvae.evidence.anneal`.
        moves: tuned or learned before, with their temperatures, instead of a pilot.
        resample: refused, since resampled chains depend on each other.

    Returns:
        :class:`Sandwich`.

    Raises:
        ValueError: for ``num_chains < 2``, for ``resample=True``, for posterior draws that are no values of their
            sites, or as :func:`pyro_hvae.evidence.anneal`.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse, Ghahramani and Adams, 2015); On
        the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_hvae.conjugate import model
        >>> from pyro_hvae.problem import Problem
        >>> _ = torch.manual_seed(0)
        >>> latents, simulated = Problem(model)(torch.zeros(2)).simulate()
        >>> bracket = evidence_sandwich(simulated, posterior_samples=latents, num_chains=64, betas=50)
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(simulated.args[0])
        >>> bool(((bracket.lower <= exact) & (exact <= bracket.upper)).all()), bracket.upper_is_bound
        (True, True)
    """
    check_count("num_chains", num_chains)
    if num_chains < 2:
        raise ValueError(f"a standard error needs num_chains >= 2, got {num_chains}")
    if resample:
        raise ValueError("resampled chains are not independent, so the bracket would have no standard error")
    start = base_problem(problem, base or ("guide" if problem.guided else "prior"))
    path = Path(start, num_chains)
    starts = None if posterior_samples is None else posterior_starts(posterior_samples, path)
    if moves is None:
        moves = tuned_moves(start, num_chains, betas, num_leapfrog, num_moves)
    forward = run_chains(moves.on(path), progress=progress)
    check_weights(forward.log_weights)
    if starts is None:
        has_weight = torch.isfinite(forward.log_weights)
        starts = path.constrain(path.replace_dead(path.unconstrain(forward.values), has_weight))
    reverse = run_chains(moves.on(path), reverse_from=starts, num_refreshes=num_refreshes, progress=progress)
    check_weights(reverse.log_weights)
    low, below = _mean_and_error(forward.log_weights)
    high, above = _mean_and_error(reverse.log_weights)
    return Sandwich(low - 1.96 * below, high + 1.96 * above, posterior_samples is not None, forward, reverse)


def _mean_and_error(weights: Tensor) -> tuple[Tensor, Tensor]:
    none = (weights == -torch.inf).any(0)  # a weight of zero: the mean is -inf, and the error 0
    error = weights.masked_fill(none, 0.0).std(0) / weights.shape[0] ** 0.5
    return weights.mean(0), error


def posterior_starts(samples: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return posterior draws, one for each chain of a path."""
    starts = {}
    for name in path.sites:
        if name not in samples:
            raise ValueError(
                f"posterior_samples has no site '{name}'; it has {sorted(samples)}. For draws of the model's latents "
                'where the guide draws sites of its own, anneal from the prior (base="prior")'
            )
        draws, shape = samples[name], path.problem.template.nodes[name]["fn"].shape()
        single = draws.numel() == shape.numel()
        if not single and draws.numel() != path.num_chains * shape.numel():
            raise ValueError(
                f"posterior_samples['{name}'] has shape {tuple(draws.shape)}; one draw for each datum has "
                f"{tuple(shape)}, and {path.num_chains} chains have {(path.num_chains, *shape)}: set num_chains"
            )
        starts[name] = draws.reshape(shape).expand(path.num_chains, *shape) if single else draws
    path.unconstrain(starts)  # refuses draws outside of the base's support
    return starts
