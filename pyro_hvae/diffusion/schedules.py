r"""Noise schedules of a variance-preserving diffusion, as :math:`\gamma(t) = -\log\mathrm{SNR}(t)` on [0, 1].

.. math:: \alpha_t^2 = \mathrm{sigmoid}(-\gamma(t)),\quad \sigma_t^2 = \mathrm{sigmoid}(\gamma(t)),\quad
          \alpha_t^2+\sigma_t^2 = 1,\quad \mathrm{SNR}(t) = \alpha_t^2/\sigma_t^2 = e^{-\gamma(t)}.

A schedule is a module from t to gamma(t), increasing; ``derivative(t)`` is its slope, which the continuous-time bound
integrates against.  A bound in continuous time depends on a schedule through its ends alone; what the inside changes
is the variance of its estimates (Variational Diffusion Models, Kingma, Salimans, Poole and Ho, 2021).

A schedule may have a gamma for each entry of a datum (``event_shape``), and may depend on a context
(:class:`~pyro_hvae.diffusion.PolynomialSchedule`).  The bound in continuous time may then depend on the path between
the ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_hvae.arguments import check_count, check_number

__all__ = ["CosineSchedule", "LearnedSchedule", "LinearSchedule", "MonotoneSchedule", "Schedule"]


class Schedule(nn.Module):
    """Base: an increasing gamma(t) on [0, 1].

    Subclasses define :meth:`forward`; :meth:`derivative` follows by differentiation, and is better written out where
    there are parameters.

    Attributes:
        event_shape: of gamma at one time: () for one gamma, or the shape of a datum for a gamma of each entry.
    """

    event_shape: tuple[int, ...] = ()

    def forward(self, t: Tensor) -> Tensor:
        """Return gamma at times t of any shape (...), each in [0, 1]: (..., *event_shape)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(t).")

    def derivative(self, t: Tensor) -> Tensor:
        """Return d gamma / dt, (..., *event_shape); differentiable in the schedule's parameters."""
        keep = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.enable_grad():
            leaf = t.detach().requires_grad_()
            gamma = self(leaf)
            if not self.event_shape:
                (slope,) = torch.autograd.grad(gamma.sum(), leaf, create_graph=keep)
                return slope
            # a row of the Jacobian holds one time: forward differentiation as two backward ones
            weights = torch.zeros_like(gamma).requires_grad_()
            (pulled,) = torch.autograd.grad(gamma, leaf, weights, create_graph=True)
            (slope,) = torch.autograd.grad(pulled.sum(), weights, create_graph=keep)
        return slope

    def given(self, context: Any) -> Schedule:
        """Return the schedule of data with this context, (..., c); one without a context returns itself."""
        return self

    def layers(self, times: Tensor) -> list[Tensor]:
        """Return gamma at each of some times (T,)."""
        return list(self(times))

    @contextmanager
    def variance_gradient(self) -> Iterator[Callable[[Tensor], None]]:
        """Give the parameters between the ends the gradient of the estimate's variance, inside of the block.

        Yields a function to be called with the terms, of the shape of the times, before the backward pass.  A schedule
        without parameters ignores them.
        """
        yield lambda terms: None

    def grid(self, num_layers: int) -> Tensor:
        """Return times of layers 1, ..., T: equally spaced from 0 to 1; the single layer of T = 1 is at 1.

        Raises:
            ValueError: for T < 1.

        Example:
            >>> LinearSchedule().grid(3).tolist()
            [0.0, 0.5, 1.0]
        """
        check_count("num_layers", num_layers)
        return torch.linspace(0.0, 1.0, num_layers) if num_layers > 1 else torch.ones(1)


def check_ends(gamma_min: float, gamma_max: float) -> None:
    """Refuse ends that are not finite or not in order.

    Raises:
        ValueError: with both ends.
    """
    check_number("gamma_min", gamma_min)
    check_number("gamma_max", gamma_max)
    if not gamma_min < gamma_max:
        raise ValueError(
            f"gamma = -log SNR must increase from a finite gamma_min to a finite gamma_max, got "
            f"{gamma_min} and {gamma_max}"
        )


