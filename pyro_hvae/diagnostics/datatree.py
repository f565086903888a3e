r"""Draws of a guide as an ArviZ ``DataTree``, so that a variational posterior is inspected as a sampled one is.

Draws stand as ``(chain=1, draw=S)``; ``chain`` is left for guides trained independently of each other, since R-hat and
effective sample size of independent draws say nothing about a single one.  Further dims are named from the plates,
and from ``infer={"event_dims": [...]}`` of a site, as NumPyro's converter does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_hvae.traces import Reading, read
from pyro_hvae.traces.reading import total
from pyro_hvae.traces.structure import sample_sites

__all__ = ["to_datatree"]


def to_datatree(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 1000,
    chunk_size: int | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draw from a guide and collect draws, densities and predictions in the ArviZ schema.

    ====================== ==================================================================================
    group                  content
    ====================== ==================================================================================
    posterior              each latent site, (chain, draw, its plates, its event dims)
    sample_stats           ``lp`` = log p(x, z) and ``log_q`` = log q(z|x), summed over all sites, in nats
                           (chain, draw); ``log_weight``, their difference by datum, (chain, draw, plates)
    log_likelihood         log p(x|z) of each observed site, in no scale, pointwise (chain, draw, its plates)
    posterior_predictive   a draw of each observed site given the latents
    observed_data          what was observed
    ====================== ==================================================================================

    Args:
        model, guide: Pyro programs, called with ``args`` and ``kwargs``.
        num_draws: S >= 1.
        chunk_size: how many draws run at once; all by default.
        coords: labels by dim name.
        dims: names of the event dims by site, where the program does not give them.

    Returns:
        ``xarray.DataTree``.

    Raises:
        ValueError: for ``num_draws < 1``, or programs that do not fit each other.
        ImportError: without ``arviz-base``.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.7))
        >>> tree = to_datatree(model, guide, torch.zeros(3), num_draws=10)
        >>> dict(tree["posterior"].sizes)
        {'chain': 1, 'draw': 10, 'data': 3}
    """
    import arviz_base

    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    size = num_draws if chunk_size is None else min(chunk_size, num_draws)
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    parts: list[dict[str, dict[str, np.ndarray]]] = []
    names: dict[str, list[str]] = {}
    observed: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for start in range(0, num_draws, size):
            reading = read(model, guide, args, kwargs, num_particles=min(size, num_draws - start))
            parts.append(_groups(reading))
            if start == 0:
                names = _dim_names(reading, {} if dims is None else dims)
                observed = _observed(reading)
    data = {
        group: {name: np.concatenate([part[group][name] for part in parts])[None] for name in parts[0][group]}
        for group in parts[0]
    }
    tree = arviz_base.from_dict(
        {**data, "observed_data": observed},
        dims=names,
        coords=None if coords is None else dict(coords),
        sample_dims=["chain", "draw"],
    )
    for group in tree.children.values():
        group.attrs["inference_library"] = "pyro_hvae"
    return tree


def _groups(reading: Reading) -> dict[str, dict[str, np.ndarray]]:
    structure = reading.structure
    posterior = {name: _placed(reading, name, reading.values[name], "guide") for name in structure.latent}
    likelihood, predicted = {}, {}
    for site in sample_sites(reading.model_trace):
        name = site["name"]
        if structure.sites[name].role != "observed" or site["infer"].get("_deterministic"):
            continue
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        if isinstance(site["mask"], Tensor):
            log_prob = torch.where(site["mask"], log_prob, 0.0)
        likelihood[name] = _array(_squeeze(reading, name, log_prob, 0))
        predicted[name] = _placed(reading, name, site["fn"].sample(), "model")
    whole = reading.over(())
    log_p = total(whole.log_p).expand(reading.num_particles)
    log_q = total(whole.log_q).expand(reading.num_particles)
    return {
        "posterior": posterior,
        "sample_stats": {"lp": _array(log_p), "log_q": _array(log_q), "log_weight": _array(reading.log_weights)},
        "log_likelihood": likelihood,
        "posterior_predictive": predicted,
    }


def _placed(reading: Reading, name: str, value: Tensor, which: str) -> np.ndarray:
    trace = reading.guide_trace if which == "guide" else reading.model_trace
    return _array(_squeeze(reading, name, value, trace.nodes[name]["fn"].event_dim))


def _squeeze(reading: Reading, name: str, value: Tensor, event_dim: int) -> Tensor:
    """``(S, plates of the site, event)``: the batch dims that belong to no plate of the site are dropped."""
    rank = reading.structure.max_plate_nesting + 1 + event_dim
    if value.dim() < rank:
        value = value.reshape((1,) * (rank - value.dim()) + value.shape)
    if value.shape[0] != reading.num_particles:
        value = value.expand(reading.num_particles, *value.shape[1:])
    own = {plate.dim - event_dim for plate in reading.structure.sites[name].plates if plate.dim is not None}
    spare = [
        dim
        for dim in range(-value.dim() + 1, -event_dim)
        if dim not in own and value.shape[dim] == 1 and dim >= -rank + 1
    ]
    return value.squeeze(tuple(spare)) if spare else value


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _dim_names(reading: Reading, given: Mapping[str, list[str]]) -> dict[str, list[str]]:
    names = {}
    for name, site in reading.structure.sites.items():
        trace = reading.guide_trace if site.role in ("latent", "auxiliary") else reading.model_trace
        event = given.get(name) or site.event_dims
        plates = [plate.name for plate in site.plates if plate.dim is not None]
        dims = trace.nodes[name]["fn"].event_dim
        names[name] = plates + (list(event) if event else [f"{name}_dim_{i}" for i in range(dims)])
    names["log_weight"] = [plate.name for plate in reading.plates]
    return names


def _observed(reading: Reading) -> dict[str, np.ndarray]:
    found = {}
    for name in reading.structure.observed:
        site = reading.model_trace.nodes[name]
        if site["infer"].get("_deterministic"):
            continue
        found[name] = _array(site["value"])
    return found
