r"""Estimates of log p(x) from above.

With weights :math:`w = p(x, z)/q(z|x)`,

.. math:: \mathrm{CUBO}_n = \tfrac1n\log\mathrm E_q[w^n] \ge \log p(x),
          \qquad \mathrm{EUBO} = \mathrm E_{p(z|x)}[\log w] \ge \log p(x).

These inequalities hold for the *population* values, not for estimates from K draws: the logarithm of an average is
biased downwards, self-normalised weights are biased towards the guide, and where a moment is infinite a stable
estimate shows nothing.  Both are therefore estimates and no bounds (``is_bound`` is False); the exception is
:meth:`EUBO.from_posterior` on exact posterior draws, whose expectation is the population value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from pyro_hvae.arguments import check_number
from pyro_hvae.bounds.base import Estimate, Evaluable, Evaluation
from pyro_hvae.bounds.importance import IWELBO
from pyro_hvae.bounds.weighted import softmax_of, weighted_mean
from pyro_hvae.problem import Problem, Run, problem_of
from pyro_hvae.problem.draws import count_draws
from pyro_hvae.problem.isolation import RUNNING, evaluating, kept_buffers, kept_generators
from pyro_hvae.problem.parameters import frozen, param_sites
from pyro_hvae.weights.means import unchecked_sample_size

__all__ = ["CUBO", "EUBO"]


class _FromAbove(Evaluable):
    """An estimate from above: training lowers it in the guide's parameters alone."""

    trains = ("guide",)
    from_above = True

    def __init__(self, num_particles: int, *, chunk_size: int = 256) -> None:
        super().__init__(num_particles)
        # The refusals are those of any function of log-weights: N/B must not enter the logarithm.
        self._weights = IWELBO(num_particles, "vimco", chunk_size=chunk_size)

    def reduce(self, log_weights: Tensor) -> Tensor:
        raise NotImplementedError

    def estimate(self, problem: Problem) -> Estimate:
        if not torch.is_grad_enabled():
            weights, run = self._drawn(problem)
            value = -self.reduce(weights)
            return Estimate(value, value, run.scale, run=run)
        with frozen(self._of_model(problem)):
            run = self._weights.draw(problem)
            self._check_reparameterised(run)
            value = self.reduce(run.log_weights)
        return Estimate(-value, -value, run.scale, run=run)

    def _drawn(self, problem: Problem) -> tuple[Tensor, Run]:
        """Return all log-weights, and the run of the last chunk."""
        parts = []
        for run in self._weights.runs(problem):
            parts.append(run.log_weights)
        return torch.cat(parts), run

    def _check_reparameterised(self, run: Run) -> None:
        sites = run.structure.sites
        fixed = [n for n in run.structure.drawn if not sites[n].has_rsample and not sites[n].enumerated_in_guide]
        if fixed:
            raise ValueError(
                f"site(s) {fixed} have no reparameterised draws, and {type(self).__name__} has the pathwise gradient "
                "alone: train the guide by WakePhase or ReweightedWakeSleep, or by a bound from below "
                '(TraceELBO(gradient="score"), IWELBO(gradient="vimco")); per_datum needs no gradient'
            )

    def _of_model(self, problem: Problem) -> list[Tensor]:
        """Return the parameters of the model; a plain function is run once to list them.

        Those that this run makes stay in Pyro's store, so that the run which follows reads the same tensors.
        """
        if isinstance(problem.model, nn.Module):
            return list(problem.model.parameters())
        with RUNNING, torch.no_grad(), kept_generators(), poutine.block(), kept_buffers(problem.model, problem.guide):
            return list(param_sites(problem.run().model_trace).values())

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return the estimate (``estimate``, nats) and diagnostics of its weights, shape of the plates."""
        weights, run = self._drawn(problem)
        value = self.reduce(weights)
        terms = {
            "estimate": value,
            "ess": unchecked_sample_size(weights),
            "log_weight_variance": weights.var(0) if len(weights) > 1 else torch.zeros_like(weights[0]),
        }
        return Evaluation(value, terms, run.structure, run.scale)


class CUBO(_FromAbove):
    r"""The chi upper estimate :math:`\frac1n\log\frac1K\sum_k w_k^n` per datum.

    Its loss is the estimate, which the guide minimises; parameters of the model are frozen.

    Args:
        order: n > 1; the population value is finite only where the weights have an n-th moment.
        num_particles: K >= 1.  At finite K the estimate may lie below log p(x).

    Raises:
        ValueError: for an order that is not above 1, counts below one, or a subsampled plate that does not
            enclose all sites.

    Reference:
        Variational Inference via chi Upper Bound Minimization (Dieng et al., 2017).

    Example:
        >>> CUBO(order=2, num_particles=100).is_bound
        False
    """

    def __init__(self, order: float = 2, num_particles: int = 100, *, chunk_size: int = 256) -> None:
        super().__init__(num_particles, chunk_size=chunk_size)
        check_number("order", order)
        if not order > 1:
            raise ValueError(
                f"order must be above 1 and finite, got {order}; for 0 <= 1 - alpha <= 1 use VRBound(alpha)"
            )
        self.order = order

    def _arguments(self) -> dict[str, Any]:
        return {"order": self.order, "num_particles": self.num_particles}

    def reduce(self, log_weights: Tensor) -> Tensor:
        return ((self.order * log_weights).logsumexp(0) - math.log(log_weights.shape[0])) / self.order


class EUBO(_FromAbove):
    r"""The evidence upper estimate :math:`\sum_k\tilde w_k\log w_k` per datum, self-normalised.

    :meth:`from_posterior` replaces the weights by posterior draws; with exact ones it is an upper bound in expectation.
    Exact ones exist for simulated data: the latents that a datum was simulated from.

    Draws of weight zero are dropped.  Where the model's density jumps to zero, the pathwise gradient does not
    see draws that cross the jump.

    Args:
        num_particles: K >= 1.

    Raises:
        ValueError: for counts below one, or a subsampled plate that does not enclose all sites.

    Reference:
        Stochastic Variational Inference via Upper Bound (Ji and Shen, 2019).

    Example:
        >>> EUBO(num_particles=10)
        EUBO(num_particles=10)
    """

    def reduce(self, log_weights: Tensor) -> Tensor:
        return weighted_mean(softmax_of(log_weights), log_weights)

    @staticmethod
    @evaluating()
    def from_posterior(model: Any, guide: Any, samples: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean log-weight at posterior draws, an upper bound in expectation if they are exact.

        Args:
            samples: for each latent site a tensor of S draws on the leftmost dimension, or of one draw without it.

        Returns:
            Tensor of the shape of the plates, in nats, without gradient.

        Raises:
            ValueError: if a site that the guide draws is not among ``samples``.
        """
        with torch.no_grad():
            problem = problem_of(model, guide, args, kwargs)
            return problem.run(count_draws(problem, samples), samples).log_weights.mean(0)