class LinearSchedule(Schedule):
    r"""gamma(t) = gamma_min + t (gamma_max - gamma_min).

    Args:
        gamma_min: -log SNR of the first layer; exp(-13.3 / 2) is the noise of about a third of an 8-bit grey level.
        gamma_max: -log SNR of the last.

    Raises:
        ValueError: unless gamma_min < gamma_max, both finite.

    Example:
        >>> LinearSchedule(-10.0, 4.0)(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [-10.0, -3.0, 4.0]
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        check_ends(gamma_min, gamma_max)
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)

    def forward(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t

    def derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.gamma_max - self.gamma_min)

    def extra_repr(self) -> str:
        return f"gamma_min={self.gamma_min:g}, gamma_max={self.gamma_max:g}"


class CosineSchedule(Schedule):
    r"""alpha = cos(pi u / 2): gamma = 2 log tan(pi u / 2), with u running over what gives the two ends.

    Args:
        gamma_min, gamma_max: -log SNR of the first and the last layer.

    Reference:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021).

    Example:
        >>> CosineSchedule(-10.0, 10.0)(torch.tensor([0.0, 1.0])).round(decimals=4).tolist()
        [-10.0, 10.0]
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        check_ends(gamma_min, gamma_max)
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)
        self._first = math.atan(math.exp(0.5 * gamma_min))
        self._last = math.atan(math.exp(0.5 * gamma_max))

    def forward(self, t: Tensor) -> Tensor:
        return 2 * torch.log(torch.tan(self._first + (self._last - self._first) * t))

    def derivative(self, t: Tensor) -> Tensor:
        width = self._last - self._first
        return 4 * width / torch.sin(2 * (self._first + width * t))

    def extra_repr(self) -> str:
        return f"gamma_min={self.gamma_min:g}, gamma_max={self.gamma_max:g}"


