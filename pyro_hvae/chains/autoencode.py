r"""Encoder and decoder as functions: the two halves of an auto-encoder (seed, question 4).

The encoder of x is q(z | x), the decoder of z is p(x | z). With both,

.. math::
    \mathrm{reconstruct}(x) = E_{q(z \mid x)}\, E_{p(x' \mid z)}[x'],\qquad
    \mathrm{impute}(x_{obs}) \sim \int p(x_{mis} \mid z)\, q(z \mid x_{obs})\, dz

The second is the exact predictive distribution of the missing entries where the guide is the exact posterior
given the observed ones, and otherwise as good as the guide. All run without gradients and in evaluation
mode. Draws are a leading dim: ``num_draws=S`` gives (S, N, ...), ``None`` one draw without that dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_hvae.chains.base import Chain
from pyro_hvae.chains.directions import BottomUp, TopDown
from pyro_hvae.chains.ladder import Ladder

__all__ = ["decode", "encode", "impute", "reconstruct"]


class _Means(Messenger):
    """Set every latent to its conditional mean. Enter it before the plates, which expand the distributions."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and isinstance(msg["fn"], TorchDistribution | torch.distributions.Distribution):
            msg["value"] = msg["fn"].mean
            msg["done"] = True


def encode(
    guide: BottomUp | Ladder,
    x: Tensor,
    *,
    num_draws: int | None = None,
    mean: bool = False,
    context: Any = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Draw z ~ q(z | x).

    Args:
        guide: a chain over x.
        x: data (N, *event_shape).
        num_draws: S draws, or ``None`` for one without a leading dim.
        mean: take each layer's conditional mean instead of a draw. Only the first layer sampled is then a
            posterior mean; those after it are means given the means before them.
        context: covariates (N, c).
        mask: True = observed.

    Returns:
        Latents by site, (S, N, *latent_shape) or (N, *latent_shape).

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> encode(guide, torch.zeros(3, 6), num_draws=5)["z1"].shape
        torch.Size([5, 3, 2])
    """
    with torch.no_grad(), _evaluated(guide), _Means() if mean else nullcontext(), _draws(num_draws):
        trace = poutine.trace(guide).get_trace(x, context=context, mask=mask)
    return {site: trace.nodes[site]["value"] for site in trace.stochastic_nodes if site != guide.plate_name}


def decode(
    model: TopDown, latents: dict[str, Tensor], *, size: int | None = None, context: Any = None
) -> TorchDistribution:
    """Return the decoder p(x | z_1), the distribution of x given latents.

    Args:
        model: a generative chain.
        latents: values by site, (N, *latent_shape) or (S, N, *latent_shape). Those left out are drawn from
            the model, so ``{"z3": z3}`` alone gives a draw of what follows from the third layer.
        size: N, where ``latents`` is empty.
        context: covariates (N, c).

    Returns:
        The distribution of x, batch shape (N,) or (S, N).

    Raises:
        ValueError: for a site that is no latent of the model.

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> decode(model, {"z1": torch.zeros(3, 2)}).mean.shape
        torch.Size([3, 6])
    """
    with torch.no_grad():
        return _likelihood(model, latents, size, context)[0]


def reconstruct(
    model: TopDown,
    guide: BottomUp | Ladder,
    x: Tensor,
    *,
    num_draws: int | None = None,
    context: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the mean of x' ~ p(x' | z) with z ~ q(z | x), averaged over the draws.

    Args:
        model: a generative chain.
        guide: its guide.
        x: data (N, *event_shape).
        num_draws: draws of z to average over; ``None`` is one.
        context: covariates (N, c), for both.
        mask: True = observed; the guide does not see the rest.

    Returns:
        Means (N, *event_shape).

    Raises:
        ValueError: for a likelihood without a mean (categories): take draws by :func:`impute` instead.

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> reconstruct(model, guide, torch.zeros(3, 6)).shape
        torch.Size([3, 6])
    """
    latents = encode(guide, x, num_draws=num_draws, context=context, mask=mask)
    likelihood = decode(model, latents, context=context)
    base: Any = likelihood
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if isinstance(base, torch.distributions.Categorical):
        raise ValueError(
            f"the likelihood of {model.observation!r} has no mean: its values are categories. Use "
            "decode(...) for the distribution, or impute(...) for draws."
        )
    means = likelihood.mean
    return means if num_draws is None else means.mean(0)


def impute(
    model: TopDown,
    guide: BottomUp | Ladder,
    x: Tensor,
    mask: Tensor,
    *,
    num_draws: int | None = None,
    context: Any = None,
) -> Tensor:
    """Draw the missing entries given the observed ones, which are returned unchanged.

    Args:
        model: a generative chain.
        guide: its guide.
        x: data (N, *event_shape), anything (NaN too) where masked.
        mask: True = observed, of the shape of x or (N,).
        num_draws: S imputations, or ``None`` for one without a leading dim.
        context: covariates (N, c), for both.

    Returns:
        Completed data (S, N, *event_shape) or (N, *event_shape).

    Example:
        >>> from pyro_hvae.models import vae
        >>> model, guide = vae(6, 2, hidden=(4,))
        >>> x = torch.tensor([[1.0, float("nan"), 0.0, 1.0, 0.0, 1.0]])
        >>> impute(model, guide, x, ~x.isnan(), num_draws=10).isnan().any()
        tensor(False)
    """
    latents = encode(guide, x, num_draws=num_draws, context=context, mask=mask)
    with torch.no_grad():
        drawn = _likelihood(model, latents, None, context)[1]
    seen = mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim()))
    return torch.where(seen, x, drawn.to(x.dtype))


@contextmanager
def _evaluated(chain: Chain) -> Iterator[None]:
    """Run a chain in evaluation mode; modules that were in training mode return to it."""
    held = chain.model.modules() if isinstance(chain, Ladder) else ()
    changed = [module for module in {*chain.modules(), *held} if module.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def _draws(num_draws: int | None) -> Any:
    if num_draws is None:
        return nullcontext()
    if num_draws < 1:
        raise ValueError(f"num_draws must be >= 1, got {num_draws}.")
    return pyro.plate("_draws", num_draws, dim=-2)


def _likelihood(
    model: TopDown, latents: dict[str, Tensor], size: int | None, context: Any
) -> tuple[TorchDistribution, Tensor]:
    """Return the distribution of the observation given latents, and a draw from it."""
    if not isinstance(model, TopDown):
        raise TypeError(
            f"decode, reconstruct and impute take a TopDown chain, got {type(model).__name__}; for a StateSpace draw z "
            "by encode(guide, x), and x by poutine.condition(model, {'z': z})(size=, steps=), or use forecast"
        )
    unknown = set(latents) - set(model.latents)
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no latents of {model.name!r}, which has {sorted(model.latents)}.")
    num_draws = None
    for site, value in latents.items():
        lead = value.shape[: value.dim() - _event_dim(model, site)]
        size = lead[-1]
        num_draws = lead[-2] if len(lead) > 1 else None
    with _evaluated(model), ExitStack() as stack:
        stack.enter_context(_draws(num_draws))
        stack.enter_context(poutine.condition(data=latents))
        trace = poutine.trace(model).get_trace(size=size, context=context)
    site = trace.nodes[model.observation]
    return site["fn"], site["value"]


def _event_dim(model: TopDown, site: str) -> int:
    """Return the event dims of a latent: the kernel's ``event_dim``, or 1."""
    return getattr(model.kernels[site], "event_dim", 1)
