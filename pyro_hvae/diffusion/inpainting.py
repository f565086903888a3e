r"""Missing entries of a datum, drawn by conditioning the program on the others.

The noising process acts on every entry alone, so the observed entries have an exact path :math:`z_T,\ldots,z_1` given
x.  The model runs from z_T down with the observed entries of each layer set to that path.  A layer's entries are
independent given the layer above, so the missing ones are drawn from it unchanged; the density of the observed ones,
:math:`p(z_{t-1}^{obs}|z_t)`, is the weight of a particle, and particles are resampled by it:

- one particle: the weights are dropped; fast, and biased towards the unconditional model;
- many: a particle filter, whose draws tend to :math:`p(x^{mis}|x^{obs})`.

References: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021) for one
particle; Diffusion Probabilistic Modeling of Protein Backbones in 3D for the Motif-Scaffolding Problem (Trippe et al.,
2023) for many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_hvae.diffusion.process import NoisingProcess
from pyro_hvae.diffusion.reverse import ReverseChain

__all__ = ["inpaint"]


@torch.no_grad()
def inpaint(
    model: ReverseChain, guide: NoisingProcess, x: Tensor, mask: Tensor, *, num_particles: int = 1, context: Any = None
) -> Tensor:
    """Draw the missing entries of data given the observed ones.

    Args:
        model: a denoising chain of finitely many layers, Gaussian or discrete.
        guide: its noising process.
        x: data (N, *event_shape); values at missing entries are ignored.
        mask: True = observed, of the shape of x.
        num_particles: of the filter, for each datum.
        context: for the denoiser.

    Returns:
        (N, *event_shape), equal to x where it is observed.

    Raises:
        ValueError: for a mask of another shape or type, no particles, continuous time, a guide of another process, or
            observed entries of probability zero.

    Example:
        >>> from pyro_hvae.models import vdm
        >>> from pyro_hvae.nn import DenoisingMLP
        >>> _ = torch.manual_seed(0)
        >>> model, guide = vdm(DenoisingMLP(2), event_shape=2, num_layers=10)
        >>> observed = torch.tensor([[True, False]])
        >>> inpaint(model, guide, torch.tensor([[0.5, 0.0]]), observed, num_particles=4)[0, 0].item()
        0.5
    """
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be boolean of the shape of x {tuple(x.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if num_particles < 1:
        raise ValueError(f"num_particles must be at least 1, got {num_particles}")
    parts = [(program.noise, program.schedule, program.num_layers) for program in (model, guide)]
    if parts[0] != parts[1]:
        raise ValueError(
            "model and guide are different diffusions: "
            + ", ".join(f"{noise} noise by {schedule!r} with {layers} layers" for noise, schedule, layers in parts)
            + f"; write Diffusion(model.schedule, model.num_layers, event_dim={model.event_dim}), or "
            "DiscreteDiffusion(model.corruption, ...)"
        )
    if model.num_layers is None:
        raise ValueError("a diffusion in continuous time has no layers to condition: give num_layers")
    real = x if x.is_floating_point() else model.reference()
    times = model.time(torch.arange(1, model.num_layers + 1, dtype=real.dtype, device=x.device))
    observed = torch.where(mask, x, torch.zeros_like(x))
    noising = guide.given(context)
    dims = tuple(range(2, 1 + x.dim()))  # those of an event, after particles and data

    def run(chain: ReverseChain) -> Tensor:
        path = noising.marginal(times[-1], observed).sample()
        z = torch.where(mask, path, chain.prior(x).expand((num_particles, x.shape[0])).sample())
        for i in range(len(times) - 1, 0, -1):
            path = noising.posterior(times[i - 1], times[i], path, observed).sample()
            layer = _entries(chain.transition(times[i - 1], times[i], z, context))
            chosen = _resampled(torch.where(mask, layer.log_prob(path), 0.0).sum(dims))
            z = torch.where(mask, path, _draw(layer, chosen))
        last = _entries(chain.likelihood(z, context))
        chosen = _resampled(torch.where(mask, last.log_prob(observed), 0.0).sum(dims), final=True)
        drawn = last.sample()
        return torch.where(mask, x, torch.gather(drawn, 0, _event_index(chosen, drawn)).squeeze(0).to(x.dtype))

    return model(visit=run)


def _entries(distribution: Any) -> Any:
    """Return the distribution of single entries, which must be independent."""
    base = distribution
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if base.event_shape:
        raise ValueError(
            f"the entries of a layer ({type(base).__name__}) are not independent given the layer above, so observed "
            "ones can't be set apart; with any-order noise use unmask(model, x=x, mask=mask)"
        )
    return base


def _draw(layer: Any, chosen: Tensor) -> Tensor:
    """Draw from a layer's distribution at the chosen particles."""
    if isinstance(layer, torch.distributions.Categorical):
        logits = torch.gather(layer.logits, 0, _event_index(chosen, layer.logits))
        return torch.distributions.Categorical(logits=logits).sample()
    loc = torch.gather(layer.loc, 0, _event_index(chosen, layer.loc))
    return loc + layer.scale * torch.randn_like(loc)


def _resampled(log_weights: Tensor, *, final: bool = False) -> Tensor:
    """Draw indices of particles, (K, N) or at the end (1, N), by systematic resampling."""
    count, size = log_weights.shape
    wanted = 1 if final else count
    lost = ~(log_weights.max(0).values > -torch.inf)
    if bool(lost.any()):
        raise ValueError(
            f"the observed entries of datum {int(lost.nonzero()[0])} have probability zero in every particle: they are "
            "outside of what the model can produce, or num_particles is too small"
        )
    cumulated = log_weights.softmax(0).cumsum(0)
    start = torch.rand(1, size, dtype=log_weights.dtype, device=log_weights.device)
    points = (torch.arange(wanted, device=log_weights.device).to(log_weights)[:, None] + start) / wanted
    index = torch.searchsorted(cumulated.T.contiguous(), points.T.contiguous()).clamp(max=count - 1)
    return index.T


def _event_index(index: Tensor, like: Tensor) -> Tensor:
    """Expand indices of particles (K, N) to the events of ``like``, for ``gather``."""
    return index.reshape(index.shape + (1,) * (like.dim() - 2)).expand(index.shape + like.shape[2:])
