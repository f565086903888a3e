r"""The discretised logistic distribution and its mixture.

An image with n grey levels has a probability, not a density. Put the levels at :math:`c_k = low + k\Delta` for
k = 0..n-1 with :math:`\Delta = (high - low)/(n - 1)`, and give level k the mass that a logistic distribution with
location :math:`\mu` and scale s has on the bin of width :math:`\Delta` around it; the first and the last
bin also take the tails:

.. math::
    P(x = c_k) = \sigma(b_k) - \sigma(a_k),\qquad a_k = \frac{c_k - \Delta/2 - \mu}{s},\quad b_k = a_k + \Delta/s,
    \qquad a_0 = -\infty,\; b_{n-1} = \infty

The masses telescope, so their sum is one. Far out in a tail both sigmoids round to the same number and the
logarithm of the difference is lost. It is computed instead from

.. math::
    \sigma(b) - \sigma(a) = \sigma(b)\, \sigma(-a)\, (1 - e^{-(b - a)})

of which every factor has a safe logarithm and a bounded gradient. No mass is ever floored.

Values lie in [low, high] = [0, 1] unless said otherwise, which is what :mod:`pyro_hvae.data` returns. ``loc`` and the
scale are in the units of x; for 8-bit images scaled to [-1, 1] pass ``low=-1.0``.

PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications (Salimans,
Karpathy, Chen and Kingma, 2017).
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

from pyro_hvae.distributions.levels import LevelDistribution, Levels

__all__ = ["DiscretizedLogistic", "DiscretizedLogisticMixture"]

# exp(+-30) keeps every product below in the range of float32; a scale outside is far beyond any bin or any range.
_LOG_SCALE_LIMIT = 30.0


class DiscretizedLogistic(LevelDistribution):
    r"""Logistic distribution rounded to ``num_bins`` levels, the outer two with the tails.

    The equation is in the module's docstring. Not reparameterised: it is meant for observations.

    Args:
        loc: :math:`\mu`, any shape, in the units of x.
        log_scale: log s, broadcast with ``loc``; clamped to [-30, 30].
        num_bins: number of levels n >= 2.
        low: first level.
        high: last level, > low.

    Raises:
        ValueError: for ``num_bins < 2`` or ``high <= low``; from ``log_prob``, with validation on, for a value that is
            not one of the levels.

    Reference: PixelCNN++ (Salimans et al., 2017).

    Example:
        >>> pixels = DiscretizedLogistic(torch.tensor([0.2, 0.9]), torch.tensor(-2.0))
        >>> pixels.log_prob(torch.tensor([51 / 255, 1.0]))
        tensor([-4.9276, -1.1196])
        >>> float(pixels.log_prob(pixels.enumerate_support()).logsumexp(0).abs().max()) < 1e-5
        True
    """

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}  # noqa: RUF012

    def __init__(
        self,
        loc: Tensor | float,
        log_scale: Tensor | float,
        num_bins: int = 256,
        low: float = 0.0,
        high: float = 1.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__((loc, log_scale), (num_bins, low, high), validate_args)

    def cdf(self, value: Tensor) -> Tensor:
        """Return p(X <= value); shape: ``value`` broadcast with the batch."""
        if self._validate_args:
            self._validate_sample(value)
        index = ((value - self.low) / self.step).round()
        upper = (self.low + (index + 0.5) * self.step - self.loc) * torch.exp(-self._log_scale())
        return torch.where(index >= self.num_bins - 1, torch.ones_like(upper), torch.sigmoid(upper))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw levels by rounding a logistic draw, which is exact; shape: ``sample_shape`` + batch."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            tiny = torch.finfo(self.loc.dtype).tiny
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp_min(tiny)
            draw = self.loc + torch.exp(self._log_scale()) * (u.log() - torch.log1p(-u))
            index = ((draw - self.low) / self.step).round().clamp(0, self.num_bins - 1)
            return self.low + index * self.step

    @property
    def mean(self) -> Tensor:
        """Sum of levels times masses."""
        masses, index = self._masses()
        return self.low + self.step * (masses * index).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Sum of squared distances from the mean times masses, which avoids the difference of two large numbers."""
        masses, index = self._masses()
        centre = (masses * index).sum(-1, keepdim=True)
        return self.step**2 * (masses * (index - centre) ** 2).sum(-1)

    def _log_scale(self) -> Tensor:
        return self.log_scale.clamp(-_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT)

    def _log_masses(self, index: Tensor) -> Tensor:
        log_scale = self._log_scale()
        lower = (self.low + (index - 0.5) * self.step - self.loc) * torch.exp(-log_scale)
        width = self.step * torch.exp(-log_scale)
        first, last = index <= 0, index >= self.num_bins - 1
        zero = torch.zeros_like(lower)
        return (
            torch.where(last, zero, F.logsigmoid(lower + width))
            + torch.where(first, zero, F.logsigmoid(-lower))
            + torch.where(first | last, zero, _log1mexp(width))
        )

    def _masses(self) -> tuple[Tensor, Tensor]:
        """Return masses of all levels along a new last dim (*batch, num_bins), and the levels' numbers (num_bins,)."""
        index = torch.arange(self.num_bins, dtype=self.loc.dtype, device=self.loc.device)
        return self._log_masses(index.reshape((-1,) + (1,) * self.loc.dim())).movedim(0, -1).exp(), index


