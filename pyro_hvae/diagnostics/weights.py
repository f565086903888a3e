r"""Weigh or resample the draws of a tree, from the guide to the posterior.

With draws z from q and weights :math:`w = p(x, z)/q(z|x)`, the largest of them smoothed, posterior averages are
:math:`\sum_s w_s f(z_s) / \sum_s w_s` (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry,
2024).  Where every latent is local to a datum, each datum has weights of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyro_hvae.arguments import check_count
from pyro_hvae.diagnostics.arviz_versions import check_tree
from pyro_hvae.weights import effective_sample_size, good_khat, psis

__all__ = ["resample", "smoothed_weights"]

SAMPLE_DIMS = ("chain", "draw")


def smoothed_weights(tree: Any) -> Any:
    """Return PSIS weights of the draws of a tree.

    Args:
        tree: of :func:`pyro_hvae.diagnostics.to_datatree`, with draws of a guide or several; weights of several are
            normalised over all of them.

    Returns:
        ``xarray.Dataset`` with ``weight`` (chain, draw, common plates), which sums to 1 over chain and draw, and
        ``khat`` and ``ess`` (common plates); ``attrs["good_k"]`` is the largest reliable k-hat.

    Raises:
        ValueError: for a tree without ``log_weight``, or of a minibatch with global latents.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_hvae.diagnostics import to_datatree
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def shifted():
        ...     pyro.sample("z", dist.Normal(1.0, 1.5))
        >>> _ = torch.manual_seed(0)
        >>> tree = to_datatree(model, shifted, num_draws=2000)
        >>> weights = smoothed_weights(tree)
        >>> bool(abs((weights["weight"] * tree["posterior"]["z"]).sum()) < 0.1)
        True
    """
    import xarray as xr

    log_weights = _log_weights(tree)
    values = torch.as_tensor(log_weights.values)
    flat = values.reshape(-1, *values.shape[2:]).double()
    smoothed, khat = psis(flat)
    weights = smoothed.exp()
    data = log_weights.dims[2:]
    result = xr.Dataset(
        {
            "weight": (log_weights.dims, weights.reshape(values.shape).numpy()),
            "khat": (data, khat.numpy()),
            "ess": (data, effective_sample_size(smoothed).numpy()),
        },
        coords=log_weights.coords,
    )
    result.attrs = {"num_draws": len(flat), "good_k": good_khat(len(flat))}
    return result


def resample(tree: Any, num_draws: int | None = None, *, seed: int = 0) -> Any:
    """Resample draws of a guide in proportion to their smoothed weights, to draws of the posterior.

    Predictions and densities are resampled with the draws.  Where each datum has its own weights, data are resampled
    independently, and sums over the data (``lp``, ``log_q``) are left out.  The result is as reliable as the weights:
    check ``khat`` of :func:`smoothed_weights` first.

    Args:
        tree: of :func:`pyro_hvae.diagnostics.to_datatree`.
        num_draws: number of draws; that of the tree by default.
        seed: of the stratified resampling: each draw is taken in proportion to its weight, rounded up or down.

    Returns:
        A tree with one chain of ``num_draws`` equally weighted draws, whose ``attrs["draws"]`` is ``"resampled"``; for
        ArviZ, draws of the posterior, to which ``loo``, ``loo_pit`` and ``loo_expectations`` apply.

    Raises:
        ValueError: for ``num_draws < 1``, and as :func:`smoothed_weights`.

    Reference:
        Stratified resampling: Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models (Kitagawa,
        1996).

    Example:
        >>> from pyro_hvae.conjugate import guide, model
        >>> from pyro_hvae.diagnostics import to_datatree
        >>> _ = torch.manual_seed(0)
        >>> tree = resample(to_datatree(model, guide(slope=0.0, scale=1.0), torch.ones(3), num_draws=2000))
        >>> bool(abs(tree["posterior"]["z"].mean() - 0.5) < 0.1)
        True
    """
    import xarray as xr

    if num_draws is not None:
        check_count("num_draws", num_draws)
    check_count("seed", seed, 0)
    smoothed = smoothed_weights(tree)
    weights = smoothed["weight"]
    data = weights.dims[2:]
    stacked = weights.values.reshape(-1, *weights.shape[2:])
    count = num_draws or len(stacked)
    chosen = _stratified(stacked, count, np.random.default_rng(seed))
    groups = {}
    for name, node in tree.children.items():
        group = node.to_dataset()
        if "draw" in group.dims and not name.startswith("prior"):
            group = _taken(group, chosen, data)
        groups[name] = group
    resampled = xr.DataTree.from_dict(groups)
    resampled.attrs = {**tree.attrs, "draws": "resampled", "khat": float(smoothed["khat"].max())}
    return resampled


def _taken(group: Any, chosen: np.ndarray, data: tuple[Any, ...]) -> Any:
    """Return the chosen draws of every variable that has the data's dims."""
    import xarray as xr

    values = {}
    for name, variable in group.data_vars.items():
        if name in ("log_weight", "diverging") or not set(data) <= set(variable.dims):
            continue
        rest = [dim for dim in variable.dims if dim not in (*SAMPLE_DIMS, *data)]
        array = variable.transpose(*SAMPLE_DIMS, *data, *rest).values
        array = array.reshape(-1, *array.shape[2:])
        index = chosen.reshape(chosen.shape + (1,) * len(rest))
        values[name] = ((*SAMPLE_DIMS, *data, *rest), np.take_along_axis(array, index, 0)[None])
    kept = {dim: coord for dim, coord in group.coords.items() if dim not in SAMPLE_DIMS}
    coords = {**kept, "chain": [0], "draw": np.arange(len(chosen))}
    return xr.Dataset(
        values, coords={k: v for k, v in coords.items() if k in SAMPLE_DIMS or k in kept}, attrs=group.attrs
    )


def _stratified(weights: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw indices ``(count, *data)`` into weights ``(S, *data)``, in random order."""
    flat = weights.reshape(len(weights), -1)
    chosen = np.empty((count, flat.shape[1]), dtype=np.int64)
    for column in range(flat.shape[1]):
        steps = np.cumsum(flat[:, column])
        points = (np.arange(count) + generator.random(count)) / count * steps[-1]
        chosen[:, column] = generator.permutation(np.searchsorted(steps, points).clip(max=len(steps) - 1))
    return chosen.reshape(count, *weights.shape[1:])


def _log_weights(tree: Any) -> Any:
    """Return ``log_weight`` of a tree; refuse a tree without weights of its posterior."""
    check_tree(tree)
    stats = tree.children.get("sample_stats")
    if stats is None or "log_weight" not in stats:
        draws = tree.attrs.get("draws", "unknown")
        raise ValueError(
            f"the tree has no sample_stats/log_weight (its draws: {draws}): those of a sampler, or resampled "
            "already, are the posterior's as they are; of a guide, let to_datatree make the group sample_stats"
        )
    weights = stats["log_weight"]
    if weights.dims == SAMPLE_DIMS and tree.attrs.get("plate_scale", 1.0) != 1.0:
        raise ValueError(
            f"the tree is of a minibatch that stands for {tree.attrs['plate_scale']:g} times as many data: weights of "
            "latents that all data share need all data"
        )
    return weights.transpose(*SAMPLE_DIMS, ...)
