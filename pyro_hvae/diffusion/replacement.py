r"""Schedules of discrete noise: the probability b(t) that an entry has been replaced by time t.

b increases from b(0) = 0 to b(1), and a(t) = 1 - b(t) is the probability that the entry is still that of the datum.
A denoiser is called with :math:`\gamma(t) = \log b(t) - \log a(t)`, as one of Gaussian noise is with
:math:`-\log\mathrm{SNR}`.

With absorbing noise the bound in continuous time does not depend on the schedule, since only the order in which entries
are masked matters (Simplified and Generalized Masked Diffusion for Discrete Data, Shi et al., 2024); the variance of
its estimates does.  The weight of a time is b'(t) / b(t), which acts with a probability in proportion to b(t): under
:math:`b = t^p` the second moment of a term is :math:`p^2\int t^{p-2}dt`, infinite (by a logarithm) at p = 1 and least
at p = 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["CosineReplacement", "PowerReplacement", "ReplacementSchedule"]

_LARGEST_GAMMA = 15.0


class ReplacementSchedule(nn.Module):
    """Base: b(t) on [0, 1], increasing from 0 and without parameters.

    Subclasses define :meth:`forward`; :meth:`kept` and :meth:`derivative` follow from it, and are better written out
    where they would lose digits.
    """

    def forward(self, t: Tensor) -> Tensor:
        """Return b at times t of any shape, each in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(t).")

    def kept(self, t: Tensor) -> Tensor:
        """Return a(t) = 1 - b(t)."""
        return 1.0 - self(t)

    def derivative(self, t: Tensor) -> Tensor:
        """Return db / dt, of the shape of t."""
        with torch.enable_grad():
            leaf = t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self(leaf).sum(), leaf)
        return slope

    def gamma(self, t: Tensor) -> Tensor:
        """Return log b(t) - log a(t), limited to [-15, 15]: what a denoiser is called with."""
        return (self(t).log() - self.kept(t).log()).clamp(-_LARGEST_GAMMA, _LARGEST_GAMMA)


class PowerReplacement(ReplacementSchedule):
    """b(t) = t^p.

    Args:
        power: p > 0; at p = 1 equally many entries are replaced in equal times.

    Raises:
        ValueError: for a power that is not positive and finite.

    Example:
        >>> PowerReplacement(2.0)(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [0.0, 0.25, 1.0]
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        if not 0 < power < math.inf:
            raise ValueError(f"power must be positive and finite, got {power}")
        self.power = float(power)

    def forward(self, t: Tensor) -> Tensor:
        return t**self.power

    def derivative(self, t: Tensor) -> Tensor:
        return self.power * t ** (self.power - 1.0)

    def extra_repr(self) -> str:
        return f"power={self.power:g}"


class CosineReplacement(ReplacementSchedule):
    """b(t) = 1 - cos(pi t / 2).

    Example:
        >>> CosineReplacement()(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.2929, 1.0000])
    """

    def forward(self, t: Tensor) -> Tensor:
        return 2.0 * torch.sin(0.25 * math.pi * t) ** 2

    def kept(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1.0 - t))

    def derivative(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * torch.sin(0.5 * math.pi * t)


def check_replacement(schedule: ReplacementSchedule, *, complete: bool, points: int = 257) -> None:
    """Check a schedule of discrete noise on a grid.

    Args:
        schedule: to be checked.
        complete: whether nothing may be kept at t = 1.
        points: how many times are checked.

    Raises:
        TypeError: for another object than a :class:`ReplacementSchedule`.
        ValueError: for parameters, b(0) other than 0, a time where b does not increase, or an entry kept at t = 1.
    """
    if not isinstance(schedule, ReplacementSchedule):
        raise TypeError(
            f"discrete noise takes a ReplacementSchedule b(t), such as PowerReplacement(), got "
            f"{type(schedule).__name__}"
        )
    if any(parameter.requires_grad for parameter in schedule.parameters()):
        raise ValueError(
            "a schedule of discrete noise can't be learned, since its draws have no reparameterisation; fix its "
            "parameters by requires_grad_(False)"
        )
    like = next((t for t in schedule.buffers() if t.is_floating_point()), torch.empty((), dtype=torch.float64))
    with torch.no_grad():
        times = torch.linspace(0.0, 1.0, points, dtype=like.dtype, device=like.device)
        values, last = schedule(times), float(schedule.kept(times[-1]))
    if float(values[0]) != 0.0 or not -1e-6 <= last <= 1.0:
        raise ValueError(f"b(t) must go from b(0) = 0 to b(1) <= 1; got {float(values[0]):.6g} and {1.0 - last:.6g}")
    bad = ~torch.isfinite(values)
    bad[1:] |= values.diff() <= 0
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"b(t) must be finite and increase on [0, 1]; at t = {float(times[first]):.4f} it is "
            f"{float(values[first]):.6g} after {float(values[first - 1]):.6g}"
        )
    if complete and last != 0.0:
        raise ValueError(
            f"absorbing noise must mask every entry by t = 1, but the schedule keeps one with probability {last:.3g}: "
            "make kept(1) exactly 0"
        )
