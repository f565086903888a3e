r"""Samplers that take fewer steps than the model has layers; ancestral sampling is the model program itself.

All solve the same reverse process from :math:`z\sim N(0, I)` at t = 1 to t = 0 on a grid of times, and end with a draw
(or the mean) of p(x|z):

- :func:`ddim`, with ``eta`` between the deterministic map (0) and the process's own noise (1)
  (Denoising Diffusion Implicit Models, Song, Meng and Ermon, 2021);
- :func:`probability_flow`, Heun's method on the probability-flow ODE (Score-Based Generative Modeling through
  Stochastic Differential Equations, Song et al., 2021);
- :func:`dpm_solver`, second order in half the log-SNR, multistep (DPM-Solver++, Lu et al., 2022).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.arguments import check_count, check_number
from pyro_hvae.diffusion.denoising import DenoisingChain
from pyro_hvae.diffusion.levels import check_one_gamma
from pyro_hvae.diffusion.process import Noising

__all__ = ["ddim", "dpm_solver", "guided", "probability_flow"]


def ddim(
    model: DenoisingChain, size: int, *, num_steps: int = 50, eta: float = 0.0, context: Any = None, mean: bool = False
) -> Tensor:
    """Draw data by DDIM.

    Args:
        model: a denoising chain of any number of layers, or of continuous time.
        size: how many data.
        num_steps: steps from t = 1 to t = 0.
        eta: 0 is deterministic after the first draw, 1 has the noise of the process.
        context: (size, c), for each denoiser call.
        mean: return the mean of p(x | z) instead of a draw.

    Returns:
        (size, *event_shape).

    Raises:
        ValueError: for ``num_steps < 1`` or eta outside of [0, 1].
    """
    check_number("eta", eta, 0.0, 1.0)

    def step(lower: Noising, upper: Noising, z: Tensor, *_: Any) -> Tensor:
        eps = model.predict(z, upper.gamma, context, target="eps")
        xhat = (z - upper.sigma * eps) / upper.alpha
        noise = eta * upper.posterior_to(lower)[2].sqrt()
        direction = (lower.sigma**2 - noise**2).clamp(min=0.0).sqrt()
        z = lower.alpha * xhat + direction * eps
        return z + noise * torch.randn_like(z) if eta > 0 else z

    return _solve(model, size, num_steps, step, context, mean)


def probability_flow(
    model: DenoisingChain,
    size: int,
    *,
    num_steps: int = 50,
    context: Any = None,
    mean: bool = False,
    rtol: float | None = None,
) -> Tensor:
    """Draw data by Heun's method on the probability-flow ODE; two denoiser calls a step.

    Other arguments as :func:`ddim`.

    Args:
        rtol: relative tolerance of ``torchdiffeq``'s adaptive solver, used instead of fixed steps unless ``None``.

    Raises:
        ImportError: for ``rtol`` without ``torchdiffeq``.
        ValueError: for ``rtol`` and a schedule with a gamma for each entry.
    """
    if rtol is not None:
        check_one_gamma(model.schedule, "an adaptive solver", "take fixed steps, by rtol=None")

    def slope(level: Noising, z: Tensor) -> Tensor:
        """Return d(z / alpha) / d(sigma / alpha), which is the predicted noise."""
        return model.predict(z, level.gamma, context, target="eps")

    def step(lower: Noising, upper: Noising, z: Tensor, *_: Any) -> Tensor:
        first = slope(upper, z)
        ratio_low, ratio_up = torch.exp(0.5 * lower.gamma), torch.exp(0.5 * upper.gamma)
        scaled = z / upper.alpha
        euler = scaled + (ratio_low - ratio_up) * first
        second = slope(lower, euler * lower.alpha)
        return lower.alpha * (scaled + 0.5 * (ratio_low - ratio_up) * (first + second))

    def adaptive(lower: Noising, upper: Noising, z: Tensor, *_: Any) -> Tensor:
        from torchdiffeq import odeint

        def drift(gamma: Tensor, scaled: Tensor) -> Tensor:
            """Return d(z / alpha) / dgamma; gamma may lie beyond the end."""
            level = Noising(gamma)
            return 0.5 * torch.exp(0.5 * gamma) * slope(level, scaled * level.alpha)

        gammas = torch.stack([upper.gamma, lower.gamma])
        return lower.alpha * odeint(drift, z / upper.alpha, gammas, rtol=rtol, atol=rtol)[-1]

    if rtol is None:
        return _solve(model, size, num_steps, step, context, mean)
    return _solve(model, size, 1, adaptive, context, mean)


def dpm_solver(
    model: DenoisingChain, size: int, *, num_steps: int = 20, context: Any = None, mean: bool = False
) -> Tensor:
    """Draw data by DPM-Solver++(2M); one denoiser call a step.

    Arguments as :func:`ddim`.
    """
    previous: list[tuple[Tensor, Tensor]] = []

    def step(lower: Noising, upper: Noising, z: Tensor, *_: Any) -> Tensor:
        width = 0.5 * (upper.gamma - lower.gamma)  # the step in log(alpha / sigma)
        xhat = model.predict(z, upper.gamma, context)
        blend = xhat
        if previous:
            before, width_before = previous[-1]
            ratio = width_before / width
            blend = xhat + (xhat - before) / (2 * ratio)
        previous[:] = [(xhat, width)]
        return lower.sigma / upper.sigma * z - lower.alpha * torch.expm1(-width) * blend

    return _solve(model, size, num_steps, step, context, mean)


class guided(nn.Module):
    r"""A denoiser with classifier-free guidance: (1 + w) eps(z, context) - w eps(z, null context).

    Args:
        denoiser: called with (z, gamma, context).
        null_context: value that means "no context", (c,); the denoiser must be trained with it.
        weight: w >= 0; 0 changes nothing.

    Reference:
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022).
    """

    def __init__(self, denoiser: nn.Module, null_context: Tensor, weight: float) -> None:
        super().__init__()
        if not weight >= 0:  # false for NaN too
            raise ValueError(f"the guidance weight must be at least 0, got {weight}")
        self.denoiser = denoiser
        self.register_buffer("null_context", null_context)
        self.weight = weight

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor) -> Tensor:
        conditional = self.denoiser(z, gamma, context)
        if self.weight == 0:
            return conditional
        free = self.denoiser(z, gamma, self.null_context.expand(context.shape))  # type: ignore[operator]
        return conditional + self.weight * (conditional - free)


def _solve(
    model: DenoisingChain,
    size: int,
    num_steps: int,
    step: Callable[..., Tensor],
    context: Any,
    mean: bool,
) -> Tensor:
    check_count("num_steps", num_steps)
    check_count("size", size)

    if not isinstance(model, DenoisingChain):
        raise TypeError(
            f"this sampler needs a DenoisingChain, with Gaussian noise, got {type(model).__name__}; sample a discrete "
            "chain by model(size=...), ancestral or unmask"
        )

    def run(chain: DenoisingChain) -> Tensor:
        like = chain.reference()
        z = torch.randn(size, *chain.event_shape, dtype=like.dtype, device=like.device)
        times = torch.linspace(1.0, 0.0, num_steps + 1, dtype=like.dtype, device=like.device)
        gammas = chain.schedule.given(context).layers(times)
        for upper, lower in itertools.pairwise(gammas):
            z = step(Noising(lower), Noising(upper), z)
        likelihood = chain.likelihood(z, context)
        return likelihood.mean if mean else likelihood.sample()

    with torch.no_grad():
        return model(visit=run)
