r"""The density of a diffusion's probability flow.

The deterministic flow has the marginals of the process, and the log-density of a datum changes by the
divergence of the drift.  In y = z / alpha and the noise ratio r = sigma / alpha the flow is :math:`dy/dr=\hat\epsilon`,

.. math:: \log p(z_0) = \log q(z_T) + \int \nabla\cdot\frac{dz}{dt}\,dt

(Score-Based Generative Modeling through Stochastic Differential Equations, Song et al., 2021).  The result is the
density of z at the first noise level; it is no bound on log p(x).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.diffusion.denoising import DenoisingChain
from pyro_hvae.diffusion.levels import check_one_gamma
from pyro_hvae.diffusion.process import Noising
from pyro_hvae.distributions.levels import Levels, check_levels

__all__ = ["FlowLikelihood", "dequantised_log_likelihood", "flow_log_likelihood"]


@dataclass(frozen=True)
class FlowLikelihood:
    """Log-density of each datum under the flow, nats (N,), and the standard error of a stochastic divergence (N,)."""

    value: Tensor
    stderr: Tensor


def flow_log_likelihood(
    model: DenoisingChain,
    z: Tensor,
    *,
    context: Any = None,
    end: Callable[[Tensor], Tensor] | None = None,
    num_probes: int | None = None,
    num_steps: int = 400,
    rtol: float | None = None,
) -> FlowLikelihood:
    r"""Compute the log-density of data under the probability-flow ODE.

    Args:
        model: a denoising chain; ``z`` is at the first level of its schedule.
        z: (N, *event_shape); for discrete data see :func:`dequantised_log_likelihood`.
        context: for the denoiser.
        end: log-density at t = 1, from (N, *event_shape) to (N,); the standard normal by default.
        num_probes: random directions of Hutchinson's estimate of the divergence; None takes the exact trace, at the
            cost of a gradient per dim.
        num_steps: fixed Runge-Kutta (order 4) steps, equal in gamma.
        rtol: relative tolerance of ``torchdiffeq``'s adaptive solver, used instead of fixed steps unless ``None``.

    Returns:
        :class:`FlowLikelihood`.

    Raises:
        ImportError: for ``rtol`` without ``torchdiffeq``.
        ValueError: for counts below one, or a schedule with a gamma for each entry.

    Reference:
        FFJORD (Grathwohl et al., 2019) for Hutchinson's estimate along a flow.
    """
    if num_steps < 1 or (num_probes is not None and num_probes < 2):
        raise ValueError(f"need num_steps >= 1 and num_probes >= 2 (or None), got {num_steps} and {num_probes}")
    check_one_gamma(model.schedule, "the probability flow's density", "take DiffusionELBO, a bound")
    event_dim = model.event_dim
    dims = tuple(range(-event_dim, 0))
    first, last = (model.schedule(z.new_tensor(t)).detach() for t in (0.0, 1.0))
    probes = None if num_probes is None else torch.randint(0, 2, (num_probes, *z.shape), device=z.device).to(z) * 2 - 1

    def drift(gamma: Tensor, state: Tensor) -> Tensor:
        """Return dz / dgamma = -(sigma^2 z - sigma eps) / 2, since d alpha / dgamma = -alpha sigma^2 / 2."""
        level = Noising(gamma)
        eps = model.predict(state, gamma, context, target="eps")
        return -0.5 * level.sigma**2 * state + 0.5 * level.sigma * eps

    def both(gamma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = state[0].detach().requires_grad_()
            change = drift(gamma, leaf)
            if probes is None:
                trace = _trace(change, leaf, event_dim)
            else:
                trace = torch.stack(
                    [
                        (torch.autograd.grad(change, leaf, probe, retain_graph=True)[0] * probe).sum(dims)
                        for probe in probes
                    ]
                )
        return change.detach(), trace.detach()

    shape = z.shape[: z.dim() - event_dim]
    start = (z, z.new_zeros(shape if num_probes is None else (num_probes, *shape)))

    def run(_: DenoisingChain) -> tuple[Tensor, Tensor]:
        if rtol is not None:
            from torchdiffeq import odeint

            states, traces = odeint(both, start, torch.stack([first, last]), rtol=rtol, atol=rtol)
            return states[-1], traces[-1]
        return _runge_kutta(both, start, first, last, num_steps)

    final, gained = model(visit=run)
    at_end = (-0.5 * final**2 - 0.5 * torch.log(torch.tensor(2 * torch.pi))).sum(dims) if end is None else end(final)
    if num_probes is None:
        return FlowLikelihood(at_end + gained, torch.zeros_like(at_end))
    return FlowLikelihood(at_end + gained.mean(0), gained.std(0) / num_probes**0.5)


def dequantised_log_likelihood(
    model: DenoisingChain,
    x: Tensor,
    *,
    levels: int = 256,
    low: float = -1.0,
    high: float = 1.0,
    num_draws: int = 1,
    **options: Any,
) -> FlowLikelihood:
    r"""Bound on the log-probability of discrete data, from the flow's density of the data with uniform noise.

    A level is a bin of width w around it, and by Jensen's inequality

    .. math:: \log P(x) = \log\int_{[-w/2,w/2]^d} p(x+u)\,du \ge \mathrm E_u \log p(x+u) + d\log w.

    The density of the levels themselves, without noise, is no log-probability and may grow without bound.

    Args:
        model: a denoising chain.
        x: levels (N, *event_shape), equally spaced from ``low`` to ``high``.
        levels: how many there are.
        low, high: the outermost levels.
        num_draws: of the noise.
        **options: those of :func:`flow_log_likelihood`.

    Returns:
        :class:`FlowLikelihood`, in nats of probability; the standard error is that over the draws of noise if there are
        several, and else that of the divergence.

    Raises:
        ValueError: for x that is not at the levels, or counts below one.

    Reference:
        A Note on the Evaluation of Generative Models (Theis, van den Oord and Bethge, 2016).
    """
    check_levels(levels, low, high)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    width = (high - low) / (levels - 1)
    off = ~Levels(levels, low, high).check(x)
    if bool(off.any()):
        raise ValueError(
            f"x must stand at one of {levels} levels from {low} to {high}, got {x[off][0].item():.6g}: noise of one "
            "level's width bounds the log-probability of a level alone. For continuous data use flow_log_likelihood"
        )
    dim = math.prod(model.event_shape)
    values, errors = [], []
    for _ in range(num_draws):
        noisy = x + (torch.rand_like(x) - 0.5) * width
        density = flow_log_likelihood(model, noisy, **options)
        values.append(density.value + dim * math.log(width))
        errors.append(density.stderr)
    drawn = torch.stack(values)
    stderr = errors[0] if num_draws == 1 else drawn.std(0) / num_draws**0.5
    return FlowLikelihood(drawn.mean(0), stderr)


def _trace(change: Tensor, leaf: Tensor, event_dim: int) -> Tensor:
    flat = change.flatten(-event_dim)
    total = flat.new_zeros(flat.shape[:-1])
    for i in range(flat.shape[-1]):
        row = torch.autograd.grad(flat[..., i].sum(), leaf, retain_graph=True)[0]
        total = total + row.flatten(-event_dim)[..., i]
    return total


def _runge_kutta(
    slope: Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]],
    state: tuple[Tensor, Tensor],
    first: Tensor,
    last: Tensor,
    num_steps: int,
) -> tuple[Tensor, Tensor]:
    width = (last - first) / num_steps

    def moved(by: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
        return state[0] + share * width * by[0], state[1] + share * width * by[1]

    for i in range(num_steps):
        gamma = first + i * width
        k1 = slope(gamma, state)
        k2 = slope(gamma + 0.5 * width, moved(k1, 0.5))
        k3 = slope(gamma + 0.5 * width, moved(k2, 0.5))
        k4 = slope(gamma + width, moved(k3, 1.0))
        state = (
            state[0] + width / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0]),
            state[1] + width / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1]),
        )
    return state
