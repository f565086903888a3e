r"""Annealed importance sampling, forwards and in reverse.

Along temperatures :math:`0=\beta_0<\dots<\beta_T=1`, with :math:`u_{t}` obtained from :math:`u_{t-1}` by a move that
leaves :math:`f_{\beta_t}` invariant,

.. math:: \log w = \sum_{t=1}^{T}(\beta_t-\beta_{t-1})\,\bigl[\log p(x,u_{t-1})-\log q(u_{t-1})\bigr],
          \qquad \mathrm E[w] = p(x),\quad \mathrm E[\log w]\le\log p(x).

Run in reverse from an exact posterior draw, the same sum (of the states at the upper temperature of each step) has an
expectation of at least log p(x).  Continuous latents move by Hamiltonian Monte Carlo given the discrete ones, and
discrete latents by Gibbs moves given the continuous (:mod:`pyro_hvae.evidence.gibbs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hvae.arguments import check_count
from pyro_hvae.evidence.bases import base_problem
from pyro_hvae.evidence.moves import Moves
from pyro_hvae.evidence.path import Path
from pyro_hvae.evidence.temperatures import adaptive_temperatures, temperatures
from pyro_hvae.problem import Problem, of_pair
from pyro_hvae.weights import log_mean_exp
from pyro_hvae.weights.means import unchecked_sample_size

__all__ = ["Chains", "anneal", "annealing", "run_chains", "tuned_moves"]

Move = Callable[[Any, int], Any]


@dataclass(frozen=True)
class Chains:
    """Chains of annealed importance sampling.

    Attributes:
        log_weights: ``(K, *plates)`` in nats; their expectation bounds log p(x), from below forwards, from above in
            reverse from exact posterior draws.
        values: the chains' last latents by site, on their supports.
        moves: their transitions; another run on the same pair and data may use them again.
    """

    log_weights: Tensor
    values: dict[str, Tensor]
    moves: Moves

    @property
    def betas(self) -> Tensor:
        """The temperatures, ``(T + 1,)``."""
        return self.moves.betas

    @property
    def acceptance(self) -> Tensor:
        """Mean acceptance probability at each temperature, ``(T + 1,)``; 0 where no move was made."""
        return self.moves.acceptance

    @property
    def step_sizes(self) -> Tensor:
        """Step sizes in standard deviations of the pilot, ``(T + 1, *plates)``; NaN without continuous latents."""
        return torch.stack(self.moves.step_sizes)


def annealing(
    state: Any,
    difference: Callable[[Any], Tensor],
    move: Move,
    betas: Tensor,
    *,
    reverse: bool = False,
    resample: Callable[[Any, Tensor], Any] | None = None,
) -> tuple[Any, Tensor]:
    r"""Run annealed importance sampling for any state, difference of log-densities and move.

    Args:
        state: K chains, drawn at temperature 0 (or at 1, in reverse).
        difference: log joint less log base of a state, ``(K, *data)``.
        move: ``move(state, t)`` leaves the density at ``betas[t]`` invariant.
        betas: increasing from 0 to 1.
        reverse: go from 1 to 0.
        resample: ``resample(state, index)`` takes chains by an index ``(K, *data)``; turns the forward run into a
            sequential Monte Carlo sampler, which resamples a datum's chains when their ESS falls below K/2.

    Returns:
        The last state, and log-weights ``(K, *data)``.
    """
    steps = list(range(1, len(betas)))
    if reverse:
        steps.reverse()
    total: Any = 0.0
    log_means: Any = 0.0  # of weights before each resampling
    for t in steps:
        total = total + float(betas[t] - betas[t - 1]) * difference(state)
        if resample is not None and not reverse:
            state, total, log_means = _resampled(state, total, log_means, resample)
        state = move(state, t - 1 if reverse else t)
    return state, total + log_means


def _resampled(
    state: Any, total: Tensor, log_means: Any, resample: Callable[[Any, Tensor], Any]
) -> tuple[Any, Tensor, Any]:
    """Resample chains of data with a low ESS; the log mean of their weights is added to ``log_means``."""
    count = len(total)
    uneven = unchecked_sample_size(total) < 0.5 * count
    flat = total.softmax(0).reshape(count, -1).T
    drawn = torch.multinomial(flat, count, replacement=True).T.reshape(total.shape)
    own = torch.arange(count, device=total.device).reshape(-1, *(1,) * (total.dim() - 1)).expand(total.shape)
    index = torch.where(uneven, drawn, own)
    log_means = log_means + torch.where(uneven, log_mean_exp(total), 0.0)
    return resample(state, index), torch.where(uneven, 0.0, total), log_means


@of_pair
def anneal(
    problem: Problem,
    *,
    base: str = "guide",
    num_chains: int = 16,
    betas: int | str | Sequence[float] | Tensor = 100,
    num_leapfrog: int = 5,
    num_moves: int = 1,
    reverse_from: Mapping[str, Tensor] | None = None,
    num_refreshes: int = 0,
    resample: bool = False,
    moves: Moves | None = None,
    progress: bool = False,
) -> Chains:
    r"""Run annealed importance sampling on a Pyro model, all chains and data in one tensor program.

    Args:
        model: a Pyro program, called with ``args`` and ``kwargs``; or a bound
            :class:`pyro_hvae.problem.Problem`, and no guide or data then.  Latents are continuous, discrete with
            finitely many values, or both.
        guide: the base, for ``base="guide"``.  Chains from an AutoGuide, whose sites are the latents in other
            coordinates, move in those.
        base: ``"guide"`` or ``"prior"``.
        num_chains: K >= 1 for each datum.
        betas: number of equal steps; ``"linear"`` or ``"sigmoid"`` (100 steps), ``"adaptive"``; or the temperatures.
        num_leapfrog: leapfrog steps a move; 1 is MALA.
        num_moves: moves at each temperature.
        reverse_from: posterior draws by site, K on the leftmost dim, to run in reverse from.
        num_refreshes: moves at temperature one before a reverse run.  They leave the posterior invariant, and make
            chains from the same draw independent.
        resample: resample chains, as in sequential Monte Carlo.
        moves: of an earlier run on the same problem, with its temperatures, instead of a pilot.
        progress: show a bar.

    Returns:
        :class:`Chains`.  The cost is ``num_chains * T * num_moves * (num_leapfrog + 1)`` gradients a datum, and a
        pilot of two moves at each temperature, with 8 to 16 chains.  A discrete site with V values adds V evaluations
        of the densities to each move; V for each entry, where its entries are not indexed by plates with
        conditionally independent indices (a ``to_event`` site, a plate whose indices are coupled).

    Raises:
        ValueError: for temperatures that do not increase from 0 to 1, a model without latents, a discrete latent whose
            values can't be enumerated (Poisson, Geometric) or whose number of values depends on other draws, a guide
            whose log-probability of a possible value of a discrete site is -inf, auxiliary variables that are not the
            latents in other coordinates, a guide that is a point estimate or enumerates a site, a prior of a latent
            that depends on a site that is summed out, a log joint that is -inf at every start of a datum or NaN at
            one, impossible values in ``reverse_from``, or counts below one.

    Warns:
        UserWarning: where a matrix that the programs factorise is singular at a chain's proposal, which is rejected.

    References:
        Annealed Importance Sampling (Neal, 2001); Sequential Monte Carlo Samplers (Del Moral, Doucet and Jasra, 2006).

    Example:
        >>> from pyro_hvae.conjugate import model
        >>> _ = torch.manual_seed(0)
        >>> chains = anneal(model, None, torch.tensor([0.0, 2.0]), base="prior", num_chains=200, betas=20)
        >>> estimate = chains.log_weights.logsumexp(0) - torch.log(torch.tensor(200.0))
        >>> bool((estimate - torch.tensor([-1.2655, -2.2655])).abs().max() < 0.1)
        True
    """
    check_count("num_chains", num_chains)
    start = base_problem(problem, base)
    if moves is None:
        moves = tuned_moves(start, num_chains, betas, num_leapfrog, num_moves)
    return run_chains(
        moves.on(Path(start, num_chains)),
        reverse_from=reverse_from,
        num_refreshes=num_refreshes,
        resample=resample,
        progress=progress,
    )


def tuned_moves(
    problem: Problem,
    num_chains: int,
    betas: int | str | Sequence[float] | Tensor = 100,
    num_leapfrog: int = 5,
    num_moves: int = 1,
) -> Moves:
    """Return moves for a path from the problem's guide, tuned by a pilot run of 8 to 16 chains."""
    checked = None if isinstance(betas, str) and betas == "adaptive" else temperatures(betas)
    problem.require_density("annealing")
    pilot = Path(problem, max(8, min(num_chains, 16)))
    if checked is None:
        checked = adaptive_temperatures(pilot, num_leapfrog=num_leapfrog)
    moves = Moves(pilot, checked, num_leapfrog=num_leapfrog, num_moves=num_moves)
    state = pilot.start()
    _check_start(pilot.difference(state))
    moves.tune(state)
    return moves


