r"""Missing entries of a datum, drawn by conditioning the program on the others.

The noising process acts on every entry alone, so the observed entries have an exact path :math:`z_T,\ldots,z_1` given
x.  The model runs from z_T down with the observed entries of each layer set to that path.  A layer's Gaussian is
diagonal, so the missing ones are drawn from it unchanged; the density of the observed ones,
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

from pyro_hvae.diffusion.denoising import DenoisingChain
from pyro_hvae.diffusion.process import Diffusion

__all__ = ["inpaint"]


@torch.no_grad()
def inpaint(
    model: DenoisingChain, guide: Diffusion, x: Tensor, mask: Tensor, *, num_particles: int = 1, context: Any = None
) -> Tensor:
    """Draw the missing entries of data given the observed ones.

    Args:
        model: a denoising chain of finitely many layers.
        guide: its noising process.
        x: data (N, *event_shape); values at missing entries are ignored.
        mask: True = observed, of the shape of x.
        num_particles: of the filter, for each datum.
        context: for the denoiser.

    Returns:
        (N, *event_shape), equal to x where it is observed.

    Raises:
        ValueError: for a mask of another shape or type, no particles, continuous time, or a guide of another process.

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
    if guide.schedule is not model.schedule or guide.num_layers != model.num_layers:
        raise ValueError(
            f"model and guide are different diffusions: {model.schedule!r} with {model.num_layers} layers, "
            f"{guide.schedule!r} with {guide.num_layers}; write Diffusion(model.schedule, model.num_layers, event_dim="
            f"{model.event_dim})"
        )
    if model.num_layers is None:
        raise ValueError("a diffusion in continuous time has no layers to condition: give num_layers")
    times = model.schedule.grid(model.num_layers).to(x)
    observed = torch.where(mask, x, torch.zeros_like(x))
    dims = tuple(range(2, 1 + x.dim()))  # those of an event, after particles and data

    def run(chain: DenoisingChain) -> Tensor:
        path = guide.marginal(times[-1], observed).sample()
        z = torch.where(mask, path, chain.prior(x).expand((num_particles, x.shape[0])).sample())
        for i in range(len(times) - 1, 0, -1):
            path = guide.posterior(times[i - 1], times[i], path, observed).sample()
            layer = chain.transition(times[i - 1], times[i], z, context).base_dist
            chosen = _resampled(torch.where(mask, layer.log_prob(path), 0.0).sum(dims))
            loc = torch.gather(layer.loc, 0, _event_index(chosen, layer.loc))
            drawn = loc + layer.scale * torch.randn_like(loc)
            z = torch.where(mask, path, drawn)
        last = chain.likelihood(z, context)
        while isinstance(last, torch.distributions.Independent):
            last = last.base_dist
        chosen = _resampled(torch.where(mask, last.log_prob(observed), 0.0).sum(dims), final=True)
        drawn = last.sample()
        return torch.where(mask, x, torch.gather(drawn, 0, _event_index(chosen, drawn)).squeeze(0))

    return model(visit=run)


def _resampled(log_weights: Tensor, *, final: bool = False) -> Tensor:
    """Draw indices of particles, (K, N) or at the end (1, N), by systematic resampling."""
    count, size = log_weights.shape
    wanted = 1 if final else count
    cumulated = log_weights.softmax(0).cumsum(0)
    start = torch.rand(1, size, dtype=log_weights.dtype, device=log_weights.device)
    points = (torch.arange(wanted, device=log_weights.device).to(log_weights)[:, None] + start) / wanted
    index = torch.searchsorted(cumulated.T.contiguous(), points.T.contiguous()).clamp(max=count - 1)
    return index.T


def _event_index(index: Tensor, like: Tensor) -> Tensor:
    """Expand indices of particles (K, N) to the events of ``like``, for ``gather``."""
    return index.reshape(index.shape + (1,) * (like.dim() - 2)).expand(index.shape + like.shape[2:])
