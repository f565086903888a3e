r"""Training objectives that are no bounds: a weighted divergence, and free bits.

.. math:: \mathrm E_q\log p(x|z_1) - \lambda(\text{step}) \sum_t \max\bigl(c,\ \overline{\mathrm{KL}_t}\bigr)

The value is no estimate of log p(x) and is never reported as one; :meth:`Regularised.per_datum` is the unweighted
bound behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count, check_number
from pyro_hvae.bounds.base import Bound, Estimate, Evaluable, Evaluation
from pyro_hvae.bounds.elbo import LayerwiseELBO, layer_terms
from pyro_hvae.bounds.gradients import averaged
from pyro_hvae.bounds.weighted import WeightBound
from pyro_hvae.problem import Problem, Run

__all__ = ["Regularised", "warm_up"]

Number = float | Callable[[Any], Any]


class Regularised(Evaluable):
    r"""A bound with weighted divergences, or with free bits: a surrogate for training.

    Args:
        bound: a :class:`LayerwiseELBO`, whose layers are weighted one by one; or a bound that is a function of the
            log-weights, each of which becomes :math:`\log p(x|z) + \lambda(\log p(z) - \log q(z|x))`.
        kl_weight: λ, a number >= 0 or a function of the step.  Below one it is a warm-up, above one a beta-VAE.
        free_bits: c in nats a layer, a number >= 0 or a function of the step.  The divergence of a layer, averaged
            over the minibatch, has no gradient below it.

    Functions of the step take a 0-dim tensor and should use tensor operations, as ``lambda step:
    (step / 1000).clamp(max=1.0)``.  Python's ``min`` and ``if`` read the tensor's value, which a compiled step can't.

    Attributes:
        step: a buffer, the number of steps so far: of ``loss_and_grads``, of the module form, or of ``fit``.

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
        for name, value in (("kl_weight", kl_weight), ("free_bits", free_bits)):
            if not callable(value):
                check_number(name, value, 0.0)
        self.kl_weight = kl_weight
        self.free_bits = free_bits
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        for step in (0, 1, 10, 100, 1_000, 10_000, 100_000):
            self.weights_at(step)

    step: Tensor

    def _arguments(self) -> dict[str, Any]:
        return {"bound": self.bound, "kl_weight": self.kl_weight, "free_bits": self.free_bits}

    def weights_at(self, step: int) -> tuple[float, float]:
        """Return (kl_weight, free_bits) at a step.

        Raises:
            ValueError: if either is negative.
        """
        weights = []
        for name in ("kl_weight", "free_bits"):
            value = float(_at(getattr(self, name), torch.tensor(float(step))))
            if not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {value} at step {step}")
            weights.append(value)
        return weights[0], weights[1]

    def advance(self) -> None:
        """Count a step."""
        self.step.add_(1)

    def restart(self) -> None:
        """Reset the step to zero."""
        self.step.zero_()

    def estimate(self, problem: Problem) -> Estimate:
        step = self.step.to(torch.get_default_dtype())
        weight, floor = _at(self.kl_weight, step), _at(self.free_bits, step)
        if isinstance(self.bound, LayerwiseELBO):
            analytic = self.bound.analytic(problem)
            run = self.bound.draw(problem)
            value = surrogate = self._layerwise(run, analytic, weight, floor)
        else:
            assert isinstance(self.bound, WeightBound)
            run = self.bound.draw(problem)
            value, surrogate = self._weighted(problem, run, weight)
        return Estimate(value, surrogate, run.scale, run=run)

    def evaluate(self, problem: Problem) -> Evaluation:
        """Return value and terms of the unweighted bound."""
        return self.bound.evaluate(problem)

    @property
    def _has_floor(self) -> bool:
        return callable(self.free_bits) or self.free_bits > 0

    def _layerwise(self, run: Run, analytic: frozenset[str], weight: Any, floor: Any) -> Tensor:
        assert isinstance(self.bound, LayerwiseELBO)
        terms = layer_terms(run, self.bound.divergences(run, analytic))
        rates = [name for name in terms if name.startswith("rate_")]
        if rates and self._has_floor:
            raise ValueError(
                f"free bits need a true divergence, and the term(s) {rates} are none: they may be negative in "
                "expectation. Use a guide that runs top-down (Ladder), or kl_weight alone"
            )
        value: Any = 0.0
        for name, term in terms.items():
            mean = term.mean(0)
            if name == "reconstruction":
                value = value + mean
            elif name.startswith("kl_") and self._has_floor:
                value = value - weight * mean.expand(run.shape[1:]).mean().clamp(min=floor)
            else:
                value = value - weight * mean
        return value.expand(run.shape[1:])

    def _weighted(self, problem: Problem, run: Run, weight: Any) -> tuple[Tensor, Tensor]:
        bound = self.bound
        assert isinstance(bound, WeightBound)
        if self._has_floor:
            raise ValueError(
                f"free bits need divergences layer by layer, and {bound!r} has none: "
                "use Regularised(LayerwiseELBO(), ...)"
            )
        if bound.gradient not in ("pathwise", "score", "vimco"):
            raise ValueError(f"the gradient {bound.gradient!r} is not derived for weighted log-weights: use 'pathwise'")
        if run.structure.enumerated_in_guide and bound.weights_of(run) is not run.log_ratios:
            raise ValueError(
                f"{bound!r} sums over the sites that the guide enumerates, and a weighted divergence has no such sum: "
                "use Regularised(TraceELBO(), ...)"
            )
        summed: Any = 0.0
        for name, term in layer_terms(run).items():
            summed = summed + (term if name == "reconstruction" else -weight * term)
        weights = summed.expand(run.shape)
        value = averaged(weights, bound.reduce, bound.num_repeats)
        return value, bound.surrogate(problem, run, weights, value)


def _at(number: Number, step: Tensor) -> Any:
    return number(step) if callable(number) else number


def warm_up(steps: int, start: float = 0.0) -> Callable[[Any], Any]:
    """Return a weight that rises linearly from ``start`` to 1 over ``steps`` steps, and is 1 afterwards.

    Raises:
        ValueError: for ``steps < 1`` or a start outside of [0, 1].

    Example:
        >>> warm_up(10)(5), warm_up(10)(torch.tensor(20))
        (0.5, tensor(1.))
    """
    check_count("steps", steps)
    check_number("start", start, 0.0, 1.0)

    def weight(step: Any) -> Any:
        value = start + (1.0 - start) * step / steps
        return value.clamp(max=1.0) if isinstance(value, Tensor) else min(1.0, value)

    return weight
