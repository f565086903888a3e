r"""An interval for log p(x) that holds with a stated probability under stated assumptions.

From below, weights w >= 0 with :math:`\mathrm E[w]=p(x)` suffice, whatever their variance
(:func:`pyro_hvae.weights.product_lower`).  From above there are three ways: a sum over all values of discrete latents
is exact; exact posterior draws give weights with the mean 1/p(x), and a bound without any further assumption; without
them, the weights' variance has to be known (:func:`pyro_hvae.weights.variance_upper`), which is an assumption.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_hvae.evidence.bases import drawn_prior
from pyro_hvae.evidence.importance import log_evidence
from pyro_hvae.evidence.rounds import Search, Stage
from pyro_hvae.evidence.sides import DRAWS_ASSUMED, MOMENT_ASSUMED, NONE_ASSUMED
from pyro_hvae.notebook import html_of_lines
from pyro_hvae.problem import Problem, of_pair
from pyro_hvae.weights.confidence import log_inverse

__all__ = ["EvidenceInterval", "Interval", "evidence_interval"]

_BUDGET, _BUDGET_OF_TOLERANCE, _LEAST_BUDGET = 10_000, 100_000, 250


@dataclass(frozen=True)
class Interval:
    """Bounds of log p(x) in nats that hold together with a probability of at least 1 - delta.

    Attributes:
        lower, upper: the two sides, each with a probability of at least 1 - delta/2; ``inf`` for no upper side.
        delta: probability that one of them does not hold, under the assumptions.
        assumptions: of each side, under ``"lower"`` and ``"upper"``; apart from round-off.
        method: how the draws were made: ``"importance"``, ``"annealed"``, both, or ``"enumerate"``.
    """

    lower: Tensor
    upper: Tensor
    delta: float
    assumptions: Mapping[str, str]
    method: str

    @property
    def width(self) -> Tensor:
        """upper - lower, in nats."""
        return self.upper - self.lower


@dataclass(frozen=True)
class EvidenceInterval(Interval):
    """Interval of log p(x) for each datum, shape of the plates common to all sites, with that of the sum.

    Each datum's interval holds with probability 1 - delta by itself; :attr:`total` with the same probability.

    Attributes:
        total: the interval of the sum over the data (of a minibatch, over its rows), whose draws are independent of
            each other as a plate declares; narrower than the sum of the data's.
        estimate: the mean of Pareto-smoothed weights, in nats.  It is an estimate, and no bound.
        khat: of the weights.
        stages: where the evaluations were spent.
        notes: what was left out, and why.
    """

    total: Interval
    estimate: Tensor
    khat: Tensor
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        if not self.lower.dim():
            return "\n".join([self._of_all(), *self._remarks()])
        both, count = self.upper.isfinite(), self.lower.numel()
        head = f"log p(x) of {count} data, each with probability {1 - self.delta:g}: "
        if bool(both.any()):
            low, high, width = self.lower[both].mean(), self.upper[both].mean(), self.width[both].max()
            head += f"mean {float(low):.4f} to {float(high):.4f} nats, largest width {float(width):.4f}"
        missing = count - int(both.sum())
        if missing:
            low = self.lower[~both].mean()
            head += "; " if missing < count else ""
            head += f"no upper side for {missing}, mean lower side {float(low):.4f} nats"
        total = f"sum over the data: {float(self.total.lower):.4f} to {float(self.total.upper):.4f} nats"
        return "\n".join([head, total, *self._remarks()])

    def _of_all(self) -> str:
        """Describe the interval of data that share a latent, which have one weight."""
        head, low = f"log p(x) of all data together, with probability {1 - self.delta:g}: ", float(self.lower)
        if not bool(self.upper.isfinite()):
            return f"{head}no upper side, lower side {low:.4f} nats"
        return f"{head}{low:.4f} to {float(self.upper):.4f} nats, width {float(self.width):.4f}"

    def _remarks(self) -> list[str]:
        return [
            *(f"assumption {side}: {text}" for side, text in self.assumptions.items()),
            *(f"spent: {stage}" for stage in self.stages),
            *(f"note: {note}" for note in self.notes),
        ]

    def _repr_html_(self) -> str:
        return html_of_lines("Interval of log p(x)", str(self))


@of_pair
def evidence_interval(
    problem: Problem,
    *,
    delta: float = 0.05,
    tolerance: float | None = None,
    budget: int | None = None,
    posterior_samples: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> EvidenceInterval:
    r"""Bound log p(x) from both sides, with a stated probability and stated assumptions.

    A pilot of at most 1000 draws looks at k-hat, and is used for nothing else.  Data with a good one (0.5, so that
    the weights have a variance) are bounded by importance sampling, others by annealing where that is possible.  With
    a ``tolerance`` this repeats with four times as many draws until every datum's interval is narrow enough or the
    budget is spent; round r has :math:`2^{-r}\delta`, so that all hold together.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; or a bound
            :class:`~pyro_hvae.problem.Problem` instead of all of these.  Without a guide, draws are of the prior.
        delta: probability that an interval does not hold.
        tolerance: width in nats at which to stop; by default the budget is spent in one round.
        budget: evaluations of log p(x, z) a datum, at least 250; a gradient counts as one.  By default 10,000, and
            100,000 with a tolerance.
        posterior_samples: exact posterior draws by site, one for each datum (as :meth:`Problem.simulate` gives them),
            or M independent ones on the leftmost dim.  The upper side has no other assumption then.
        progress: show a bar.

    Returns:
        :class:`EvidenceInterval`.

    Raises:
        ValueError: for delta outside of (0, 1), a tolerance that is not positive, a budget below 250, posterior draws
            of other sites than the guide's, or as :func:`pyro_hvae.log_evidence`.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse, Ghahramani and Adams, 2015);
        Estimating Means of Bounded Random Variables by Betting (Waudby-Smith and Ramdas, 2024).

    Example:
        >>> import torch
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> interval = evidence_interval(model, guide(scale=1.0), torch.tensor([0.0, 2.0]))  # exact: -1.2655, -2.2655
        >>> bool((interval.lower < torch.tensor([-1.2655, -2.2655])).all()), bool((interval.width < 0.1).all())
        (True, True)
    """
    log_inverse(delta)
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is a width in nats, above 0, got {tolerance}; leave it out to spend the budget")
    spend = budget if budget is not None else _BUDGET if tolerance is None else _BUDGET_OF_TOLERANCE
    if spend < _LEAST_BUDGET:
        raise ValueError(f"budget is the number of evaluations a datum, at least {_LEAST_BUDGET}, got {budget}")
    source = problem if problem.guided else drawn_prior(problem)
    if source.structure.enumerated and not source.structure.drawn:
        return _exact(problem, delta)
    search = Search(source, posterior_samples, spend, progress)
    search.pilot()
    sides = search.rounds(delta, tolerance)
    upper = MOMENT_ASSUMED if posterior_samples is None else DRAWS_ASSUMED
    assumptions = {"lower": NONE_ASSUMED, "upper": upper}
    weights = search.weights
    total = Interval(sides.total_lower, sides.total_upper, delta, assumptions, search.method)
    return EvidenceInterval(
        sides.lower,
        sides.upper,
        delta,
        assumptions,
        search.method,
        total,
        search.estimate(weights),
        search.khat(weights),
        tuple(search.stages),
        tuple(search.notes),
    )


def _exact(problem: Problem, delta: float) -> EvidenceInterval:
    evidence = log_evidence(problem)
    value, none = evidence.value, "none: the sum over all values of the latents is exact"
    assumptions = {"lower": none, "upper": none}
    total = Interval(value.sum(), value.sum(), delta, assumptions, "enumerate")
    stage = Stage("enumerate", 1, 1, 0.0)
    return EvidenceInterval(
        value, value, delta, assumptions, "enumerate", total, value, evidence.khat, (stage,), ()
    )
