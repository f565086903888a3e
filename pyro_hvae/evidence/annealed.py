r"""Annealed importance sampling, forwards and in reverse.

Along temperatures :math:`0=\beta_0<\dots<\beta_T=1`, with :math:`u_{t}` obtained from :math:`u_{t-1}` by a move that
leaves :math:`f_{\beta_t}` invariant,

.. math:: \log w = \sum_{t=1}^{T}(\beta_t-\beta_{t-1})\,\bigl[\log p(x,u_{t-1})-\log q(u_{t-1})\bigr],
          \qquad \mathrm E[w] = p(x),\quad \mathrm E[\log w]\le\log p(x).

Run in reverse from an exact posterior draw, the same sum (of the states at the upper temperature of each step) has an
expectation of at least log p(x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hvae.evidence.path import Path, Program, State, hamiltonian

__all__ = ["Chains", "Moves", "adaptive_temperatures", "anneal", "annealing", "sigmoid_temperatures", "temperatures"]

Move = Callable[[Any, int], Any]


@dataclass(frozen=True)
class Chains:
    """What annealing gives.

    Attributes:
        log_weights: ``(K, *plates)`` in nats; their expectation bounds log p(x), from below forwards, from above in
            reverse from exact posterior draws.
        values: the chains' last latents by site, on their supports.
        moves: what moved them; a further run on the same pair and data may use it again.
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
        """Step sizes in standard deviations of the pilot, ``(T + 1, *plates)``."""
        return torch.stack(self.moves.step_sizes)


