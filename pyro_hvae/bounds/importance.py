r"""Multi-sample bounds: functions of K log-weights per datum.

With :math:`w_k = p(x, z_k)/q(z_k|x)` and :math:`z_k` drawn from the guide,

================== ============================================================================ ===============
class              estimate                                                                     at the ends
================== ============================================================================ ===============
IWELBO             :math:`\log\frac1K\sum_k w_k`                                                K = 1: ELBO
VRBound            :math:`\frac1{1-\alpha}\log\frac1K\sum_k w_k^{1-\alpha}`                     α = 0: IWELBO
ThermodynamicBound :math:`\sum_j(\beta_{j+1}-\beta_j)\sum_k \tilde w_k^{(\beta_j)}\log w_k`     β = (0): ELBO
================== ============================================================================ ===============

The logarithm of an average is per datum: the scale N/B of a minibatch is outside of it.  The scale of a subsampled
plate that does not enclose every site would enter the logarithm, and the estimate would be no bound, even in
expectation.  Such a plate is refused, unless ``share_globals`` makes the weights local.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count, check_number, check_switch
from pyro_hvae.bounds.base import Estimate, Evaluation, Treatment
from pyro_hvae.bounds.elbo import layer_terms
from pyro_hvae.bounds.gradients import averaged, fold, means_of_others, signal, without_each
from pyro_hvae.bounds.weighted import WeightBound, softmax_of, weighted_mean
from pyro_hvae.problem import Plate, Problem, Run, Structure
from pyro_hvae.problem.structure import shared_plates
from pyro_hvae.weights import chunks
from pyro_hvae.weights.means import unchecked_sample_size

__all__ = ["IWELBO", "MultiSampleBound", "ThermodynamicBound", "VRBound", "log_spacing"]


class MultiSampleBound(WeightBound):
    """Base class of multi-sample bounds: refusals, evaluation in chunks, and diagnostics of the weights.

    Args:
        chunk_size: number of particles that run at once without gradient (``per_datum``, ``terms``, ``loss``); memory
            grows with it, not with ``num_particles``.
    """

    def __init__(self, num_particles: int, gradient: str = "pathwise", *, chunk_size: int = 256) -> None:
        super().__init__(num_particles, gradient)
        chunks(1, chunk_size)  # refuses a size below 1
        self.chunk_size = chunk_size

    def refusals(self, structure: Structure) -> list[str]:
        refusals = super().refusals(structure)
        for plate in structure.partial:
            outside = [name for name, site in structure.sites.items() if plate not in site.plates]
            refusals.append(
                f"the subsampled plate '{plate.name}' shows {plate.size} of {plate.full_size} indices and does not "
                f"enclose the site(s) {outside}: the scale {plate.scale:g} would enter the logarithm of "
                f"{type(self).__name__}, which then bounds nothing. Use a single-sample bound (TraceELBO, "
                "LayerwiseELBO), IWELBO(..., share_globals=True) if there are latent sites inside of the plate, or "
                "the whole data set"
            )
        return refusals

    def draw(self, problem: Problem, num_particles: int | None = None, once: frozenset[str] = frozenset()) -> Run:
        problem.require_density(type(self).__name__)
        return super().draw(problem, num_particles, once)

    def runs(self, problem: Problem) -> Iterator[Run]:
        """Yield checked runs of at most ``chunk_size`` particles."""
        for count in chunks(self.num_draws, self.chunk_size):
            run = self.draw(problem, count)
            self.check(run.structure)
            yield run

    def estimate(self, problem: Problem) -> Estimate:
        if torch.is_grad_enabled():
            return super().estimate(problem)
        weights = []
        for run in self.runs(problem):
            weights.append(self.weights_of(run))
        value = averaged(torch.cat(weights), self.reduce, self.num_repeats)
        return Estimate(value, value, run.scale, run=run)

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return the bound and diagnostics of its weights; shape of the plates.

        Returns:
            ``bound`` (nats); ``reconstruction`` and ``rate_<site>``, whose difference is the ELBO of the same draws
            (nats); ``ess``, the effective sample size of the K weights (between 1 and K); and
            ``log_weight_variance`` (nats squared).
        """
        weights: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for run in self.runs(problem):
            weights.append(self.weights_of(run))
            for name, term in layer_terms(run).items():
                summed = term.expand(run.shape).sum(0)
                parts[name] = parts[name] + summed if name in parts else summed
        drawn = torch.cat(weights)
        ess = unchecked_sample_size(fold(drawn, self.num_repeats))
        value = averaged(drawn, self.reduce, self.num_repeats)
        terms = {
            "bound": value,
            **{name: term / self.num_draws for name, term in parts.items()},
            "ess": ess if self.num_repeats == 1 else ess.mean(0),
            "log_weight_variance": drawn.var(0) if self.num_draws > 1 else torch.zeros_like(drawn[0]),
        }
        return Evaluation(value, terms, run.structure, run.scale)


