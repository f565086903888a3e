r"""How much each layer of latents knows of the data, and where all data together put it.

With the guide's :math:`q(z_l|x)` and its average over data, the aggregate posterior :math:`q(z_l)`,

.. math:: \mathrm E_x\,\mathrm{KL}(q(z_l|x)\|p(z_l)) =
          \underbrace{\mathrm E_x\,\mathrm{KL}(q(z_l|x)\|q(z_l))}_{I_q(x; z_l)} + \mathrm{KL}(q(z_l)\|p(z_l))

(ELBO surgery, Hoffman and Johnson, 2016).  The first part is what the layer says of x; the second is what draws from
the prior miss.  A layer has *collapsed* if it has neither an active unit nor information about x.  Its term in the
bound tells neither: in a bottom-up guide it may be large, or negative, for a layer that knows nothing.

A layer's marginals are mixtures over the draws of what comes before it; they are estimated by mixtures over draws, so
that information above :math:`\log N` can't be seen from N data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hvae.bounds import LayerwiseELBO
from pyro_hvae.diagnostics.layers import ACTIVE_THRESHOLD, mean_variances
from pyro_hvae.traces import Reading, read

__all__ = ["COLLAPSED_INFORMATION", "layers"]

COLLAPSED_INFORMATION = 0.05
"""Nats of I_q(x; z) below which a layer without active units counts as collapsed; a choice of this library."""

_PARENTS = 256
_ENTRIES_AT_ONCE = 2**22


def layers(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 16,
    threshold: float = ACTIVE_THRESHOLD,
    **kwargs: Any,
) -> Any:
    r"""What each layer of latents costs, knows and leaves unused.

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``; some hundred data are enough, and the cost
            grows with the square of their number.
        num_draws: S >= 2 draws of the guide for each datum.
        threshold: variance of a posterior mean above which a unit is active.

    Returns:
        ``xarray.Dataset`` over ``layer``, in the guide's order: ``term`` (nats a datum, what the layer costs in the
        bound) and ``analytic`` (whether it is a KL divergence in closed form); ``units`` and ``active_units``;
        ``mutual_information`` and ``aggregate_kl`` (nats); ``collapsed``.  Attributes: ``reconstruction`` and ``elbo``
        (nats a datum) and ``information_limit`` (nats, log N).

    Raises:
        ValueError: for ``num_draws < 2``, a single datum, or where no latent stands in a plate common to all sites.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def collapsed(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0 * x, 1.0))
        >>> _ = torch.manual_seed(0)
        >>> bool(layers(model, collapsed, torch.randn(50)).collapsed.sel(layer="z"))
        True
    """
    import xarray as xr

    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2, got {num_draws}")
    variances = mean_variances(model, guide, *args, num_draws=_PARENTS, **kwargs)
    terms = LayerwiseELBO(num_draws).terms(model, guide, *args, **kwargs)
    with torch.no_grad():
        reading = read(model, guide, args, kwargs, num_particles=num_draws)
        size = reading.log_weights[0].numel()
        names = [name for name in reading.structure.guide_order if name in variances]
        released = poutine.uncondition(model)
        prior = [poutine.trace(released).get_trace(*args, **kwargs) for _ in range(num_draws)]
        rows: dict[str, list[Any]] = {"mutual_information": [], "aggregate_kl": []}
        points = {name: _points(reading, name, size) for name in names}
        own = _own_densities(model, guide, args, kwargs, points, num_draws)
        for name in names:
            aggregate = _aggregate_density(reading, points[name], name, size)
            alone = [_densities_of(trace.nodes[name]["fn"], points[name], 1, size) for trace in prior]
            rows["mutual_information"].append(float((own[name] - aggregate).mean()))
            rows["aggregate_kl"].append(float((aggregate - _mixture(torch.cat(alone, 1))).mean()))
    rows["term"] = [float(_term(terms, name).mean()) for name in names]
    rows["analytic"] = [f"kl_{name}" in terms for name in names]
    rows["units"] = [variances[name].numel() for name in names]
    rows["active_units"] = [int((variances[name] > threshold).sum()) for name in names]
    information = np.array(rows["mutual_information"])
    rows["collapsed"] = [bool(c) for c in (np.array(rows["active_units"]) == 0) & (information < COLLAPSED_INFORMATION)]
    reconstruction = float(terms["reconstruction"].mean())
    return xr.Dataset(
        {name: ("layer", values) for name, values in rows.items()},
        coords={"layer": names},
        attrs={
            "reconstruction": reconstruction,
            "elbo": reconstruction - sum(float(v.mean()) for k, v in terms.items() if k != "reconstruction"),
            "information_limit": math.log(size),
            "num_data": size,
        },
    )


def _term(terms: Mapping[str, Tensor], name: str) -> Tensor:
    return terms[f"kl_{name}"] if f"kl_{name}" in terms else terms[f"rate_{name}"]


def _points(reading: Reading, name: str, size: int) -> Tensor:
    """One draw of a layer for each datum, (N, *event)."""
    first = reading.values[name][0]
    return first.reshape(size, *first.shape[first.dim() - reading.guide_trace.nodes[name]["fn"].event_dim :])


def _own_densities(
    model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any], points: Mapping[str, Tensor], num_draws: int
) -> dict[str, Tensor]:
    """log q(z|x) of each datum's own point, (N,), over fresh draws of what the guide draws before the layer."""
    found: dict[str, list[Tensor]] = {name: [] for name in points}
    for _ in range(_PARENTS // num_draws + 1):
        trace = read(model, guide, args, kwargs, num_particles=num_draws).guide_trace
        for name, value in points.items():
            fn = trace.nodes[name]["fn"]
            at = value.reshape(*fn.batch_shape[1:], *fn.event_shape)
            found[name].append(fn.log_prob(at).reshape(num_draws, -1))
    return {name: torch.cat(parts).logsumexp(0) - math.log(sum(map(len, parts))) for name, parts in found.items()}


def _aggregate_density(reading: Reading, points: Tensor, name: str, size: int) -> Tensor:
    """log q(z) of each point, (N,)."""
    parts = _densities_of(reading.guide_trace.nodes[name]["fn"], points, reading.num_particles, size)
    if not bool((parts.diff(dim=1).abs() < 1e-12).all()):
        parts = parts[:, 1:]  # the component of its own parents made the point, and would count it twice
    return _mixture(parts)


def _mixture(parts: Tensor) -> Tensor:
    return parts.flatten(1).logsumexp(1) - math.log(parts[0].numel())


def _densities_of(fn: Any, points: Tensor, draws: int, size: int) -> Tensor:
    """log-density of every point under every component: (points, draws, data)."""
    shape, event = fn.batch_shape, points.shape[1:]
    width = max(1, _ENTRIES_AT_ONCE // (draws * size * event.numel()))
    found = []
    for chunk in points.split(width):
        spread = chunk.reshape(len(chunk), *(1,) * len(shape), *event)
        found.append(fn.log_prob(spread).reshape(len(chunk), draws, size))
    return torch.cat(found)
