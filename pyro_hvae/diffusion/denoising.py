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
from pyro_hvae.diffusion.parameterisations import PARAMETERISATIONS, convert
from pyro_hvae.diffusion.process import Noising, broadcast_level, grid_like
from pyro_hvae.diffusion.reverse import ReverseChain
from pyro_hvae.diffusion.schedules import Schedule
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

    def level(self, parent: Tensor) -> Noising:
        return Noising(self._held[0](parent.new_zeros(())))

    def forward(self, parent: Tensor | None, context: Any = None) -> TorchDistribution:
        assert parent is not None
        level = self.level(parent)
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
        level = self.level(parent)
        levels = distributions.BinnedGaussian(parent / level.alpha, torch.exp(0.5 * level.gamma), self.levels)
        return levels.to_event(self.event_dim)


class DenoisingChain(ReverseChain):
    """The generative chain of a diffusion, with one denoiser for all of its kernels.

    Args:
        denoiser: module with ``forward(z, gamma)``, or ``forward(z, gamma, context)``; z is (..., *event_shape), gamma
            (...).
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
        ValueError: for T < 1, an unknown parameterisation.

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

    def predict(self, z: Tensor, gamma: Tensor, context: Any = None, *, target: str = "x0") -> Tensor:
        """Return the denoiser's prediction for z (..., *event_shape) at noise levels gamma (...), as ``target``."""
        output = self.call_denoiser(z, gamma, context)
        gamma = broadcast_level(gamma.expand(z.shape[: z.dim() - self.event_dim]), z, self.event_dim)
        return convert(output, z, gamma, source=self.parameterisation, target=target)

    def transition(self, s: Tensor, t: Tensor, z_t: Tensor, context: Any = None) -> TorchDistribution:
        """Return p(z_s | z_t) for times s < t."""
        return self._transition(Noising(self.schedule(s)), Noising(self.schedule(t)), z_t, context)

    def prior(self, like: Tensor) -> TorchDistribution:
        """Return p(z_T)."""
        zero = like.new_zeros(self.event_shape)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(self.event_dim)

    def matching(self, s: Tensor | None, t: Tensor, z_t: Tensor, x: Tensor, context: Any = None) -> Tensor:
        r"""Return KL(q(z_s|z_t,x) || p(z_s|z_t)) in closed form, with epsilon the noise in z_t; nats (...).

        .. math:: \tfrac12\,\mathrm{expm1}(\gamma_t-\gamma_s)\,\|\epsilon-\hat\epsilon\|^2
                  \qquad\text{or, for } s = \text{None, its rate }\ \tfrac12\,\gamma'(t)\,\|\epsilon-\hat\epsilon\|^2;

        with a variance of its own, that of :class:`~pyro_hvae.diffusion.ReverseVariance`.
        """
        gamma = self.schedule(t)
        level = Noising(broadcast_level(gamma, z_t, self.event_dim))
        noise = (z_t - level.alpha * x) / level.sigma
        predicted = self.predict(z_t, gamma, context, target="eps")
        square = ((noise - predicted) ** 2).sum(tuple(range(-self.event_dim, 0)))
        if s is None:  # a wider variance costs nothing in the limit
            return 0.5 * self.schedule.derivative(t) * square
        weight = torch.expm1(gamma - self.schedule(s))
        if self.reverse_variance is None:
            return 0.5 * weight * square
        excess = weight * self.reverse_variance(gamma)
        dim = math.prod(self.event_shape)
        return 0.5 * (weight * square / (1 + excess) + dim * (torch.log1p(excess) - excess / (1 + excess)))

    def layer_kernel(self) -> Callable[[int, Tensor, Any], TorchDistribution]:
        assert self.num_layers is not None
        schedule, num_layers = self.schedule, self.num_layers
        gammas: Tensor | None = None

        def kernel(i: int, parent: Tensor, context: Any) -> TorchDistribution:
            nonlocal gammas
            if gammas is None:
                gammas = schedule(grid_like(schedule, num_layers, parent))
            return self._transition(Noising(gammas[i - 1]), Noising(gammas[i]), parent, context)

        return kernel

    def _transition(self, lower: Noising, upper: Noising, z: Tensor, context: Any) -> TorchDistribution:
        xhat = self.predict(z, upper.gamma, context)
        of_z, of_x, variance = upper.posterior_to(lower)
        if self.reverse_variance is not None:
            excess = torch.expm1(upper.gamma - lower.gamma) * self.reverse_variance(upper.gamma)
            variance = variance * (1 + excess)
        loc = broadcast_level(of_z, z, self.event_dim) * z + broadcast_level(of_x, z, self.event_dim) * xhat
        return dist.Normal(loc, broadcast_level(variance.sqrt(), z, self.event_dim)).to_event(self.event_dim)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, parameterisation={self.parameterisation!r}"