def run_chains(
    moves: Moves,
    *,
    reverse_from: Mapping[str, Tensor] | None = None,
    num_refreshes: int = 0,
    resample: bool = False,
    progress: bool = False,
) -> Chains:
    """Run the chains of the moves' path, forwards from draws of the base or in reverse from posterior draws."""
    path = moves.path
    if reverse_from is None:
        state = path.start()
        _check_start(path.difference(state))
    else:
        state = path.unconstrain(reverse_from)
        _check_posterior_draws(path.difference(state))
        for _ in range(num_refreshes):
            state = moves(state, len(moves.betas) - 1)
    total = len(moves.betas) - 1
    with tqdm(total=total, disable=not progress, desc="annealing", unit="temperature") as bar:

        def move(state: Any, t: int) -> Any:
            bar.update()
            return moves(state, t)

        state, weights = annealing(
            state,
            path.difference,
            move,
            moves.betas,
            reverse=reverse_from is not None,
            resample=path.take if resample and path.num_chains > 1 else None,
        )
    return Chains(weights, path.constrain(state), moves)


def _check_posterior_draws(difference: Tensor) -> None:
    """Refuse posterior draws that are impossible under the base or the model."""
    for bad, what in (
        (difference == torch.inf, "outside of the support of the base: give a base that covers the posterior"),
        (~torch.isfinite(difference), "impossible under the model (log p(x, z) is -inf or NaN): no posterior draw"),
    ):
        if bool(bad.any()):
            raise ValueError(f"{int(bad.sum())} of {bad.numel()} draws are {what}{_first(bad.any(0))}")


def _check_start(difference: Tensor) -> None:
    """Refuse data without a valid start."""
    undefined = torch.isnan(difference).any(0)
    if bool(undefined.any()):
        raise ValueError(
            f"{int(undefined.sum())} of {undefined.numel()} data have a log joint that is NaN at a draw of the base"
            + _first(undefined)
        )
    bad = (~torch.isfinite(difference)).all(0)
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} data have no chain whose log joint is finite at the start"
            f"{_first(bad)}: the observation is impossible under each of {len(difference)} draws of the base"
        )


def _first(bad: Tensor) -> str:
    index = tuple(int(i) for i in bad.nonzero()[0])
    return f" (the first has index {index})" if index else ""
