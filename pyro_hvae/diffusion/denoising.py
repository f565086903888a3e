r"""The generative chain of a diffusion: one denoiser behind every kernel.

.. math:: p(z_T) = N(0, I),\qquad p(z_{t-1}|z_t) = q(z_{t-1}|z_t, x=\hat x(z_t;\gamma_t)),\qquad p(x|z_1).

Kernels are created lazily, one at a time, so that a thousand layers need no thousand modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_hvae import distributions
from pyro_hvae.arguments import check_choice
from pyro_hvae.diffusion.levels import broadcast_level, check_event_shape
from pyro_hvae.diffusion.parameterisations import PARAMETERISATIONS, convert
from pyro_hvae.diffusion.process import Noising, grid_like
from pyro_hvae.diffusion.reverse import ReverseChain
from pyro_hvae.diffusion.schedules import Schedule
from pyro_hvae.diffusion.twists import GaussianTwist, LogLikelihood
from pyro_hvae.diffusion.variance import ReverseVariance
from pyro_hvae.kernels import Kernel

__all__ = ["BinnedGaussian", "DenoisingChain", "RescaledGaussian"]


class RescaledGaussian(Kernel):
    r"""p(x | z_1) = N(z_1 / alpha_1, I / SNR_1), what the first noise level leaves of the datum; or a fixed scale.

    Args:
        schedule: whose first level it undoes.
        event_dim: dims of one datum.
        scale: standard deviation, instead of 1 / sqrt(SNR_1).
    """

    def __init__(self, schedule: Schedule, event_dim: int = 1, *, scale: float | None = None) -> None:
        super().__init__(None, event_dim)
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale is a standard deviation, which is positive and finite; got {scale}")
        self._held = (schedule,)
        self.fixed_scale = scale

    def level(self, parent: Tensor, context: Any = None) -> Noising:
        """Return the first noise level, () or with a gamma for each entry (..., *event_shape)."""
        return Noising(self._held[0].given(context)(parent.new_zeros(())))

    def forward(self, parent: Tensor | None, context: Any = None) -> TorchDistribution:
        assert parent is not None
        level = self.level(parent, context)
        scale = torch.exp(0.5 * level.gamma) if self.fixed_scale is None else parent.new_tensor(self.fixed_scale)
        return dist.Normal(parent / level.alpha, scale).to_event(self.event_dim)


class BinnedGaussian(RescaledGaussian):
    r"""p(x | z_1) over equally spaced grey levels in [-1, 1]: softmax of the Gaussian's log-density at each level.

    Args:
        levels: how many, 256 by default.

    Reference:
        Variational Diffusion Models (Kingma, Salimans, Poole and Ho, 2021).

    Example:
        >>> from pyro_hvae.diffusion import LinearSchedule
        >>> kernel = BinnedGaussian(LinearSchedule(), levels=4)
        >>> kernel(torch.zeros(3, 2)).event_shape
        torch.Size([2])
    """

    def __init__(self, schedule: Schedule, event_dim: int = 1, *, levels: int = 256) -> None:
        super().__init__(schedule, event_dim)
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.levels = levels

    def forward(self, parent: Tensor | None, context: Any = None) -> TorchDistribution:
        assert parent is not None
        level = self.level(parent, context)
        levels = distributions.BinnedGaussian(parent / level.alpha, torch.exp(0.5 * level.gamma), self.levels)
        return levels.to_event(self.event_dim)


class DenoisingChain(ReverseChain):
    """The generative chain of a diffusion, with one denoiser for all of its kernels.

    Args:
        denoiser: module with ``forward(z, gamma)``, or ``forward(z, gamma, context)``; z is (..., *event_shape), gamma
            (...), or of the shape of z where the schedule has a gamma for each entry.
        event_shape: of one datum.
        schedule: gamma(t); a learned one is registered here, under ``schedule``.
        num_layers: T; None for continuous time.
        likelihood: kernel for p(x | z_1); :class:`RescaledGaussian` by default.
        parameterisation: what the denoiser predicts.
        name, plate: as in the chains.

    Attributes:
        reverse_variance: None, or a :class:`ReverseVariance` that is assigned: the factor by which p(z_{t-1}|z_t) is
            wider than q(z_{t-1}|z_t, x), since it does not depend on x.

    Raises:
        ValueError: for T < 1, an unknown parameterisation, a schedule of another ``event_shape``.

    Example:
        >>> from pyro_hvae.nn import DenoisingMLP
        >>> from pyro_hvae.diffusion import LinearSchedule
        >>> _ = torch.manual_seed(0)
        >>> denoiser = DenoisingMLP(2)
        >>> model = DenoisingChain(denoiser, event_shape=(2,), schedule=LinearSchedule(-6.0, 4.0), num_layers=1000)
        >>> len(model.state_dict()) == len(denoiser.state_dict()), model.latents[:2]
        (True, ('z1000', 'z999'))
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        event_shape: tuple[int, ...],
        schedule: Schedule,
        num_layers: int | None,
        likelihood: nn.Module | None = None,
        parameterisation: str = "eps",
        name: str = "model",
        plate: str = "data",
    ) -> None:
        check_choice("parameterisation", parameterisation, PARAMETERISATIONS)
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a torch.nn.Module, got {denoiser!r}")
        check_event_shape(schedule, len(event_shape), tuple(event_shape))
        if num_layers is not None:
            schedule.grid(num_layers)
        super().__init__(
            denoiser,
            event_shape=event_shape,
            num_layers=num_layers,
            likelihood=RescaledGaussian(schedule, len(event_shape)) if likelihood is None else likelihood,
            name=name,
            plate=plate,
        )
        self.schedule = schedule
        self.reverse_variance: ReverseVariance | None = None
        self.parameterisation = parameterisation

    @property
    def noise(self) -> str:
        return "Gaussian"

    def time(self, index: Any) -> Any:
        assert self.num_layers is not None
        return (index - 1) / (self.num_layers - 1) if self.num_layers > 1 else index

    def level_shape(self, z: Tensor) -> torch.Size:
        return z.shape if self.schedule.event_shape else super().level_shape(z)

    def predict(self, z: Tensor, gamma: Tensor, context: Any = None, *, target: str = "x0") -> Tensor:
        """Return the denoiser's prediction for z (..., *event_shape), as ``target``.

        Args:
            z: (..., *event_shape).
            gamma: noise levels, (...) or one for all; (..., *event_shape) for a schedule with a gamma for each entry.
            context: for the denoiser.
            target: one of :data:`PARAMETERISATIONS`.
        """
        output = self.call_denoiser(z, gamma, context)
        gamma = gamma.expand(self.level_shape(z))
        return convert(output, z, self._wide(gamma, z), source=self.parameterisation, target=target)

    def transition(self, s: Tensor, t: Tensor, z_t: Tensor, context: Any = None) -> TorchDistribution:
        """Return p(z_s | z_t) for times s < t."""
        schedule = self.schedule.given(context)
        return self._transition(Noising(schedule(s)), Noising(schedule(t)), z_t, context)

    def transition_to(self, s: Tensor, t: Tensor, z_t: Tensor, xhat: Tensor) -> TorchDistribution:
        """Return p(z_s | z_t) with ``xhat`` (..., *event_shape) in the place of the denoiser's estimate of x."""
        return self._towards(Noising(self.schedule(s)), Noising(self.schedule(t)), z_t, xhat)

    def twisted(
        self, log_likelihood: LogLikelihood, context: Any, *, cg_iterations: int, denoiser_error: float
    ) -> GaussianTwist:
        """Return the twists by a likelihood of x, for :func:`pyro_hvae.condition`."""
        return GaussianTwist(self, log_likelihood, context, cg_iterations=cg_iterations, denoiser_error=denoiser_error)

    def prior(self, like: Tensor) -> TorchDistribution:
        """Return p(z_T)."""
        zero = like.new_zeros(self.event_shape)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(self.event_dim)

    def matching(self, s: Tensor | None, t: Tensor, z_t: Tensor, x: Tensor, context: Any = None) -> Tensor:
        r"""Return KL(q(z_s|z_t,x) || p(z_s|z_t)) in closed form, with epsilon the noise in z_t; nats (...).

        .. math:: \tfrac12\sum_i\mathrm{expm1}(\gamma_{t,i}-\gamma_{s,i})\,(\epsilon_i-\hat\epsilon_i)^2
                  \qquad\text{or, for } s = \text{None, its rate }\
                  \tfrac12\sum_i\gamma_i'(t)\,(\epsilon_i-\hat\epsilon_i)^2

        over the entries of a datum, which share one gamma unless the schedule has one for each; with a variance of its
        own, that of :class:`~pyro_hvae.diffusion.ReverseVariance`.
        """
        schedule, dims = self.schedule.given(context), tuple(range(-self.event_dim, 0))
        gamma = schedule(t)
        upper = self._wide(gamma, z_t)
        level = Noising(upper)
        noise = (z_t - level.alpha * x) / level.sigma
        square = (noise - self.predict(z_t, gamma, context, target="eps")) ** 2
        if s is None:  # a wider variance costs nothing in the limit
            return (0.5 * self._wide(schedule.derivative(t), z_t) * square).sum(dims)
        weight = torch.expm1(upper - self._wide(schedule(s), z_t))
        if self.reverse_variance is None:
            return (0.5 * weight * square).sum(dims)
        excess = weight * self.reverse_variance(upper)
        return 0.5 * (weight * square / (1 + excess) + torch.log1p(excess) - excess / (1 + excess)).sum(dims)

    def layer_kernel(self) -> Callable[[int, Tensor, Any], TorchDistribution]:
        assert self.num_layers is not None
        schedule, num_layers = self.schedule, self.num_layers
        gammas: list[Tensor] | None = None

        def kernel(i: int, parent: Tensor, context: Any) -> TorchDistribution:
            nonlocal gammas
            if gammas is None:
                gammas = schedule.given(context).layers(grid_like(schedule, num_layers, parent))
            return self._transition(Noising(gammas[i - 1]), Noising(gammas[i]), parent, context)

        return kernel

    def _transition(self, lower: Noising, upper: Noising, z: Tensor, context: Any) -> TorchDistribution:
        return self._towards(lower, upper, z, self.predict(z, upper.gamma, context))

    def _towards(self, lower: Noising, upper: Noising, z: Tensor, xhat: Tensor) -> TorchDistribution:
        of_z, of_x, variance = upper.posterior_to(lower)
        if self.reverse_variance is not None:
            excess = torch.expm1(upper.gamma - lower.gamma) * self.reverse_variance(upper.gamma)
            variance = variance * (1 + excess)
        loc = self._wide(of_z, z) * z + self._wide(of_x, z) * xhat
        return dist.Normal(loc, self._wide(variance.sqrt(), z)).to_event(self.event_dim)

    def _wide(self, level: Tensor, like: Tensor) -> Tensor:
        return broadcast_level(level, like, self.event_dim, self.schedule.event_shape)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, parameterisation={self.parameterisation!r}"
