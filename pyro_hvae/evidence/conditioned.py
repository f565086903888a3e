r"""A diffusion as the prior of x, conditioned on an observation y by any differentiable likelihood p(y|x).

.. math:: p(x|y) = \frac{p(x)\,p(y|x)}{p(y)},\qquad p(x) = \int p(z_T)\prod_t p(z_{t-1}|z_t)\,p(x|z_1)\,dz_{1:T}.

:func:`condition` runs twisted particle filters down the chain: exact in the limit of particles, and with an estimate of
p(y) that has no bias for any number.  :func:`reconstruction_guidance` draws from the same proposals without weights; it
is biased, and has no estimate of p(y).

References: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu, Trippe, Naesseth, Blei and
Cunningham, 2023); Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung, Kim, McCann, Klasky and Ye,
2023) for guidance alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import pyro
import torch
from torch import Tensor, nn

from pyro_hvae.arguments import check_choice, check_count, check_number
from pyro_hvae.bounds.particles import Filtered, Resampling
from pyro_hvae.bounds.resampling import RESAMPLING, ancestors_of, gather
from pyro_hvae.evidence.importance import Evidence, evidence_of_weights
from pyro_hvae.evidence.observations import check_likelihood, check_programs
from pyro_hvae.evidence.twisted import Conditionable, twisted_particles
from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem.isolation import unchanged
from pyro_hvae.weights import check_weights, chunks, default_chunk, effective_sample_size, log_mean_exp

__all__ = ["ConditionOptions", "Conditioned", "condition", "reconstruction_guidance"]


class ConditionOptions(TypedDict, total=False):
    """Options of :func:`condition`.

    Attributes:
        num_particles: K of each filter and datum, 64 by default.
        num_filters: independent filters R >= 5, 50 by default, which give the standard error and k-hat; k-hat is
            infinite below 25.
        ess_threshold: between 0 and 1, 0.5 by default: particles are resampled where their effective number is below
            this share of K.
        resample: ``"systematic"`` (the default), ``"multinomial"`` or ``"none"``.
        cg_iterations: of the twist, 3 by default, each with a gradient of the denoiser: conjugate gradients that take
            the uncertainty of x given z_t into account.  0 is the twist p(y | estimate of x) of Wu et al., 2023.
        denoiser_error: of a Gaussian chain, the mean square error that its denoiser makes in the noise beyond the least
            possible one, 0.02 by default: the twist trusts the denoiser less where z_t is mostly noise.
        chunk_size: filters that run at once; by default particles times entries stay below 20,000.
    """

    num_particles: int
    num_filters: int
    ess_threshold: float
    resample: str
    cg_iterations: int
    denoiser_error: float
    chunk_size: int | None


_DEFAULTS: dict[str, Any] = {
    "num_particles": 64,
    "num_filters": 50,
    "ess_threshold": 0.5,
    "resample": "systematic",
    "cg_iterations": 3,
    "denoiser_error": 0.02,
    "chunk_size": None,
}


@dataclass(frozen=True)
class Conditioned:
    """Weighted draws of p(x|y) and the estimate of log p(y), from R filters of K particles for each datum.

    Attributes:
        x: draws (R K, N, *event_shape), those of a filter side by side.
        log_weights: of the draws, nats (R K, N); the logarithm of their mean weight is the estimate of log p(y).
        filters: log p(y) by each filter alone, nats (R, N).
        step_ess: effective number of particles at each step before resampling, from z_T to x, as a share of K and mean
            over the filters, (T + 1, N).
        resamplings: how often a filter resampled, mean over the filters, (N,).
    """

    x: Tensor
    log_weights: Tensor
    filters: Tensor
    step_ess: Tensor
    resamplings: Tensor

    @property
    def num_filters(self) -> int:
        """R."""
        return self.filters.shape[0]

    @property
    def num_particles(self) -> int:
        """K of each filter."""
        return self.x.shape[0] // self.num_filters

    @property
    def evidence(self) -> Evidence:
        """log p(y) of each datum with its standard error, and k-hat and effective number of the filters' estimates."""
        return evidence_of_weights(self.filters, "twisted particles")

    @property
    def value(self) -> Tensor:
        """The estimate of log p(y), nats (N,)."""
        return log_mean_exp(self.filters)

    @property
    def stderr(self) -> Tensor:
        """Standard error of :attr:`value`, nats (N,)."""
        return self.evidence.stderr

    @property
    def khat(self) -> Tensor:
        """Pareto shape of the filters' estimates, (N,)."""
        return self.evidence.khat

    @property
    def ess(self) -> Tensor:
        """Effective number of the weights of the draws, between 1 and R K, (N,); draws may share ancestors."""
        return effective_sample_size(self.log_weights)

    def resample(self, num_draws: int = 1) -> Tensor:
        """Draw (num_draws, N, *event_shape) by weight, at random and with replacement.

        Raises:
            ValueError: for ``num_draws < 1``.
        """
        check_count("num_draws", num_draws)
        picked = [ancestors_of(self.log_weights, "multinomial") for _ in range(-(-num_draws // len(self.x)))]
        return torch.cat([gather(self.x, ancestors) for ancestors in picked])[:num_draws]

    def __str__(self) -> str:
        least = float(self.step_ess.min())
        return (
            f"{self.evidence}; {self.num_filters} filters of {self.num_particles} particles, least effective share at "
            f"a step {least:.2f}"
        )


def condition(
    model: Conditionable, *, y: Tensor, likelihood: nn.Module, context: Any = None, **options: Unpack[ConditionOptions]
) -> Conditioned:
    r"""Draw from p(x|y) and estimate log p(y), with a diffusion as the prior of x.

    Args:
        model: a denoising chain of finitely many layers, Gaussian or discrete.
        y: observations ``(N, *shape)``, each with a posterior of its own; converted to the dtype of the model where
            they are real.
        likelihood: kernel p(y|x): a module from x ``(..., *event_shape)`` to a distribution with batch shape (...),
            differentiable in x; for a chain over categories from their probabilities ``(..., *event_shape, C)``, which
            are one-hot at a draw.  It hides missing entries by ``.mask(...)`` of its distribution.
        context: for the denoiser.
        options: see :class:`ConditionOptions`.

    Returns:
        :class:`Conditioned`.

    Raises:
        TypeError: for a model that gives no twists, or a likelihood that is no module.
        ValueError: for continuous time, options out of range, y that is not finite, outside of the support of the
            likelihood or of another shape, a likelihood without a gradient, or a datum for which every particle has a
            weight of zero.

    Reference:
        Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023).

    Example:
        >>> import pyro_hvae as ph
        >>> from pyro_hvae.nn import DenoisingMLP
        >>> _ = torch.manual_seed(0)
        >>> model, _ = ph.vdm(DenoisingMLP(2), event_shape=2, num_layers=10)
        >>> total = ph.LinearGaussian(2, 1, weight=torch.ones(1, 2), scale=0.5)
        >>> posterior = condition(model, y=torch.tensor([[0.5], [2.0]]), likelihood=total, num_particles=16)
        >>> posterior.x.shape, posterior.value.shape, posterior.resample(3).shape
        (torch.Size([800, 2, 2]), torch.Size([2]), torch.Size([3, 2, 2]))
    """
    settings = _checked(options)
    shape = (settings["num_particles"], settings["num_filters"])
    resampling = Resampling(settings["resample"], float(settings["ess_threshold"]))

    def run(sampler: Callable[[tuple[int, int], Resampling], Filtered], count: int) -> list[Filtered]:
        at_once = settings["chunk_size"] or default_chunk(shape[0] * count)
        return [sampler((shape[0], part), resampling) for part in chunks(shape[1], at_once)]

    parts = _with_twist(model, y, likelihood, context, _twist_settings(settings), run)
    filters = torch.cat([part.log_evidence for part in parts])
    check_weights(filters)
    within = torch.cat([part.log_weights - log_mean_exp(part.log_weights) for part in parts], 1)
    x = torch.cat([part.last["x"] for part in parts], 1)
    weights = torch.where(filters == -torch.inf, filters, within + filters)  # -inf - -inf where all of a filter are 0
    return Conditioned(
        x=x.transpose(0, 1).flatten(0, 1),
        log_weights=weights.transpose(0, 1).flatten(0, 1),
        filters=filters,
        step_ess=torch.cat([part.ess for part in parts], 1).mean(1) / shape[0],
        resamplings=torch.cat([part.resampled.sum(0) for part in parts]).to(filters).mean(0),
    )


def reconstruction_guidance(
    model: Conditionable,
    *,
    y: Tensor,
    likelihood: nn.Module,
    num_draws: int = 1,
    context: Any = None,
    cg_iterations: int = 0,
) -> Tensor:
    """Draw by the proposals of :func:`condition` without weights: each layer shifted by the gradient of the twist.

    The draws are not those of p(x|y), for any number of draws or layers; they cost less, and serve as a baseline.

    Args:
        num_draws: of each datum.

    Other arguments and errors as :func:`condition`.

    Returns:
        (num_draws, N, *event_shape).

    Reference:
        Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023); Video Diffusion Models (Ho
        et al., 2022), which names it.
    """
    check_count("num_draws", num_draws)
    settings = _checked({"cg_iterations": cg_iterations})

    def run(sampler: Callable[[tuple[int, int], Resampling], Filtered], count: int) -> Tensor:
        return sampler((num_draws, 1), Resampling("none", 0.0)).last["x"].squeeze(1)

    return _with_twist(model, y, likelihood, context, _twist_settings(settings), run)


def _with_twist(
    model: Any, y: Tensor, likelihood: nn.Module, context: Any, settings: dict[str, Any], run: Callable[[Any, int], Any]
) -> Any:
    """Check the arguments, and call ``run`` with a sampler of (shape, resampling) and the entries of one particle."""
    check_programs(model, y, likelihood)

    def visited(chain: Conditionable) -> Any:
        like = chain.reference()
        observed = y.to(like) if y.is_floating_point() else y.to(like.device)
        size = len(y)

        def log_likelihood(x: Tensor) -> Tensor:
            return likelihood(x).log_prob(observed)

        twist = chain.twisted(log_likelihood, context, **settings)
        check_likelihood(likelihood, twist, observed)

        def sampler(shape: tuple[int, int], resampling: Resampling) -> Filtered:
            return twisted_particles(chain, twist, log_likelihood, (*shape, size), resampling)

        with pyro.validation_enabled(False):
            return run(sampler, twist.example(size).numel())

    with unchanged(model, likelihood), evaluation_mode(model, likelihood), torch.no_grad():
        return model(visit=visited)


def _checked(options: Any) -> dict[str, Any]:
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise TypeError(f"condition has no option {unknown[0]!r}; there are {', '.join(sorted(_DEFAULTS))}")
    settings = _DEFAULTS | options
    check_count("num_particles", settings["num_particles"])
    check_count("num_filters", settings["num_filters"], 5)
    check_number("ess_threshold", settings["ess_threshold"], 0.0, 1.0)
    check_choice("resample", settings["resample"], RESAMPLING)
    check_count("cg_iterations", settings["cg_iterations"], 0)
    check_number("denoiser_error", settings["denoiser_error"], 0.0)
    if settings["chunk_size"] is not None:
        check_count("chunk_size", settings["chunk_size"])
    return settings


def _twist_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("cg_iterations", "denoiser_error")}