class IWELBO(MultiSampleBound):
    r"""Importance-weighted bound :math:`\log\frac1K\sum_k w_k` per datum.

    A lower bound on log p(x) in expectation that tightens with K; its gap falls as chi2(p||q)/(2K).

    Args:
        num_particles: K >= 1.
        gradient: ``"pathwise"``; ``"dreg"``, whose signal-to-noise ratio for the guide does not fall with K;
            ``"stl"``, biased for K > 1; ``"vimco"`` where a site has no reparameterised draws.
        num_repeats: M >= 1 independent bounds that are averaged, at a cost of M K draws.
        share_globals: draw the latents outside of the data plate once and weigh only the local ones,
            :math:`\log p(g)-\log q(g) + \frac NB\sum_n\log\frac1K\sum_k w_{nk}(g)`: unbiased under minibatches, and
            valid where the local draws are independent given g.  ``per_datum`` then has the local part.
        chunk_size: number of particles that run at once without gradient.

    Raises:
        ValueError: for counts below one, an unknown gradient, or a subsampled plate that does not enclose all sites.

    Reference:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016); Tighter Variational Bounds are
        Not Necessarily Better (Rainforth et al., 2018) for ``num_repeats``.

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> _ = torch.manual_seed(0)
        >>> IWELBO(num_particles=1000).per_datum(model, guide(scale=1.0), torch.tensor([0.0, 2.0])).round(decimals=1)
        tensor([-1.3000, -2.3000])
    """

    gradients = ("pathwise", "stl", "dreg", "vimco")

    def __init__(
        self,
        num_particles: int,
        gradient: str = "pathwise",
        *,
        num_repeats: int = 1,
        share_globals: bool = False,
        chunk_size: int = 256,
    ) -> None:
        super().__init__(num_particles, gradient, chunk_size=chunk_size)
        check_count("num_repeats", num_repeats)
        check_switch("share_globals", share_globals)
        if share_globals and gradient != "pathwise":
            raise ValueError(f"share_globals needs the gradient 'pathwise', got {gradient!r}")
        self.num_repeats = num_repeats
        self.share_globals = share_globals

    @property
    def num_draws(self) -> int:
        return self.num_particles * self.num_repeats

    def _arguments(self) -> dict[str, Any]:
        arguments = super()._arguments()
        if self.num_repeats > 1:
            arguments["num_repeats"] = self.num_repeats
        return arguments | ({"share_globals": True} if self.share_globals else {})

    def reduce(self, log_weights: Tensor) -> Tensor:
        return log_weights.logsumexp(0) - math.log(log_weights.shape[0])

    def leave_one_out(self, log_weights: Tensor) -> Tensor:
        count = len(log_weights)
        if count == 1:
            return log_weights
        others = torch.logaddexp(without_each(log_weights), means_of_others(log_weights)) - math.log(count)
        return signal(self.reduce(log_weights), others)

    def refusals(self, structure: Structure) -> list[str]:
        if not self.share_globals:
            return super().refusals(structure)
        local = _data_plate(structure)
        if local is None:
            return ["share_globals=True needs a plate around some of the latent sites; there is none in this pair"]
        kept = _local_plates(structure, local)
        return [
            f"plate '{plate.name}' shows {plate.size} of {plate.full_size} indices and does not enclose every site of "
            f"plate '{local.name}': its scale would enter a logarithm"
            for plate in structure.subsampled
            if plate not in kept
        ]

    def treatment(self, name: str, structure: Structure, dependencies: Any) -> Treatment:
        treatment = super().treatment(name, structure, dependencies)
        local = _data_plate(structure) if self.share_globals else None
        if local is not None and local not in structure.sites[name].plates:
            return Treatment(treatment.how, "drawn once, outside of the weights (share_globals)", treatment.gradient)
        return treatment

    def estimate(self, problem: Problem) -> Estimate:
        return self._shared(problem)[0] if self.share_globals else super().estimate(problem)

    def evaluate(self, problem: Problem) -> Evaluation:
        if not self.share_globals:
            return super().evaluate(problem)
        estimate, weights = self._shared(problem)
        ess = unchecked_sample_size(fold(weights, self.num_repeats))
        terms = {"bound": estimate.value, "ess": ess if self.num_repeats == 1 else ess.mean(0)}
        return Evaluation(estimate.value, terms, estimate.run.structure, estimate.scale, estimate.shared)

    def _shared(self, problem: Problem) -> tuple[Estimate, Tensor]:
        """Return the estimate with the global draws outside of the weights, and the local log-weights."""
        local = _data_plate(problem.structure)
        if local is None:
            self.check(problem.structure)
        assert local is not None
        _check_local(problem, local)
        run = self.draw(problem, once=_globals(problem.structure))
        self.check(run.structure)
        sites = run.structure.sites
        whole, inside = run.over(()), run.over(_local_plates(run.structure, local))
        shared: Any = 0.0
        weights: Any = 0.0
        for sign, terms, local_terms in ((1, whole.log_p, inside.log_p), (-1, whole.log_q, inside.log_q)):
            for name in terms:
                if local in sites[name].plates:
                    weights = weights + sign * local_terms[name]
                else:
                    shared = shared + sign * terms[name].mean()
        value = averaged(weights, self.reduce, self.num_repeats)
        return Estimate(value, value, inside.scale, shared=shared, run=run), weights


