r"""Samplers of discrete diffusions in fewer steps than layers, and of missing entries given the others.

- :func:`ancestral` draws :math:`z_s\sim p(z_s|z_t)` on a grid of times of any number of steps;
- :func:`unmask` reveals equally many entries a step, in random order or the most probable first
  (MaskGIT, Chang, Zhang, Jiang, Liu and Freeman, 2022).

The entries that one step reveals are drawn independently given z.  With absorbing noise the entries
that are not masked condition all others, so that any subset may be given from the start: with one
entry a step the rest is drawn from the chain rule of the denoiser's conditionals.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.diffusion.corruption import Absorbing, AnyOrder
from pyro_hvae.diffusion.discrete import DiscreteDenoisingChain

__all__ = ["ancestral", "unmask"]

ORDERS = ("random", "confident")


@torch.no_grad()
def ancestral(
    model: DiscreteDenoisingChain,
    size: int | None = None,
    *,
    num_steps: int = 50,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    context: Any = None,
) -> Tensor:
    """Draw data by the chain's own steps on a grid of ``num_steps`` equal times.

    Args:
        model: a discrete denoising chain of any number of layers, or of continuous time.
        size: how many data, where x is ``None``.
        num_steps: steps from t = 1 to t = 0.
        x: data (N, *event_shape) with missing entries, whose values are ignored.
        mask: True = observed, of the shape of x.
        context: (N, c), for each denoiser call.

    Returns:
        Integers (N, *event_shape), equal to x where it is observed.

    Raises:
        TypeError: for another kind of chain.
        ValueError: for ``num_steps < 1``, a mask of another shape or type, given entries under noise that is not
            absorbing, or noise that masks one entry a layer.

    Example:
        >>> from pyro_hvae.models import discrete_diffusion
        >>> from pyro_hvae.nn import TokenMLP
        >>> _ = torch.manual_seed(0)
        >>> model, _ = discrete_diffusion(TokenMLP(4, 3), event_shape=4, num_categories=3, num_layers=None)
        >>> ancestral(model, 2, num_steps=5).shape
        torch.Size([2, 4])
    """
    _check(model, num_steps, "ancestral")
    if isinstance(model.corruption, AnyOrder):
        raise ValueError("any-order noise has one layer an entry and no other grid of times: use unmask(num_steps=...)")

    def run(chain: DiscreteDenoisingChain) -> Tensor:
        z = _start(chain, size, x, mask)
        like = chain.reference()
        times = torch.linspace(1.0, 0.0, num_steps + 1, dtype=like.dtype, device=z.device)
        for t, s in itertools.pairwise(times):
            z = chain.transition(s, t, z, context).sample()
        return z

    return _as_data(model(visit=run), x, mask)


@torch.no_grad()
def unmask(
    model: DiscreteDenoisingChain,
    size: int | None = None,
    *,
    num_steps: int | None = None,
    order: str = "random",
    x: Tensor | None = None,
    mask: Tensor | None = None,
    context: Any = None,
) -> Tensor:
    """Draw data by revealing masked entries, equally many a step.

    Args:
        num_steps: at most as many as entries; default one entry a step.
        order: ``"random"``, with which one entry a step gives the model's own distribution; ``"confident"`` draws all
            masked entries and reveals those whose draws are most probable, which favours the modes.

    Other arguments, the result and its errors as :func:`ancestral`.

    Raises:
        ValueError: for an unknown order, or noise that is not absorbing.

    Example:
        >>> from pyro_hvae.models import discrete_diffusion
        >>> from pyro_hvae.nn import TokenMLP
        >>> _ = torch.manual_seed(0)
        >>> model, _ = discrete_diffusion(TokenMLP(4, 3), event_shape=4, num_categories=3, num_layers=None)
        >>> x, mask = torch.tensor([[2, 0, 0, 1]]), torch.tensor([[True, False, False, True]])
        >>> unmask(model, x=x, mask=mask, order="confident")[0, [0, 3]].tolist()
        [2, 1]
    """
    _check(model, 1 if num_steps is None else num_steps, "unmask")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}; got {order!r}")
    if not isinstance(model.corruption, Absorbing):
        raise ValueError(f"unmask needs absorbing noise, and this chain's is {model.noise}: use ancestral")

    def run(chain: DiscreteDenoisingChain) -> Tensor:
        z = _start(chain, size, x, mask)
        dims = chain.event_dim
        entries = z[0].numel()
        steps = entries if num_steps is None else min(num_steps, entries)
        whole = (z == chain.corruption.num_categories).flatten(-dims).sum(-1)
        for step in range(1, steps + 1):
            masked = (z == chain.corruption.num_categories).flatten(-dims)
            share = masked.sum(-1).to(chain.reference().dtype) / entries
            logp = chain.predict_at(z, (share.log() - (-share).log1p()).clamp(-15.0, 15.0), context)
            drawn = torch.distributions.Categorical(logits=logp).sample()
            score = torch.rand_like(logp[..., 0])
            if order == "confident":
                score = torch.gather(logp, -1, drawn.unsqueeze(-1)).squeeze(-1)
            score = score.flatten(-dims).masked_fill(~masked, -torch.inf)
            rank = score.argsort(-1, descending=True).argsort(-1)
            left = (whole * (steps - step)).div(steps, rounding_mode="floor")
            chosen = masked & (rank < (masked.sum(-1) - left).unsqueeze(-1))
            z = torch.where(chosen.reshape(z.shape), drawn, z)
        return z

    return _as_data(model(visit=run), x, mask)


def _check(model: Any, num_steps: int, name: str) -> None:
    if not isinstance(model, DiscreteDenoisingChain):
        raise TypeError(
            f"{name} samples a DiscreteDenoisingChain, got {type(model).__name__}; a Gaussian chain is sampled by "
            "model(size=...), ddim, probability_flow or dpm_solver"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")


def _start(chain: DiscreteDenoisingChain, size: int | None, x: Tensor | None, mask: Tensor | None) -> Tensor:
    """Draw z at t = 1, with the observed entries of x in their place."""
    like = chain.reference()
    if x is None:
        if size is None or mask is not None:
            raise ValueError("give size, or x and mask together")
        return chain.prior(like).expand((size,)).sample()
    if mask is None or mask.shape != x.shape or mask.dtype != torch.bool:
        given = "None" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask must be boolean of the shape of x {tuple(x.shape)}, got {given}")
    if x.shape[1:] != chain.event_shape or (size is not None and size != x.shape[0]):
        raise ValueError(f"x must have shape (N, *event_shape), event_shape {chain.event_shape}; got {tuple(x.shape)}")
    if not isinstance(chain.corruption, Absorbing):
        raise ValueError(
            f"entries can be given from the start under absorbing noise alone, and this chain's is {chain.noise}: use "
            "inpaint(model, guide, x, mask, num_particles=...)"
        )
    count = chain.corruption.num_categories
    outside = mask & ~((x >= 0) & (x < count) & (x == x.long()))
    if bool(outside.any()):
        first = tuple(outside.nonzero()[0].tolist())
        raise ValueError(f"data are integers in 0, ..., {count - 1}; x is {x[first].item()} at index {first}")
    return torch.where(mask, x.long(), torch.full_like(x, count, dtype=torch.long))


def _as_data(z: Tensor, x: Tensor | None, mask: Tensor | None) -> Tensor:
    return z if x is None or mask is None else torch.where(mask, x, z.to(x.dtype))
