r"""Posterior predictive checks.

A replicate of the data is drawn from the model at each draw of the guide (the group ``posterior_predictive`` of a
tree).  A *test quantity* T of the data is compared with that of the replicates (Posterior Predictive Assessment of
Model Fitness via Realized Discrepancies, Gelman, Meng and Stern, 1996); the *probability integral transform* ranks each
datum among its replicates and is uniform where the model predicts with the right spread.  Both use the data twice and
are conservative; for an independent check, call the programs on held-out data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["QUANTITIES", "pit", "predictive_check"]

QUANTITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda values: values.mean(-1),
    "sd": lambda values: values.std(-1),
    "min": lambda values: values.min(-1),
    "max": lambda values: values.max(-1),
    "zeros": lambda values: (values == 0).mean(-1),
}
"""Default test quantities, of all entries of a data set along the last axis."""


def predictive_check(
    tree: Any,
    *,
    quantities: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    var_name: str | None = None,
) -> Any:
    r"""Compare test quantities of the data with those of replicates.

    Args:
        tree: of :func:`pyro_hvae.diagnostics.to_datatree`, with ``posterior_predictive`` and ``observed_data``.
        quantities: ``T(values)`` of entries (..., D), in the order of the data, giving (...); :data:`QUANTITIES` by
            default.
        var_name: the observed site, if there are several.

    Returns:
        ``pandas.DataFrame``, a row a quantity: ``observed``, the replicates' ``mean``, ``5%`` and ``95%``, and
        ``p_value``, the share of replicates above (ties counted half): near 0 or 1 the data do not look like the
        model's, in that respect.

    Raises:
        ValueError: without those groups, or for a quantity of the wrong shape.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_hvae.diagnostics import to_datatree
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 50):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x.mean(), 0.14))
        >>> _ = torch.manual_seed(0)
        >>> tree = to_datatree(model, guide, 3 * torch.randn(50), num_draws=200)
        >>> float(predictive_check(tree).loc["sd", "p_value"])
        0.0
    """
    import pandas as pd

    observed, replicated, _ = _pair(tree, var_name)
    data, many = observed.ravel(), replicated.reshape(len(replicated), -1)
    rows = {}
    for name, quantity in (QUANTITIES if quantities is None else quantities).items():
        at_data, at_many = np.asarray(quantity(data)), np.asarray(quantity(many))
        if at_data.shape != () or at_many.shape != (len(many),):
            raise ValueError(
                f"quantity {name!r} must map (..., {len(data)}) to (...), got {at_data.shape} for the data and "
                f"{at_many.shape} for {len(many)} replicates"
            )
        rows[name] = {
            "observed": float(at_data),
            "mean": float(at_many.mean()),
            "5%": float(np.quantile(at_many, 0.05)),
            "95%": float(np.quantile(at_many, 0.95)),
            "p_value": float((at_many > at_data).mean() + 0.5 * (at_many == at_data).mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def pit(tree: Any, *, var_name: str | None = None, seed: int = 0) -> Any:
    r"""Compute the probability integral transform of each entry of the data.

    Ties are broken at random (Predictive Model Assessment for Count Data, Czado, Gneiting and Held, 2009).

    Args:
        tree, var_name: as in :func:`predictive_check`.
        seed: of the ties.

    Returns:
        ``xarray.DataTree`` with the group ``pit``, (chain, draw) of one chain and an entry a draw, for
        ``arviz_plots.plot_ecdf_pit(tree, group="pit")``.
    """
    import xarray as xr

    observed, replicated, name = _pair(tree, var_name)
    rng = np.random.default_rng(seed)
    below, same = (replicated < observed).sum(0), (replicated == observed).sum(0)
    share = (below + rng.uniform(size=below.shape) * (same + 1)) / (len(replicated) + 1)
    data = xr.Dataset({name: (("chain", "draw"), share.reshape(1, -1))})
    return xr.DataTree.from_dict({"pit": data.assign_coords(chain=[0], draw=np.arange(share.size))})


def _pair(tree: Any, var_name: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the observed site's data, its replicates (S, *data), and its name; without masked entries."""
    missing = [group for group in ("observed_data", "posterior_predictive") if group not in tree.children]
    if missing:
        raise ValueError(
            f"the tree has no group {missing[0]!r}; it has {sorted(tree.children)}: ask to_datatree for it"
        )
    names = [name for name in tree["observed_data"].data_vars if name in tree["posterior_predictive"].data_vars]
    if var_name is None and len(names) != 1:
        raise ValueError(f"there are several observed sites, {names}: name one by var_name=")
    name = names[0] if var_name is None else var_name
    if name not in names:
        raise ValueError(f"no observed site {name!r} with replicates; there are {names}")
    replicated = tree["posterior_predictive"][name].stack(sample=("chain", "draw")).transpose("sample", ...)
    observed, many = tree["observed_data"][name].values, replicated.values
    likelihood = tree.children.get("log_likelihood", {})
    if name in likelihood:
        masked = (likelihood[name] == 0).all(("chain", "draw")).values
        if masked.any() and not masked.all():
            observed, many = observed[~masked], many[:, ~masked]
    if observed.dtype.kind == "f" and np.isnan(observed).any():  # missing entries of a table
        observed, many = observed[~np.isnan(observed)], many[:, ~np.isnan(observed)]
    return observed, many, str(name)
