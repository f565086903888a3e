r"""Estimates of log p(x) from above.

With weights :math:`w = p(x, z)/q(z|x)`,

.. math:: \mathrm{CUBO}_n = \tfrac1n\log\mathrm E_q[w^n] \ge \log p(x),
          \qquad \mathrm{EUBO} = \mathrm E_{p(z|x)}[\log w] \ge \log p(x).

These inequalities hold for the *population* values.  What K draws give does not inherit them: the logarithm of an
average is low in expectation, self-normalised weights lean towards the guide, and where a moment is infinite a
calm figure says nothing.  Both are therefore estimates and no bounds (``is_bound`` is False); the exception is
:meth:`EUBO.from_posterior` on exact posterior draws, whose expectation is the population value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.bounds.base import Estimate, Objective, Program
from pyro_hvae.bounds.importance import IWELBO
from pyro_hvae.traces import Reading, given, read
from pyro_hvae.traces.parameters import frozen, param_sites
from pyro_hvae.traces.running import isolated

__all__ = ["CUBO", "EUBO"]


class _FromAbove(Objective):
    """An estimate that a guide is trained to push down, while the model stands still."""

    trains = ("guide",)

    def __init__(self, num_particles: int, *, chunk_size: int = 256) -> None:
        super().__init__(num_particles)
        # The refusals are those of any function of log-weights: N/B must not enter the logarithm.
        self._weights = IWELBO(num_particles, "vimco", chunk_size=chunk_size)

    def reduce(self, log_weights: Tensor) -> Tensor:
        raise NotImplementedError

    def estimate(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Estimate, Reading]:
        if not torch.is_grad_enabled():
            weights, reading = self._weights._weights(model, guide, args, kwargs)
            value = -self.reduce(weights)
            return Estimate(value, value, reading.scale), reading
        with frozen(self._of_model(model, guide, args, kwargs)):
            reading = self._weights.read(model, guide, args, kwargs)
            self._check_reparameterised(reading)
            value = self.reduce(reading.log_weights)
        return Estimate(-value, -value, reading.scale), reading

    def _check_reparameterised(self, reading: Reading) -> None:
        sites = reading.structure.sites
        fixed = [name for name in reading.structure.drawn if not sites[name].has_rsample]
        if fixed:
            raise ValueError(
                f"site(s) {fixed} have no reparameterised draws, and {type(self).__name__} has the pathwise gradient "
                "alone: train the guide by WakePhase or ReweightedWakeSleep, or by a bound from below "
                '(TraceELBO(gradient="score"), IWELBO(gradient="vimco")); per_datum needs no gradient'
            )

    def _of_model(self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Parameters of the model; a plain function has to be run once more to name its own."""
        if isinstance(model, nn.Module):
            return list(model.parameters())
        with isolated(model, guide), torch.no_grad():
            return list(param_sites(read(model, guide, args, kwargs).model_trace).values())

    def per_datum(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The estimate for each datum in nats, without gradient; shape of the plates common to all sites."""
        with torch.no_grad():
            return self.reduce(self._weights._weights(model, guide, args, kwargs)[0])

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The estimate (``estimate``, nats) and the quality of its weights, shape of the plates."""
        with torch.no_grad():
            weights = self._weights._weights(model, guide, args, kwargs)[0]
            return {
                "estimate": self.reduce(weights),
                "ess": torch.exp(2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)),
                "log_weight_variance": weights.var(0) if len(weights) > 1 else torch.zeros_like(weights[0]),
            }


class CUBO(_FromAbove):
    r"""The chi upper estimate :math:`\frac1n\log\frac1K\sum_k w_k^n` per datum.

    Its loss is the estimate itself, to be pushed down by the guide; parameters of the model are held still.

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
        if not (1 < order < math.inf):
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

    :meth:`from_posterior` replaces the weights by given posterior draws; with exact ones it is an upper bound in
    expectation.  Exact ones exist for simulated data: the latents that a datum was simulated from.

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
        return (log_weights.softmax(0) * log_weights).sum(0)

    @staticmethod
    def from_posterior(
        model: Program, guide: Program, samples: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Mean log-weight at draws of the posterior, an upper bound in expectation if they are exact.

        Args:
            samples: for each latent site a tensor of S draws on the leftmost dimension, or of one draw without it.

        Returns:
            Tensor of the shape of the plates, in nats, without gradient.

        Raises:
            ValueError: if a site that the guide draws is not among ``samples``.
        """
        with torch.no_grad():
            return given(model, guide, samples, args, kwargs).log_weights.mean(0)
