r"""Forward-KL objectives: wake and sleep.

A guide trained by :math:`\mathrm{KL}(p(z|x)\,\|\,q(z|x))` covers the posterior instead of settling in a part of it,
and its gradient needs no reparameterisation:

.. math:: \text{wake: } \sum_k \tilde w_k\,\log q(z_k|x),\quad z_k\sim q(\cdot|x);
          \qquad \text{sleep: } \log q(z|x),\quad (z, x)\sim p.

Weights are self-normalised per datum, so minibatches scale as a plate does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor

from pyro_hvae.bounds.base import Estimate, Objective, Program
from pyro_hvae.bounds.importance import IWELBO
from pyro_hvae.traces import Reading, given, simulate
from pyro_hvae.traces.reading import total

__all__ = ["ReweightedWakeSleep", "SleepPhase", "WakePhase"]


class WakePhase(Objective):
    """The guide's wake phase: maximise the self-normalised log q at its own draws.  Trains the guide alone.

    Args:
        num_particles: K >= 2; with one particle the weight is one and nothing pulls the guide to the posterior.

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

    def estimate(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Estimate, Reading]:
        with torch.no_grad():
            drawn = self._bound.read(model, guide, args, kwargs)
            self._bound.check(drawn.structure)
            weights = drawn.log_weights.softmax(0)
        reading = drawn.replay(freeze=False, detach=True)
        surrogate = (weights * self._learned(reading)).sum(0)
        return Estimate(self._value(drawn, surrogate), surrogate, reading.scale), reading

    def _learned(self, reading: Reading) -> Tensor:
        return total(reading.log_q)

    def _value(self, drawn: Reading, surrogate: Tensor) -> Tensor:
        return surrogate


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

    def _learned(self, reading: Reading) -> Tensor:
        return total(reading.log_p) + total(reading.log_q)

    def _value(self, drawn: Reading, surrogate: Tensor) -> Tensor:
        return self._bound.reduce(drawn.log_weights)


class SleepPhase(Objective):
    """The guide's sleep phase: maximise log q at latents and data that the model dreams up.  Trains the guide alone.

    The model runs with its observations released, on the same arguments; in those the observed tensors are then
    replaced by the dreamt ones, and the guide is evaluated.

    Raises:
        ValueError: if no argument is an observed tensor of the model, so that the guide could not see the dream.

    Reference:
        The Wake-Sleep Algorithm for Unsupervised Neural Networks (Hinton et al., 1995).

    Example:
        >>> SleepPhase().is_bound
        False
    """

    trains = ("guide",)

    def estimate(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Estimate, Reading]:
        with pyro.validation_enabled(False):  # given() checks what is new, once
            latents, dreamt_args, dreamt_kwargs = simulate(model, args, kwargs)
        reading = given(model, guide, latents, dreamt_args, dreamt_kwargs)
        value = total(reading.log_q).expand_as(reading.log_weights.detach()).mean(0)
        return Estimate(value, value, reading.scale), reading
