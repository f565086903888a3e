r"""Weigh or resample the draws of a tree, so that they stand for the posterior instead of the guide.

With draws z from q and weights :math:`w = p(x, z)/q(z|x)`, the largest of them smoothed, posterior averages are
:math:`\sum_s w_s f(z_s) / \sum_s w_s` (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry,
2024).  Where every latent is local to a datum, each datum has weights of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyro_hvae.psis import good_khat, psis

__all__ = ["resample", "smoothed_weights"]

SAMPLE_DIMS = ("chain", "draw")


def smoothed_weights(tree: Any) -> Any:
    """PSIS weights of the draws of a tree.

    Args:
        tree: of :func:`pyro_hvae.diagnostics.to_datatree`, with draws of a guide or several; weights of several are
            normalised over all of them.

    Returns:
        ``xarray.Dataset`` with ``weight`` (chain, draw, common plates), which sums to 1 over chain and draw, and
        ``khat`` and ``ess`` (common plates); ``attrs["good_k"]`` is the largest k-hat to be trusted.

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
    found = xr.Dataset(
        {
            "weight": (log_weights.dims, weights.reshape(values.shape).numpy()),
            "khat": (data, khat.numpy()),
            "ess": (data, (1 / weights.square().sum(0)).numpy()),
        },
        coords=log_weights.coords,
    )
    found.attrs = {"num_draws": len(flat), "good_k": good_khat(len(flat))}
    return found


def resample(tree: Any, num_draws: int | None = None, *, seed: int = 0) -> Any:
    """Draws of the posterior from those of a guide, drawn again in proportion to their smoothed weights.

    Draws are taken whole, with their predictions and densities.  Where each datum has weights of its own, the draws of
    one datum are taken without regard to the others', and what sums over the data (``lp``, ``log_q``) is left out.
    Worth no more than the weights: look at ``khat`` of :func:`smoothed_weights` first.

    Args:
        tree: of :func:`pyro_hvae.diagnostics.to_datatree`.
        num_draws: how many; as many as there are by default.
        seed: of the resampling, which is stratified: each draw is taken as often as its weight says, or once more.

    Returns:
        A tree with one chain of ``num_draws`` equally weighted draws, whose ``attrs["draws"]`` is ``"resampled"``; for
        ArviZ, draws of the posterior, so that its ``loo``, ``loo_pit`` and ``loo_expectations`` hold as they are.

    Raises:
        ValueError: for ``num_draws < 1``, and as :func:`smoothed_weights`.

    Reference:
        Stratified resampling: Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models (Kitagawa,
        1996).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_hvae.diagnostics import to_datatree
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def shifted():
        ...     pyro.sample("z", dist.Normal(1.0, 1.5))
        >>> _ = torch.manual_seed(0)
        >>> tree = resample(to_datatree(model, shifted, num_draws=2000))
        >>> bool(abs(tree["posterior"]["z"].mean()) < 0.1)
        True
    """
    import xarray as xr

    if num_draws is not None and num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    found = smoothed_weights(tree)
    weights = found["weight"]
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
    again = xr.DataTree.from_dict(groups)
    again.attrs = {**tree.attrs, "draws": "resampled", "khat": float(found["khat"].max())}
    return again


def _taken(group: Any, chosen: np.ndarray, data: tuple[Any, ...]) -> Any:
    """The chosen draws of every variable that has the data's dims."""
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
    """Indices ``(count, *data)`` into weights ``(S, *data)``, in random order."""
    flat = weights.reshape(len(weights), -1)
    chosen = np.empty((count, flat.shape[1]), dtype=np.int64)
    for column in range(flat.shape[1]):
        steps = np.cumsum(flat[:, column])
        points = (np.arange(count) + generator.random(count)) / count * steps[-1]
        chosen[:, column] = generator.permutation(np.searchsorted(steps, points).clip(max=len(steps) - 1))
    return chosen.reshape(count, *weights.shape[1:])


def _log_weights(tree: Any) -> Any:
    """``log_weight`` of a tree, where it is one of the posterior's."""
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
