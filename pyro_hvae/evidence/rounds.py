"""Spend a budget of evaluations on the interval of log p(x): importance sampling, and annealing where it is needed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pyro_hvae.evidence.annealed import run_chains, tuned_moves
from pyro_hvae.evidence.gibbs import Gibbs
from pyro_hvae.evidence.importance import Sampling, draw_log_weights
from pyro_hvae.evidence.moves import Moves
from pyro_hvae.evidence.path import Path
from pyro_hvae.evidence.sandwich import posterior_starts
from pyro_hvae.evidence.sides import MOMENT_KHAT, Sides, Weights, smoothed_mean
from pyro_hvae.problem import Problem
from pyro_hvae.problem.draws import count_draws
from pyro_hvae.weights import check_weights, good_khat, log_mean_exp, pareto_khat, relative_variance
from pyro_hvae.weights.confidence import group_means, log_inverse

__all__ = ["Search", "Stage"]

R = TypeVar("R")

_PILOT = 1000
_CHAINS, _LEAPFROG, _REFRESHES, _LEAST_TEMPERATURES = 64, 3, 20, 8
_TUNED = 16
"""Chains of the pilot run that tunes the moves, which makes two moves at each temperature."""


@dataclass(frozen=True)
class Stage:
    """A part of the budget.

    Attributes:
        name: ``"pilot"``, ``"importance"``, ``"annealed"`` or ``"enumerate"``.
        draws: draws or chains a datum.
        evaluations: of log p(x, z) a datum, gradients among them.
        seconds: time.
    """

    name: str
    draws: int
    evaluations: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}, {self.draws} draws, {self.evaluations} evaluations a datum, {self.seconds:.1f} s"


class Search:
    """Rounds of draws for one problem.

    Args:
        problem: with the guide, or the prior, that draws.
        posterior_samples: exact posterior draws by site, or None.
        budget: evaluations a datum.

    Attributes:
        stages, notes: the report.
        weights: of the last round, by method.
        hard: data that are annealed.
    """

    def __init__(
        self, problem: Problem, posterior_samples: Mapping[str, Tensor] | None, budget: int, progress: bool
    ) -> None:
        self.problem, self.samples, self.progress = problem, posterior_samples, progress
        self.left = budget
        self.stages: list[Stage] = []
        self.notes: list[str] = []
        self.weights: dict[str, Weights] = {}
        self.move = _LEAPFROG + 1  # evaluations of a move of annealing
        self.num_samples = 0 if posterior_samples is None else self._count_samples(posterior_samples)

    @property
    def method(self) -> str:
        """Names of the methods that gave bounds."""
        if "annealed" not in self.weights:
            return "importance"
        return "annealed" if bool(self.hard.all()) else "importance, annealed"

    def pilot(self) -> None:
        """Look at k-hat by draws that are used for nothing else; choose the data that are annealed."""
        count = min(_PILOT, self.left // 10)
        weights = self._timed("pilot", count, count, lambda: self._draw(count))
        self.variance = relative_variance(weights)
        self.hard = self._above(pareto_khat(weights), count)

    def _above(self, khat: Tensor, draws: int) -> Tensor:
        """Return which data are to be annealed; none where that is impossible."""
        hard = khat > (good_khat(draws) if self.num_samples else MOMENT_KHAT)
        if not bool(hard.any()):
            return hard
        try:
            self.problem.require_density("annealing")
            path = Path(self.problem, 2)
            gibbs = Gibbs(path)
            gibbs(path.start(), 0.0)  # refuses a base without density at a possible value
            self.move = (_LEAPFROG + 1 if path.transforms else 0) + gibbs.evaluations
        except ValueError as error:
            self._note(f"k-hat asks for annealing for {int(hard.sum())} data, which is not possible: {error}")
            return torch.zeros_like(hard)
        return hard

    def rounds(self, delta: float, tolerance: float | None) -> Sides:
        """Return the sides after one round, or after as many as the tolerance needs."""
        if tolerance is None:
            sides = self._round(self.left, delta)
            missing = int(sides.upper.isinf().sum())
            if missing:
                self._note(
                    f"no upper side for {missing} data, where k-hat of the weights is above {MOMENT_KHAT:g} or the "
                    "draws are too few: give a larger budget, a guide with wider tails, or posterior_samples"
                )
            return sides
        before, share = None, delta / 2
        need = float(8 * self.variance.max() * (log_inverse(share) + 1.5)) / tolerance**2
        wanted = 1000 if not need < 1e9 else int(need) + 500
        while True:
            now = self._round(min(wanted, self.left), share)
            sides = now if before is None else before.intersect(now)
            if bool((sides.upper - sides.lower <= tolerance).all()):
                return sides
            if self.left < 250:
                width = float((sides.upper - sides.lower).max())
                self._note(f"the budget is spent at a largest width of {width:.3g} nats, tolerance {tolerance:g}")
                return sides
            plain = self.weights["importance"].forward
            self.hard = self.hard | self._above(pareto_khat(plain), len(plain))  # for rounds of other draws
            wanted, share, before = 4 * wanted, share / 2, sides

    def estimate(self, weights: Mapping[str, Weights]) -> Tensor:
        """Return the mean of the smoothed weights."""
        return self._merged({name: smoothed_mean(one.forward) for name, one in weights.items()})

    def khat(self, weights: Mapping[str, Weights]) -> Tensor:
        """Return k-hat of the weights."""
        return self._merged({name: pareto_khat(one.forward) for name, one in weights.items()})

    def _merged(self, values: Mapping[str, Tensor]) -> Tensor:
        if "annealed" not in values:
            return values["importance"]
        return torch.where(self.hard, values["annealed"], values["importance"])

    def _round(self, budget: int, delta: float) -> Sides:
        number = self._temperatures(budget) if bool(self.hard.any()) else 0
        draws = budget // 4 if number else budget
        plain = self._importance(max(draws, min(self.left, _CHAINS)))
        self.weights = {"importance": plain}
        if not number:
            return Sides.of(plain, delta)
        annealed = self._annealed(number)
        self.weights["annealed"] = annealed
        merged = Sides.of(plain.where(self.hard, annealed), delta)
        of_datum = Sides.of(plain, delta).where(self.hard, Sides.of(annealed, delta))
        return Sides(of_datum.lower, of_datum.upper, merged.total_lower, merged.total_upper)

    def _temperatures(self, budget: int) -> int:
        """Return how many temperatures three quarters of a budget allow; 0 if these are too few."""
        cost, refreshes = self._cost_of_temperature(), self._cost_of_refreshes()
        number = (budget - budget // 4 - refreshes) // cost
        if number < _LEAST_TEMPERATURES:
            least = math.ceil((_LEAST_TEMPERATURES * cost + refreshes) / 0.75) + _PILOT
            self._note(
                f"annealing of {int(self.hard.sum())} data with a high k-hat was left out: it needs a budget of "
                f"{least} evaluations or more"
            )
            return 0
        return number

    def _cost_of_temperature(self) -> int:
        directions = 2 if self.num_samples else 1
        return 2 * _TUNED * self.move + directions * _CHAINS * (self.move + 1)

    def _cost_of_refreshes(self) -> int:
        return _CHAINS * _REFRESHES * self.move if self.num_samples else 0

    def _importance(self, draws: int) -> Weights:
        spent = max(draws - self.num_samples, 1)

        def weigh() -> Weights:
            forward = self._draw(spent)
            return Weights(forward, self._inverse(forward) if self.num_samples else None)

        return self._timed("importance", spent, spent + self.num_samples, weigh)

    def _draw(self, count: int) -> Tensor:
        return draw_log_weights(self.problem, Sampling(count, None, self.progress))

    def _inverse(self, forward: Tensor) -> Tensor:
        """Return logs of M estimates of 1/p(x): each of one posterior draw together with draws of the guide.

        The mean of K weights, one of a posterior draw and K - 1 of the guide's, has an inverse of mean 1/p(x).
        """
        count = min(self.num_samples, len(forward))
        exact = self._posterior_weights()[:count]
        check_weights(-exact)
        groups = group_means(forward, count)
        size = torch.tensor(float(len(forward) // count), dtype=exact.dtype, device=exact.device)
        return (1 + size).log() - torch.logaddexp(exact, groups + size.log())

    def _posterior_weights(self) -> Tensor:
        assert self.samples is not None
        parts, start = [], 0
        with torch.no_grad():
            for count in Sampling(self.num_samples).counts(self.problem):
                values = self.samples
                if self.num_samples > 1:
                    values = {name: value[start : start + count] for name, value in self.samples.items()}
                parts.append(self.problem.run(count, values).log_weights)
                start += count
        return torch.cat(parts)

    def _annealed(self, temperatures: int) -> Weights:
        def weigh() -> Weights:
            moves = tuned_moves(self.problem, _TUNED, temperatures, _LEAPFROG)
            forward = run_chains(moves.on(Path(self.problem, _CHAINS)), progress=self.progress).log_weights
            check_weights(forward)
            return Weights(forward, self._reverse(moves) if self.num_samples else None)

        cost = temperatures * self._cost_of_temperature() + self._cost_of_refreshes()
        return self._timed("annealed", _CHAINS, cost, weigh)

    def _reverse(self, moves: Moves) -> Tensor:
        """Return logs of estimates of 1/p(x) by chains from posterior draws.

        Chains from one draw depend on each other, so that their mean is a single estimate.
        """
        assert self.samples is not None
        single = self.num_samples == 1
        count = _CHAINS if single else min(self.num_samples, _CHAINS)
        path = Path(self.problem, count)
        samples = self.samples if single else {name: value[:count] for name, value in self.samples.items()}
        starts = posterior_starts(samples, path)
        chains = run_chains(moves.on(path), reverse_from=starts, num_refreshes=_REFRESHES, progress=self.progress)
        check_weights(-chains.log_weights)
        return log_mean_exp(-chains.log_weights)[None] if single else -chains.log_weights

    def _count_samples(self, samples: Mapping[str, Tensor]) -> int:
        drawn = self.problem.structure.drawn
        missing = sorted(set(drawn) - set(samples))
        if missing:
            raise ValueError(
                f"posterior_samples has no site {missing}, which the guide draws; it has {sorted(samples)}. Where the "
                "guide draws sites of its own, give guide=None, so that draws are of the prior"
            )
        self.samples = {name: samples[name] for name in drawn}
        return count_draws(self.problem, self.samples)

    def _timed(self, name: str, draws: int, evaluations: int, work: Callable[[], R]) -> R:
        start = time.perf_counter()
        result = work()
        self.left -= evaluations
        self.stages.append(Stage(name, draws, evaluations, time.perf_counter() - start))
        return result

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