def temperatures(betas: int | str | Sequence[float] | Tensor, num: int = 100) -> Tensor:
    """Check temperatures, or make them: a number of equal steps, ``"linear"`` or ``"sigmoid"`` with ``num`` steps.

    Raises:
        ValueError: for temperatures that do not increase from 0 to 1.

    Example:
        >>> temperatures(4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if isinstance(betas, str) and betas in ("linear", "sigmoid"):
        return temperatures(num) if betas == "linear" else sigmoid_temperatures(num)
    if isinstance(betas, Integral):
        if betas < 1:
            raise ValueError(f"the number of temperature steps must be at least 1, got {betas}")
        return torch.linspace(0.0, 1.0, int(betas) + 1, dtype=torch.float64)
    if betas is None or isinstance(betas, (str, float)):
        raise ValueError(f"temperatures are 'linear', 'sigmoid', 'adaptive', an int or a sequence, got {betas!r}")
    found = torch.as_tensor(betas, dtype=torch.float64)
    increase = found.dim() == 1 and len(found) > 1 and bool((found.diff() > 0).all())  # NaN does not
    if not increase or found[0] != 0 or found[-1] != 1:
        raise ValueError(f"temperatures must increase strictly from 0 to 1, got {found.reshape(-1).tolist()[:8]}")
    return found


def sigmoid_temperatures(num: int, width: float = 4.0) -> Tensor:
    """Temperatures that are dense near both ends (On the Quantitative Analysis of Decoder-Based Generative Models, Wu
    et al., 2017): the logistic function on ``num + 1`` equal points of [-width, width], scaled to [0, 1].

    Example:
        >>> sigmoid_temperatures(2).tolist()
        [0.0, 0.5, 1.0]
    """
    if num < 1:
        raise ValueError(f"the number of temperature steps must be at least 1, got {num}")
    raw = torch.sigmoid(torch.linspace(-width, width, num + 1, dtype=torch.float64))
    return (raw - raw[0]) / (raw[-1] - raw[0])


def annealing(
    state: Any,
    difference: Callable[[Any], Tensor],
    move: Move,
    betas: Tensor,
    *,
    reverse: bool = False,
    resample: Callable[[Any, Tensor], Any] | None = None,
    progress: bool = False,
) -> tuple[Any, Tensor]:
    r"""Annealed importance sampling for any state, difference of log-densities and move.

    Args:
        state: K chains, drawn at temperature 0 (or at 1, in reverse).
        difference: log joint less log base of a state, ``(K, *data)``.
        move: ``move(state, t)`` leaves the density at ``betas[t]`` invariant.
        betas: increasing from 0 to 1.
        reverse: go from 1 to 0.
        resample: ``resample(state, index)`` picks chains by an index ``(K, *data)``; turns the forward run into a
            sequential Monte Carlo sampler, which resamples a datum's chains when their ESS falls below K/2.

    Returns:
        The last state, and log-weights ``(K, *data)``.
    """
    steps = list(range(1, len(betas)))
    if reverse:
        steps.reverse()
    total: Any = 0.0
    settled: Any = 0.0
    for t in tqdm(steps, disable=not progress, desc="annealing", unit="temperature"):
        total = total + float(betas[t] - betas[t - 1]) * difference(state)
        if resample is not None and not reverse:
            state, total, settled = _resampled(state, total, settled, resample)
        state = move(state, t - 1 if reverse else t)
    return state, total + settled


def _resampled(
    state: Any, total: Tensor, settled: Any, resample: Callable[[Any, Tensor], Any]
) -> tuple[Any, Tensor, Any]:
    """Resample the data whose weights have become uneven; their average weight so far is put aside."""
    count = total.shape[0]
    normalised = total.log_softmax(0)
    poor = (2 * normalised).logsumexp(0).exp() * count > 2.0
    flat = normalised.exp().reshape(count, -1).T
    drawn = torch.multinomial(flat, count, replacement=True).T.reshape(total.shape)
    kept = torch.arange(count, device=total.device).reshape(-1, *(1,) * (total.dim() - 1)).expand(total.shape)
    index = torch.where(poor, drawn, kept)
    average = total.logsumexp(0) - math.log(count)
    settled = settled + torch.where(poor, average, torch.zeros_like(average))
    return resample(state, index), torch.where(poor, torch.zeros_like(total), total), settled


class Moves:
    """HMC or MALA at each temperature, with step sizes and scales fixed before the weighted run.

    Adapting a step size to the chain it moves would bias the weights.  A pilot run of its own chains finds, for each
    temperature and datum, the step size (aiming at an acceptance of 0.8 for HMC, 0.57 for MALA) and the standard
    deviation of every coordinate, averaged over the temperatures just passed; the chains are then thrown away.

    Args:
        path: the path to move along.
        betas: temperatures.
        num_leapfrog: leapfrog steps a move; 1 is MALA.
        num_moves: moves at each temperature.
        step_size: where the pilot starts, in standard deviations.
    """

    def __init__(
        self, path: Path, betas: Tensor, *, num_leapfrog: int = 5, num_moves: int = 1, step_size: float = 0.5
    ) -> None:
        if num_leapfrog < 1 or num_moves < 1 or step_size <= 0:
            raise ValueError(
                "need num_leapfrog >= 1, num_moves >= 1 and step_size > 0, got "
                f"{num_leapfrog}, {num_moves}, {step_size}"
            )
        self.path = path
        self.betas = betas
        self.num_leapfrog, self.num_moves = num_leapfrog, num_moves
        self.first_step = step_size
        self.step_sizes: list[Tensor] = []
        self.scales: list[State] = []
        self.acceptance = torch.zeros(len(betas), dtype=torch.float64)

    def __call__(self, state: State, t: int) -> State:
        rates = []
        for _ in range(self.num_moves):
            state, accepted = hamiltonian(
                self.path, state, float(self.betas[t]), self.step_sizes[t], self.num_leapfrog, self.scales[t]
            )
            rates.append(accepted.mean())
        self.acceptance[t] = torch.stack(rates).mean()
        return state

    def on(self, path: Path) -> Moves:
        """The same moves for other chains of the same pair and data."""
        moved = Moves(path, self.betas, num_leapfrog=self.num_leapfrog, num_moves=self.num_moves)
        moved.step_sizes, moved.scales = self.step_sizes, self.scales
        return moved

    def tune(self, state: State) -> State:
        """Run a pilot from draws of the base; set step sizes and scales for each temperature."""
        target = 0.57 if self.num_leapfrog == 1 else 0.8
        # A quarter of a period decorrelates a Gaussian at best; a full one returns to its start.
        longest = math.log(0.5 * math.pi / self.num_leapfrog) if self.num_leapfrog > 1 else math.inf
        log_step = torch.full_like(self.path.difference(state)[0], math.log(self.first_step))
        variances = {name: _variance(value) for name, value in state.items()}
        for t in range(len(self.betas)):
            if t < 2:  # the base may reach where the joint is zero; nothing above it does
                state = self.path.revived(state)
            scales = {name: variance.sqrt() for name, variance in variances.items()}
            for attempt in range(30 if t == 0 else 2):
                state, accepted = hamiltonian(
                    self.path, state, float(self.betas[t]), log_step.exp(), self.num_leapfrog, scales
                )
                log_step = log_step + (0.5 if attempt < 10 else 0.2) * (accepted.mean(0) - target)
                log_step = log_step.clamp(max=longest)
            for name, value in state.items():
                variances[name] = 0.8 * variances[name] + 0.2 * _variance(value)
            self.step_sizes.append(log_step.exp())
            self.scales.append(scales)
        return state


def _variance(chains: Tensor) -> Tensor:
    """Variance over the chains, kept away from zero where they all stand at one value."""
    return chains.var(0).clamp(min=1e-12)


def adaptive_temperatures(path: Path, *, target: float = 0.9, num_leapfrog: int = 5, most: int = 2000) -> Tensor:
    r"""Temperatures at which the conditional effective sample size falls by the same factor each step.

    Found by a pilot run of its own, with the least of the data's ratios deciding, and fixed from then on.

    Args:
        target: CESS / K of one step, in (0, 1); nearer to one means more temperatures.
        most: give up beyond so many.

    Raises:
        ValueError: for a target outside of (0, 1), or if ``most`` temperatures do not suffice.

    Reference:
        Toward Automatic Model Comparison: An Adaptive Sequential Monte Carlo Approach (Zhou, Johansen and Aston,
        2016).
    """
    if not 0.0 < target < 1.0:
        raise ValueError(f"target must lie in (0, 1), got {target}")
    state = path.start()
    betas, log_step = [0.0], math.log(0.2)
    while betas[-1] < 1.0:
        if len(betas) > most:
            raise ValueError(f"{most} temperatures do not suffice (reached beta = {betas[-1]:.3g}): lower the target")
        state = path.revived(state)
        slope = path.difference(state)
        low, high = 0.0, 1.0 - betas[-1]
        if _cess(high * slope) < target:
            for _ in range(40):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if _cess(middle * slope) >= target else (low, middle)
            high = max(low, 1e-6)
        betas.append(min(1.0, betas[-1] + high))
        for _ in range(3):
            state, accepted = hamiltonian(path, state, betas[-1], math.exp(log_step), num_leapfrog)
            log_step += 0.3 * (float(accepted.mean()) - 0.8)
    betas[-1] = 1.0
    return temperatures(betas)


def _cess(increments: Tensor) -> float:
    """The least conditional ESS over the data, as a share of the chains."""
    count = increments.shape[0]
    ratio = (2 * increments.logsumexp(0) - (2 * increments).logsumexp(0)).exp() / count
    return float(ratio.min())


def anneal(
    model: Program,
    guide: Program | None,
    *args: Any,
    base: str = "guide",
    num_chains: int = 16,
    betas: int | str | Sequence[float] | Tensor = 100,
    num_leapfrog: int = 5,
    num_moves: int = 1,
    reverse_from: dict[str, Tensor] | None = None,
    num_refreshes: int = 0,
    resample: bool = False,
    moves: Moves | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Chains:
    r"""Annealed importance sampling on a Pyro model, all chains and data in one tensor program.

    Args:
        model: a Pyro program with continuous latents, called with ``args`` and ``kwargs``.
        guide: where to start, for ``base="guide"``.  From an AutoGuide, whose own sites are the latents in other
            coordinates, chains move in those.
        base: ``"guide"`` or ``"prior"``.
        num_chains: K >= 1 for each datum.
        betas: how many equal steps; ``"linear"`` or ``"sigmoid"`` (100 steps), ``"adaptive"``; or the temperatures.
        num_leapfrog: leapfrog steps a move; 1 is MALA.
        num_moves: moves at each temperature.
        reverse_from: posterior draws by site, K on the leftmost dim, to run in reverse from.
        num_refreshes: moves at temperature one before a reverse run.  They leave the posterior as it is, and make
            chains independent that start from the same draw.
        resample: make it a sequential Monte Carlo sampler.
        moves: of an earlier run on the same pair and data, with its temperatures, instead of a pilot.
        progress: show a bar.

    Returns:
        :class:`Chains`.  The cost is ``num_chains * T * num_moves * (num_leapfrog + 1)`` gradients a datum, and a
        pilot of two moves at each temperature, with 8 to 16 chains.

    Raises:
        ValueError: for temperatures that do not increase from 0 to 1, a model without latents or with discrete ones,
            auxiliary variables that are not the latents in other coordinates, a log joint that is -inf at every start
            of a datum or NaN at one, impossible values to run in reverse from, or counts below one.

    References:
        Annealed Importance Sampling (Neal, 2001); Sequential Monte Carlo Samplers (Del Moral, Doucet and Jasra, 2006).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> chains = anneal(model, None, torch.tensor([0.0, 2.0]), base="prior", num_chains=200, betas=20)
        >>> estimate = chains.log_weights.logsumexp(0) - torch.log(torch.tensor(200.0))
        >>> bool((estimate - torch.tensor([-1.2655, -2.2655])).abs().max() < 0.1)
        True
    """
    if num_chains < 1:
        raise ValueError(f"num_chains must be at least 1, got {num_chains}")
    if base not in ("guide", "prior"):
        raise ValueError(f"base must be 'guide' or 'prior', got {base!r}")
    if base == "guide" and guide is None:
        raise ValueError("base='guide' needs a guide; use base='prior' for none")
    start_from = guide if base == "guide" else None
    if moves is None:
        fixed = None if betas == "adaptive" else temperatures(betas)  # refuse bad temperatures before any work
        pilot = Path(model, start_from, args, kwargs, max(8, min(num_chains, 16)))
        if fixed is None:
            fixed = adaptive_temperatures(pilot, num_leapfrog=num_leapfrog)
        moves = Moves(pilot, fixed, num_leapfrog=num_leapfrog, num_moves=num_moves)
        opening = pilot.start()
        _check_start(pilot.difference(opening), given=False)
        moves.tune(opening)

    path = Path(model, start_from, args, kwargs, num_chains)
    moves = moves.on(path)
    state = path.start() if reverse_from is None else path.unconstrain(reverse_from)
    _check_start(path.difference(state), given=reverse_from is not None)
    for _ in range(num_refreshes if reverse_from is not None else 0):
        state = moves(state, len(moves.betas) - 1)

    state, weights = annealing(
        state,
        path.difference,
        moves,
        moves.betas,
        reverse=reverse_from is not None,
        resample=path.picked if resample and num_chains > 1 else None,
        progress=progress,
    )
    return Chains(weights, path.constrain(state), moves)


def _check_start(difference: Tensor, *, given: bool) -> None:
    """Refuse what no chain can start from; ``given`` are posterior draws, of which each must be possible."""
    if given:
        for bad, what in (
            (difference == torch.inf, "outside of the support of the base: give a base that covers the posterior"),
            (~torch.isfinite(difference), "impossible under the model (log p(x, z) is -inf or NaN): no posterior draw"),
        ):
            if bool(bad.any()):
                raise ValueError(f"{int(bad.sum())} of {bad.numel()} given draws are {what}{_first(bad.any(0))}")
        return
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
