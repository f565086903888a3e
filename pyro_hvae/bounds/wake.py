r"""Forward-KL objectives: wake and sleep.

A guide trained by :math:`\mathrm{KL}(p(z|x)\,\|\,q(z|x))` covers the whole posterior instead of one mode,
and its gradient needs no reparameterisation:

.. math:: \text{wake: } \sum_k \tilde w_k\,\log q(z_k|x),\quad z_k\sim q(\cdot|x);
          \qquad \text{sleep: } \log q(z|x),\quad (z, x)\sim p.

Weights are self-normalised per datum, so minibatches scale as a plate does.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pyro_hvae.bounds.base import Estimate, Objective
from pyro_hvae.bounds.gradients import check_replayable, refuse_moved_deltas
from pyro_hvae.bounds.importance import IWELBO
from pyro_hvae.problem import Problem, Run, total

__all__ = ["ReweightedWakeSleep", "SleepPhase", "WakePhase"]


class WakePhase(Objective):
    """The guide's wake phase: maximise the self-normalised log q at its own draws.  Trains the guide alone.

    Args:
        num_particles: K >= 2; with one particle the weight is 1, and the gradient does not depend on the posterior.

    Raises:
        ValueError: for ``num_particles < 2``, or a subsampled plate that does not enclose all sites.

    Reference:
        Reweighted Wake-Sleep (Bornschein and Bengio, 2015).

    Example:
        >>> WakePhase(num_particles=10)
        WakePhase(num_particles=10)
    """

    trains: ClassVar[tuple[str, ...]] = ("guide",)

    def __init__(self, num_particles: int) -> None:
        super().__init__(num_particles)
        if num_particles < 2:
            raise ValueError(f"{type(self).__name__} needs num_particles >= 2, got {num_particles}")
        self._bound = IWELBO(num_particles, gradient="vimco")

    def estimate(self, problem: Problem) -> Estimate:
        with torch.no_grad():
            drawn = self._bound.draw(problem)
            self._bound.check(drawn.structure)
            weights = drawn.log_weights.softmax(0)
        check_density(problem, drawn, type(self).__name__)
        run = drawn.replay(freeze=False, detach=True)
        surrogate = (weights * self._learned(run)).sum(0)
        return Estimate(self._value(drawn, surrogate), surrogate, run.scale, run=run)

    def _learned(self, run: Run) -> Tensor:
        return total(run.log_q)

    def _value(self, drawn: Run, surrogate: Tensor) -> Tensor:
        return surrogate


def check_density(problem: Problem, run: Run, what: str) -> None:
    """Refuse programs whose log q at fixed draws has no valid gradient; checked once a structure.

    Raises:
        ValueError: naming the sites.
    """
    facts, key = run.structure.facts, ("density", what)
    if key in facts:
        check_replayable(problem, run, what)
        return
    if run.structure.enumerated_in_guide:
        raise ValueError(
            f"the guide enumerates {list(run.structure.enumerated_in_guide)}, and {what} learns from draws: remove the "
            "mark from the guide, or use TraceELBO"
        )
    check_replayable(problem, run, what)
    refuse_moved_deltas(run, f"{what}, which follows log q at fixed draws")
    facts[key] = True


class ReweightedWakeSleep(WakePhase):
    """Reweighted wake-sleep: the model follows the importance-weighted bound, the guide its wake phase.

    The value is the importance-weighted bound of the same draws, in nats.  Works with discrete draws, and with
    minibatches.

    Args:
        num_particles: K >= 2.

    Reference:
        Reweighted Wake-Sleep (Bornschein and Bengio, 2015); Revisiting Reweighted Wake-Sleep for Models with
        Stochastic Control Flow (Le et al., 2019).

    Example:
        >>> ReweightedWakeSleep(num_particles=10).trains
        ('model', 'guide')
    """

    trains = ("model", "guide")

    def _learned(self, run: Run) -> Tensor:
        return total(run.log_p) + total(run.log_q)

    def _value(self, drawn: Run, surrogate: Tensor) -> Tensor:
        return self._bound.reduce(drawn.log_weights)


class SleepPhase(Objective):
    """The guide's sleep phase: maximise log q at latents and data drawn from the model.  Trains the guide alone.

    The model runs on the same arguments with its observations drawn.  The simulated tensors then replace the observed
    ones in the arguments, and the guide is evaluated.

    Raises:
        ValueError: for a model whose data can't be simulated as a whole (:class:`~pyro_hvae.problem.Simulation`).

    Reference:
        The Wake-Sleep Algorithm for Unsupervised Neural Networks (Hinton et al., 1995).

    Example:
        >>> SleepPhase().is_bound
        False
    """

    trains = ("guide",)

    def estimate(self, problem: Problem) -> Estimate:
        simulated = problem.simulate()
        run = simulated.problem.run(values=simulated.values)
        value = total(run.log_q).expand(run.shape).mean(0)
        return Estimate(value, value, run.scale, run=run)