def _data_plate(structure: Structure) -> Plate | None:
    """Return the plate around the local latents: the outermost one around some latent sites and not around others."""
    counts: dict[Plate, int] = {}
    for name in structure.drawn:
        for plate in structure.sites[name].plates:
            counts[plate] = counts.get(plate, 0) + 1
    partial = {plate: count for plate, count in counts.items() if count < len(structure.drawn)}
    return max(partial, key=lambda plate: partial[plate]) if partial else None


def _local_plates(structure: Structure, local: Plate) -> tuple[Plate, ...]:
    return shared_plates(site.plates for site in structure.sites.values() if local in site.plates)


def _globals(structure: Structure) -> frozenset[str]:
    local = _data_plate(structure)
    return frozenset(name for name, site in structure.sites.items() if local not in site.plates)


def _check_local(problem: Problem, local: Plate) -> None:
    """Refuse a pair in which a site outside of the data plate depends on a draw inside of it."""
    structure, dependencies = problem.structure, problem.dependencies
    inner = {name for name in structure.drawn if local in structure.sites[name].plates}
    for edges in (dependencies.model, dependencies.guide):
        for name, parents in edges.items():
            if local not in structure.sites[name].plates and parents & inner:
                raise ValueError(
                    f"site '{name}' is outside of plate '{local.name}' and depends on "
                    f"{sorted(parents & inner)} inside of it, so the data are not independent given the global draws: "
                    "share_globals=True is no bound here"
                )


class VRBound(MultiSampleBound):
    r"""Variational Rényi bound :math:`\frac1{1-\alpha}\log\frac1K\sum_k w_k^{1-\alpha}` per datum.

    Between the importance-weighted bound (alpha = 0) and, for alpha towards 1, the ELBO; for alpha above 1 it lies
    below the ELBO.  At equal K, and on the same draws, it falls with alpha.

    Args:
        alpha: 0 <= alpha, not 1.
        num_particles: K >= 1.
        gradient: ``"pathwise"``, or ``"score"`` where a site has no reparameterised draws.

    Raises:
        ValueError: for ``alpha < 0`` or ``alpha == 1`` (use :class:`TraceELBO`), or as :class:`IWELBO`.

    Reference:
        Rényi Divergence Variational Inference (Li and Turner, 2016).

    Example:
        >>> VRBound(alpha=0.5, num_particles=8)
        VRBound(alpha=0.5, num_particles=8, gradient='pathwise')
    """

    gradients = ("pathwise", "score")

    def __init__(self, alpha: float, num_particles: int, gradient: str = "pathwise", *, chunk_size: int = 256) -> None:
        check_number("alpha", alpha)
        if alpha == 1:
            raise ValueError("VRBound has no alpha = 1; its limit there is the ELBO: use TraceELBO")
        if not (0 <= alpha < math.inf):
            raise ValueError(
                f"alpha must be finite and at least 0 for a lower bound, got {alpha}; an estimate from above is CUBO"
            )
        super().__init__(num_particles, gradient, chunk_size=chunk_size)
        self.alpha = float(alpha)

    def _arguments(self) -> dict[str, Any]:
        return {"alpha": self.alpha} | super()._arguments()

    def reduce(self, log_weights: Tensor) -> Tensor:
        power = 1.0 - self.alpha
        if abs(power) > 0.01:
            return ((power * log_weights).logsumexp(0) - math.log(log_weights.shape[0])) / power
        # Close to alpha = 1 the logarithm of a mean near 1 would lose its digits.
        top = log_weights.amax(0)
        below = torch.where(log_weights == top, torch.zeros_like(log_weights), log_weights - top)
        return top + torch.log1p(torch.expm1(power * below).mean(0)) / power


