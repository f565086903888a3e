"""Priors of the top latent, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pyro_hvae.kernels import FlowPrior, MixturePrior, StandardNormal, VampPrior

__all__ = ["check_prior", "make_prior"]

PRIORS = ("standard_normal", "mixture", "vamp", "flow")
_COMPONENTS = 20


def check_prior(prior: str, components: int | None, context: int = 0, *, ladder: bool = False) -> None:
    """Refuse a prior that is unknown, or that the pair can't have.

    Raises:
        ValueError: with what to use instead.
    """
    if prior not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(map(repr, PRIORS))}; got {prior!r}.")
    if components is not None and prior not in ("mixture", "vamp"):
        raise ValueError(f"num_components is for the priors 'mixture' and 'vamp'; got prior={prior!r}.")
    if ladder and prior != "standard_normal":
        raise ValueError(
            f"the guide of ladder_vae multiplies Gaussians, which prior={prior!r} is not: use hvae."
        )
    if context and prior == "vamp":
        raise ValueError("prior='vamp' calls the guide's kernel without a context: use 'mixture' or 'flow'.")


def make_prior(
    prior: str, width: int, encoders: Sequence[nn.Module], below: int | tuple[int, ...], components: int | None
) -> nn.Module:
    """Return the kernel of the top latent.

    Args:
        prior: its name.
        width: of the latent.
        encoders: the guide's kernels, the last of them that of the latent.
        below: shape of the value that this last kernel gets; data start in [0, 1], latents as standard normal.
        components: number of components, or None.
    """
    count = _COMPONENTS if components is None else components
    if prior == "mixture":
        return MixturePrior(width, count)
    if prior == "flow":
        return FlowPrior(width)
    if prior == "vamp":
        if count < 1:
            raise ValueError(f"num_components must be >= 1, got {count}.")
        shape = (below,) if isinstance(below, int) else tuple(below)
        inputs = torch.rand(count, *shape) if len(encoders) == 1 else torch.randn(count, *shape)
        return VampPrior(encoders[-1], inputs)
    return StandardNormal(width)