class MonotoneSchedule(Schedule):
    """Any increasing function of t, checked on a grid.

    Args:
        function: from a tensor of times (...) to gamma (..., *event_shape), differentiable.
        points: how many times are checked.
        event_shape: of gamma at one time; that of a datum for a gamma of each entry.

    Raises:
        ValueError: naming the first time where it does not increase, or is not finite; for gamma of another shape.

    Example:
        >>> MonotoneSchedule(lambda t: -10 + 14 * t**2)(torch.tensor(1.0)).item()
        4.0
        >>> two = MonotoneSchedule(lambda t: torch.stack([-6 + 9 * t, -6 + 9 * t**2], -1), event_shape=(2,))
        >>> two(torch.tensor(0.5)).tolist()
        [-1.5, -3.75]
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], points: int = 1001, *, event_shape: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.function = function
        self.event_shape = tuple(event_shape)
        times = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
        gamma = function(times)
        if gamma.shape != (points, *self.event_shape):
            raise ValueError(
                f"for times of shape ({points},) and event_shape={self.event_shape} gamma must have shape "
                f"{(points, *self.event_shape)}; got {tuple(gamma.shape)}"
            )
        bad = ~torch.isfinite(gamma)
        bad[1:] |= gamma.diff(dim=0) <= 0
        if bool(bad.any()):
            first, *entry = bad.nonzero()[0].tolist()
            place = f" entry {tuple(entry)}" if entry else ""
            raise ValueError(
                f"gamma must be finite and increase on [0, 1]; at t = {float(times[first]):.4f}{place} it is "
                f"{float(gamma[(first, *entry)]):.6g} after {float(gamma[(max(first - 1, 0), *entry)]):.6g}"
            )

    def forward(self, t: Tensor) -> Tensor:
        return self.function(t)


class LearnedSchedule(Schedule):
    r"""A monotone network between two ends, learned or fixed.

    .. math:: \gamma(t) = \gamma_0 + (\gamma_1-\gamma_0)\,\frac{m(t)-m(0)}{m(1)-m(0)},\qquad
              m(t) = w_1 t + w_3^\top\,\mathrm{sigmoid}(w_2 t + b),\quad w \ge 0.

    The bound in continuous time depends on the ends alone, so that its gradient for the inside is noise alone.
    The inside can lower the variance of the sampled times: :class:`~pyro_hvae.bounds.DiffusionELBO` gives it the
    gradient of the mean square of the terms :math:`L(t)`, whose mean does not depend on it,

    .. math:: \nabla\,\tfrac12\mathrm E\,L^2 = \mathrm E\,[L\,\nabla L],

    divided by the mean term to be of the order of the other gradients.

    Args:
        gamma_min, gamma_max: the ends, at the start if they are learned.
        hidden: width of the network.
        learn_ends: whether the ends are parameters too; the upper end always lies above the lower.

    Reference:
        Variational Diffusion Models (Kingma, Salimans, Poole and Ho, 2021).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> gamma = LearnedSchedule(-10.0, 4.0)(torch.linspace(0, 1, 5))
        >>> bool((gamma.diff() > 0).all()), round(gamma[0].item(), 4), round(gamma[-1].item(), 4)
        (True, -10.0, 4.0)
    """

    def __init__(
        self, gamma_min: float = -13.3, gamma_max: float = 5.0, *, hidden: int = 64, learn_ends: bool = True
    ) -> None:
        super().__init__()
        check_ends(gamma_min, gamma_max)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        range_ = gamma_max - gamma_min
        ends = torch.tensor([gamma_min, math.log(math.expm1(range_)) if range_ < 30 else range_])
        if learn_ends:
            self.ends = nn.Parameter(ends)
        else:
            self.register_buffer("ends", ends)
        self.slope = nn.Parameter(torch.zeros(()))
        self.raw_in = nn.Parameter(torch.full((hidden,), 1.0))
        self.bias = nn.Parameter(torch.linspace(-4.0, 0.0, hidden))
        self.raw_out = nn.Parameter(torch.full((hidden,), -6.0))
        self._terms: list[Tensor] | None = None

    @contextmanager
    def variance_gradient(self) -> Iterator[Callable[[Tensor], None]]:
        self._terms = recorded = []
        try:
            yield lambda terms: recorded.append(terms.detach())
        finally:
            self._terms = None

    def forward(self, t: Tensor) -> Tensor:
        start, whole = self._raw(t.new_zeros(())), self._raw(t.new_ones(()))
        share = self._weight_gradient((self._raw(t) - start) / (whole - start))
        return self.ends[0] + F.softplus(self.ends[1]) * share

    def derivative(self, t: Tensor) -> Tensor:
        start, whole = self._raw(t.new_zeros(())), self._raw(t.new_ones(()))
        steep = F.softplus(self.raw_in) * 4
        bumps = torch.sigmoid(steep * t.unsqueeze(-1) + self.bias)
        slope = F.softplus(self.slope) + (F.softplus(self.raw_out) * steep * bumps * (1 - bumps)).sum(-1)
        return F.softplus(self.ends[1]) * self._weight_gradient(slope / (whole - start))

    def _weight_gradient(self, inside: Tensor) -> Tensor:
        """Return the values; in the backward pass, scale their gradient by the recorded terms."""
        if self._terms is not None and inside.requires_grad:
            recorded = self._terms

            def weigh(gradient: Tensor) -> Tensor:
                terms = recorded[0]
                return gradient * (terms / terms.mean().clamp(min=torch.finfo(terms.dtype).tiny))

            inside.register_hook(weigh)
        return inside

    def _raw(self, t: Tensor) -> Tensor:
        bumps = torch.sigmoid(F.softplus(self.raw_in) * 4 * t.unsqueeze(-1) + self.bias)
        return F.softplus(self.slope) * t + (F.softplus(self.raw_out) * bumps).sum(-1)
