r"""The variance of the layers p(z_s|z_t), which do not depend on x.

By the law of total variance the layer that fits best is wider than :math:`q(z_s|z_t,x)`, by the variance of x given
z_t.  With :math:`r(\gamma_t) = \mathrm E\|\epsilon-\hat\epsilon\|^2/d`, the denoiser's mean square error per dim,

.. math:: \sigma^2_p = \sigma^2_q\,\bigl(1 + \mathrm{expm1}(\gamma_t-\gamma_s)\,r(\gamma_t)\bigr)

minimises the expected divergence of every layer, whatever s.  r = 0 is the posterior variance itself, and
:math:`r=\alpha_t^2` that of data N(0, I); few layers gain most, and infinitely many nothing.

References: Analytic-DPM (Bao, Li, Zhu and Zhang, 2022); Improved Denoising Diffusion Probabilistic Models (Nichol and
Dhariwal, 2021) for learning it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_hvae.diffusion.levels import broadcast_level, check_one_gamma
from pyro_hvae.diffusion.process import Noising

if TYPE_CHECKING:
    from pyro_hvae.diffusion.denoising import DenoisingChain

__all__ = ["ReverseVariance"]

_EDGE = 1e-6


class ReverseVariance(nn.Module):
    """r(gamma) in (0, 1), piecewise linear between equally spaced noise levels: learned with the model, or calibrated.

    Args:
        gamma_min, gamma_max: ends of the noise levels; r is constant beyond them.
        num_points: how many levels carry a value.

    Raises:
        ValueError: for ends out of order, or fewer than two points.

    Example:
        >>> variance = ReverseVariance(-10.0, 4.0, num_points=8)
        >>> variance(torch.tensor([-10.0, 0.0, 4.0])).tolist()
        [0.5, 0.5, 0.5]
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, *, num_points: int = 32) -> None:
        super().__init__()
        if not gamma_min < gamma_max or num_points < 2:
            raise ValueError(
                f"need gamma_min < gamma_max and num_points >= 2, got {gamma_min}, {gamma_max} and {num_points}"
            )
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)
        self.logits = nn.Parameter(torch.zeros(num_points))

    def forward(self, gamma: Tensor) -> Tensor:
        """Return r at noise levels of any shape."""
        values = torch.sigmoid(self.logits)
        last = values.shape[0] - 1
        place = ((gamma - self.gamma_min) / (self.gamma_max - self.gamma_min) * last).clamp(0, last)
        index = place.floor().clamp(max=last - 1).long()
        return values[index] + (place - index) * (values[index + 1] - values[index])

    @torch.no_grad()
    def calibrate(self, model: DenoisingChain, x: Tensor, *, context: Any = None, num_draws: int = 16) -> None:
        """Set r to the denoiser's mean square error on data, the analytic optimum for the denoiser as it is.

        Args:
            model: the chain of which this is the ``reverse_variance``.
            x: data (N, *event_shape).
            context: for the denoiser.
            num_draws: of noise, for each datum and level.

        Raises:
            ValueError: for ``num_draws < 1``, or a schedule with a gamma for each entry.
        """
        if num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {num_draws}")
        check_one_gamma(model.schedule, "a calibrated variance", "learn it with the model")
        levels = torch.linspace(self.gamma_min, self.gamma_max, self.logits.shape[0]).to(x)

        def errors(chain: DenoisingChain) -> Tensor:
            errors_by_level = []
            for gamma in levels:
                level = Noising(gamma)
                noise = torch.randn(num_draws, *x.shape, dtype=x.dtype, device=x.device)
                z = broadcast_level(level.alpha, x, chain.event_dim) * x + level.sigma * noise
                errors_by_level.append(((noise - chain.predict(z, gamma, context, target="eps")) ** 2).mean())
            return torch.stack(errors_by_level)

        self.logits.copy_(torch.logit(model(visit=errors).clamp(_EDGE, 1 - _EDGE)))

    def extra_repr(self) -> str:
        return f"gamma_min={self.gamma_min:g}, gamma_max={self.gamma_max:g}, num_points={self.logits.shape[0]}"
