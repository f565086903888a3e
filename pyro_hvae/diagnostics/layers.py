r"""What each layer of latents carries.

A unit is *active* when its posterior mean moves with the data, :math:`\mathrm{Var}_x\,\mathrm E_q[u|x] > 0.01`
(Importance Weighted Autoencoders, Burda, Grosse and Salakhutdinov, 2016).  A layer without active units has
collapsed onto its prior: the model does without it, whatever its term in the bound says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_hvae.traces import read

__all__ = ["ACTIVE_THRESHOLD", "active_units", "mean_variances"]

ACTIVE_THRESHOLD = 0.01
"""Variance of the posterior mean over the data above which a unit counts as active (Burda et al., 2016)."""


def mean_variances(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_draws: int = 64, **kwargs: Any
) -> dict[str, Tensor]:
    r"""Variance over the data of each unit's posterior mean, :math:`\mathrm{Var}_x\,\mathrm E_q[u|x]`.

    The mean of a layer is averaged over draws of the layers that the guide draws before it; what this average still
    varies by is subtracted, so that the estimate is unbiased and may be slightly negative for a dead unit.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.
        num_draws: S >= 2 draws.

    Returns:
        For each latent site in a plate that the data index, a tensor of its event shape, in the units of the latent
        squared.

    Raises:
        ValueError: for ``num_draws < 2``, a single datum, or where no latent stands in a plate common to all sites.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.stack([x / 2, 0 * x], -1), 0.7).to_event(1))
        >>> mean_variances(model, guide, torch.tensor([-1.0, 1.0]))["z"]
        tensor([0.5000, 0.0000])
    """
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2, got {num_draws}")
    with torch.no_grad():
        reading = read(model, guide, args, kwargs, num_particles=num_draws)
        if not reading.plates:
            raise ValueError("no plate is common to all sites, so no latent is indexed by the data")
        if reading.log_weights[0].numel() < 2:
            raise ValueError("a mean varies over data, and there is one datum: give two at least, better some hundreds")
        found = {}
        for name in reading.structure.latent:
            fn = reading.guide_trace.nodes[name]["fn"]
            try:
                means = fn.mean
            except NotImplementedError:
                means = reading.values[name]  # a flow: its draws scatter around the mean, which is subtracted too
            if not means.is_floating_point():
                means = means.to(torch.get_default_dtype())
            means = means.flatten(1, means.dim() - fn.event_dim - 1) if means.dim() - fn.event_dim > 2 else means
            average = means.mean(0)
            found[name] = average.var(0) - means.var(0).mean(0) / num_draws
        return found


def active_units(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 64,
    threshold: float = ACTIVE_THRESHOLD,
    **kwargs: Any,
) -> dict[str, int]:
    """How many units of each latent site are active.

    Args:
        num_draws: S >= 2, as in :func:`mean_variances`.
        threshold: variance above which a unit counts.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def collapsed(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0 * x, 1.0))
        >>> active_units(model, collapsed, torch.tensor([-1.0, 1.0]))
        {'z': 0}
    """
    variances = mean_variances(model, guide, *args, num_draws=num_draws, **kwargs)
    return {name: int((variance > threshold).sum()) for name, variance in variances.items()}
