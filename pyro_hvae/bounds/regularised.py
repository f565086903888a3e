r"""Objectives for training that are no bounds: a weighted divergence, and free bits.

.. math:: \mathrm E_q\log p(x|z_1) - \lambda(\text{step}) \sum_t \max\bigl(c,\ \overline{\mathrm{KL}_t}\bigr)

The value is no estimate of log p(x) and is never reported as one; :meth:`Regularised.per_datum` is the unweighted
bound that it was built on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.bounds.base import Bound, Estimate, Objective, Program, WeightBound
from pyro_hvae.bounds.elbo import LayerwiseELBO, layer_terms
from pyro_hvae.bounds.gradients import GRADIENTS, averaged
from pyro_hvae.traces import Reading

__all__ = ["Regularised", "warm_up"]

Number = float | Callable[[int], float]


class Regularised(Objective):
    r"""A bound with its divergences weighted, or held above a floor: a surrogate for training.

    Args:
        bound: a :class:`LayerwiseELBO`, whose layers are weighted one by one; or a bound that is a function of the
            log-weights, each of which becomes :math:`\log p(x|z) + \lambda(\log p(z) - \log q(z|x))`.
        kl_weight: λ, a number >= 0 or a function of the step.  Below one it is a warm-up, above one a beta-VAE.
        free_bits: c in nats a layer, a number >= 0 or a function of the step.  The divergence of a layer, averaged
            over the minibatch, costs nothing below it.

    Attributes:
        step: how many losses with a gradient have been computed; set it to resume.

    Raises:
        TypeError: if ``bound`` is not such a bound.
        ValueError: for negative weights; for free bits on a layer whose term is no true KL (``rate_<site>``).

    References:
        Ladder Variational Autoencoders (Sonderby et al., 2016) for the warm-up; beta-VAE (Higgins et al., 2017);
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016) for free bits.

    Example:
        >>> objective = Regularised(LayerwiseELBO(), kl_weight=warm_up(1000))
        >>> objective.weights_at(250)
        (0.25, 0.0)
    """

    def __init__(self, bound: Bound, kl_weight: Number = 1.0, free_bits: Number = 0.0) -> None:
        if not isinstance(bound, (LayerwiseELBO, WeightBound)):
            raise TypeError(
                f"Regularised takes LayerwiseELBO or a bound of log-weights (TraceELBO, IWELBO, ...), got {bound!r}"
            )
        if getattr(bound, "share_globals", False):
            raise TypeError("Regularised does not weigh the global draws of IWELBO(share_globals=True)")
        super().__init__(bound.num_particles)
        self.bound = bound
        self.kl_weight = kl_weight
        self.free_bits = free_bits
        self.step = 0
        self.weights_at(0)
        # Kept as a tensor and written in place, so that a compiled step reads the value of the moment.
        self._weight = torch.zeros(2)

    def _arguments(self) -> dict[str, Any]:
        return {"bound": self.bound, "kl_weight": self.kl_weight, "free_bits": self.free_bits}

    def weights_at(self, step: int) -> tuple[float, float]:
        """(kl_weight, free_bits) at a step.

        Raises:
            ValueError: if either is negative.
        """
        found = []
        for name in ("kl_weight", "free_bits"):
            given = getattr(self, name)
            value = float(given(step) if callable(given) else given)
            if not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {value} at step {step}")
            found.append(value)
        return found[0], found[1]

    def set_step(self, step: int) -> None:
        """Make ``step`` the present one; :mod:`pyro_hvae.compile` does so before each compiled call."""
        self.step = step
        weight, floor = self.weights_at(step)
        self._weight[0].fill_(weight)
        self._weight[1].fill_(floor)

    def estimate(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Estimate, Reading]:
        self.set_step(self.step)
        reading = self.bound.read(model, guide, args, kwargs)
        some = reading.log_weights if isinstance(self.bound, WeightBound) else next(iter(reading.log_p.values()))
        if self._weight.device != some.device or self._weight.dtype != some.dtype:
            self._weight = self._weight.to(some)
        if isinstance(self.bound, LayerwiseELBO):
            value = surrogate = self._layerwise(self.bound, model, guide, args, kwargs, reading)
        else:
            value, surrogate = self._weighted(reading)
        if torch.is_grad_enabled():
            self.step += 1
        return Estimate(value, surrogate, reading.scale), reading

    def per_datum(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The unweighted bound for each datum, in nats."""
        return self.bound.per_datum(model, guide, *args, **kwargs)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The terms of the unweighted bound, in nats."""
        return self.bound.terms(model, guide, *args, **kwargs)

    def _layerwise(
        self,
        bound: LayerwiseELBO,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: Mapping[str, Any],
        reading: Reading,
    ) -> Tensor:
        terms = layer_terms(reading, bound.divergences(model, guide, args, kwargs, reading))
        _, floor = self.weights_at(self.step)
        rates = [name for name in terms if name.startswith("rate_")]
        if rates and (callable(self.free_bits) or floor > 0):
            raise ValueError(
                f"free bits need a true divergence, and the term(s) {rates} are none: they may be negative in "
                "expectation. Use a guide that runs top-down (Ladder), or kl_weight alone"
            )
        weight, minimum = self._weight.clone()  # the next step writes in place, maybe before this one's backward
        shape = tuple(plate.size for plate in reading.plates)
        value = torch.zeros(shape, dtype=self._weight.dtype, device=self._weight.device)
        for name, term in terms.items():
            mean = term.mean(0)
            if name == "reconstruction":
                value = value + mean
            elif name.startswith("kl_") and (callable(self.free_bits) or floor > 0):
                value = value - weight * mean.expand(shape).mean().clamp(min=minimum)
            else:
                value = value - weight * mean
        return value

    def _weighted(self, reading: Reading) -> tuple[Tensor, Tensor]:
        bound = self.bound
        assert isinstance(bound, WeightBound)
        if callable(self.free_bits) or self.free_bits > 0:
            raise ValueError(
                f"free bits need divergences layer by layer, and {bound!r} has none: "
                "use Regularised(LayerwiseELBO(), ...)"
            )
        if bound.gradient not in ("pathwise", "score", "vimco"):
            raise ValueError(f"the gradient {bound.gradient!r} is not derived for weighted log-weights: use 'pathwise'")
        weight = self._weight[0].clone()  # the next step writes in place, maybe before this one's backward
        terms = layer_terms(reading)
        log_weights = sum(term if name == "reconstruction" else -weight * term for name, term in terms.items())
        reading.log_weights = log_weights.expand_as(reading.log_weights)  # type: ignore[union-attr]
        value = averaged(reading.log_weights, bound.reduce, bound.num_repeats)
        if not torch.is_grad_enabled() or bound.gradient == "pathwise":
            return value, value
        return value, GRADIENTS[bound.gradient](reading, bound.reduce, bound.num_repeats)


def warm_up(steps: int, start: float = 0.0) -> Callable[[int], float]:
    """A weight that rises linearly from ``start`` to 1 over ``steps`` steps, and stays there.

    Raises:
        ValueError: for ``steps < 1`` or a start outside of [0, 1].

    Example:
        >>> warm_up(10)(5)
        0.5
    """
    if steps < 1 or not 0.0 <= start <= 1.0:
        raise ValueError(f"need steps >= 1 and 0 <= start <= 1, got {steps} and {start}")
    return lambda step: min(1.0, start + (1.0 - start) * step / steps)