class DiscretizedLogisticMixture(TorchDistribution):
    r"""Mixture of M discretised logistics with the same levels.

    .. math:: P(x) = \sum_m \mathrm{softmax}(logits)_m \; P_m(x)

    The components are mixed value by value (pixel by pixel), so that several grey levels can be likely at once.

    Args:
        logits: unnormalised log-weights (..., M).
        loc: locations (..., M), in the units of x.
        log_scale: logarithms of the scales (..., M).
        num_bins: number of levels n >= 2.
        low: first level.
        high: last level, > low.

    Raises:
        ValueError: as :class:`DiscretizedLogistic`, and for arguments without a dim of components.

    Reference: PixelCNN++ (Salimans et al., 2017).

    Example:
        >>> logits, loc = torch.zeros(2), torch.tensor([0.0, 1.0])
        >>> mixture = DiscretizedLogisticMixture(logits, loc, torch.tensor([-4.0, -4.0]), num_bins=2)
        >>> mixture.log_prob(torch.tensor([0.0, 1.0])).exp()
        tensor([0.5000, 0.5000])
    """

    arg_constraints = {  # noqa: RUF012
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "log_scale": constraints.real_vector,
    }
    has_enumerate_support = True

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        num_bins: int = 256,
        low: float = 0.0,
        high: float = 1.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.loc, self.log_scale = broadcast_all(logits, loc, log_scale)
        if self.loc.dim() == 0:
            raise ValueError("logits, loc and log_scale need a last dim for the components; all three are 0-dim.")
        self._components = DiscretizedLogistic(self.loc, self.log_scale, num_bins, low, high, validate_args=False)
        super().__init__(self.loc.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> Levels:
        return self._components.support

    @property
    def num_components(self) -> int:
        """M."""
        return self.loc.shape[-1]

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogisticMixture:
        new = self._get_checked_instance(DiscretizedLogisticMixture, _instance)
        batch_shape = torch.Size(batch_shape)
        shape = (*batch_shape, self.num_components)
        new.logits, new.loc, new.log_scale = (
            tensor.expand(shape) for tensor in (self.logits, self.loc, self.log_scale)
        )
        new._components = self._components.expand(shape)
        super(DiscretizedLogisticMixture, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the logarithm of the mass of each level, in nats; shape: ``value`` broadcast with the batch."""
        if self._validate_args:
            self._validate_sample(value)
        return (self._log_weights() + self._components.log_prob(value.unsqueeze(-1))).logsumexp(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw a component for each value, then a level; shape: ``sample_shape`` + batch."""
        with torch.no_grad():
            component = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape))
            draws = self._components.sample(torch.Size(sample_shape))
            return draws.gather(-1, component.unsqueeze(-1)).squeeze(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all levels along a new first dim: (num_bins, *batch), or (num_bins, 1, ..., 1) if not ``expand``."""
        levels = self._components.enumerate_support(expand=False).squeeze(-1)
        return levels.expand((-1, *self.batch_shape)) if expand else levels

    @property
    def mean(self) -> Tensor:
        return (self._log_weights().exp() * self._components.mean).sum(-1)

    @property
    def variance(self) -> Tensor:
        weights, means = self._log_weights().exp(), self._components.mean
        centre = (weights * means).sum(-1, keepdim=True)
        return (weights * (self._components.variance + (means - centre) ** 2)).sum(-1)

    def _log_weights(self) -> Tensor:
        return self.logits.log_softmax(-1)


def _log1mexp(width: Tensor) -> Tensor:
    """Return log(1 - exp(-width)) for width > 0, without cancellation at either end."""
    small = width < 0.6931472
    # each branch sees only arguments that it can take, so that no gradient is 0 * inf
    near = torch.where(small, width, torch.ones_like(width))
    far = torch.where(small, torch.ones_like(width), width)
    return torch.where(small, torch.log(-torch.expm1(-near)), torch.log1p(-torch.exp(-far)))