class ThermodynamicBound(MultiSampleBound):
    r"""Thermodynamic variational bound: a left Riemann sum of the path from guide to posterior.

    .. math:: \log p(x) = \int_0^1 \mathrm E_{\pi_\beta}[\log w]\,d\beta
              \ge \sum_j (\beta_{j+1}-\beta_j)\,\mathrm E_{\pi_{\beta_j}}[\log w],
              \qquad \pi_\beta \propto q^{1-\beta}\,p^{\beta},

    each expectation from the same K draws with weights :math:`w^{\beta_j}`, self-normalised.  On every set of draws
    it lies between their ELBO and their importance-weighted bound.

    Args:
        num_particles: K >= 1.
        betas: increasing, from 0, below 1 (a final 1.0 is dropped); or the number of equal steps.
            :func:`log_spacing` gives the spacing that the paper prefers.
        gradient: ``"pathwise"``, or ``"score"`` where a site has no reparameterised draws.

    Raises:
        ValueError: for betas that do not start at 0, do not increase, or leave [0, 1]; or as :class:`IWELBO`.

    Reference:
        The Thermodynamic Variational Objective (Masrani, Le and Wood, 2019).

    Example:
        >>> ThermodynamicBound(num_particles=4, betas=2).betas
        (0.0, 0.5)
    """

    gradients = ("pathwise", "score")

    def __init__(
        self,
        num_particles: int,
        betas: int | Sequence[float],
        gradient: str = "pathwise",
        *,
        chunk_size: int = 256,
    ) -> None:
        super().__init__(num_particles, gradient, chunk_size=chunk_size)
        if not isinstance(betas, Sequence) or isinstance(betas, str):
            check_count("betas, the number of temperatures", betas)
            assert isinstance(betas, int)
            points = tuple(j / betas for j in range(betas))
        else:
            for beta in betas:
                check_number("betas", beta)
            points = tuple(float(beta) for beta in betas)
            points = points[:-1] if points and points[-1] == 1.0 else points
        increasing = all(a < b for a, b in itertools.pairwise(points))  # NaN does not increase
        if not points or points[0] != 0.0 or not points[-1] < 1.0 or not increasing:
            raise ValueError(f"betas must start at 0, increase strictly and stay below 1, got {betas}")
        self.betas = points

    def _arguments(self) -> dict[str, Any]:
        return {"num_particles": self.num_particles, "betas": self.betas, "gradient": self.gradient}

    def reduce(self, log_weights: Tensor) -> Tensor:
        ends = (*self.betas[1:], 1.0)
        summed = ends[0] * log_weights.mean(0)
        for beta, following in zip(self.betas[1:], ends[1:], strict=True):
            summed = summed + (following - beta) * weighted_mean(softmax_of(beta * log_weights), log_weights)
        return summed


def log_spacing(num_betas: int, first: float = 0.025) -> tuple[float, ...]:
    """Return temperatures 0, ``first``, ... evenly spaced in log beta, below 1.

    Args:
        num_betas: how many temperatures, at least 2.
        first: the smallest above 0, in (0, 1).

    Raises:
        ValueError: for values outside of these ranges.

    Example:
        >>> log_spacing(3, first=0.25)
        (0.0, 0.25, 0.5)
    """
    if num_betas < 2 or not 0.0 < first < 1.0:
        raise ValueError(f"need num_betas >= 2 and 0 < first < 1, got {num_betas} and {first}")
    steps = num_betas - 1
    return (0.0, *(first ** (1 - j / steps) for j in range(steps)))
