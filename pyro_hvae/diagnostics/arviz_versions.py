"""Differences between the releases of ArviZ; no other file depends on them.

Python 3.11 has arviz 0.23, whose own objects are ``InferenceData``, beside arviz-base, arviz-stats and arviz-plots 0.8,
which know ``DataTree``; from Python 3.12 on, arviz 1.x is those three and ``DataTree`` alone.  Everything else of this
package imports ``arviz_base``, ``arviz_stats`` and ``arviz_plots``, which are the same on both.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyro_hvae.weights import good_khat

__all__ = ["check_tree", "dataset", "elpd_data", "library_versions", "ranked", "to_inferencedata"]


def to_inferencedata(tree: Any) -> Any:
    """Convert a tree to the ``InferenceData`` of arviz before 1.0.

    Args:
        tree: ``xarray.DataTree`` of :func:`pyro_hvae.diagnostics.to_datatree`.

    Returns:
        ``arviz.InferenceData`` with the same groups and attributes; a file's arrays are loaded.

    Raises:
        ImportError: with arviz 1.x, whose functions take the tree itself.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_hvae.diagnostics import to_datatree
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> tree = to_datatree(model, model, num_draws=5)
        >>> to_inferencedata(tree).posterior["z"].shape  # doctest: +SKIP
        (1, 5)
    """
    import arviz

    legacy = vars(arviz).get("InferenceData")  # reading the attribute makes 1.x warn
    if legacy is None:
        raise ImportError(
            f"arviz {_version('arviz')} has no InferenceData: since 1.0 its functions take the DataTree itself. Give "
            "them the tree"
        )
    groups = {name: group.to_dataset().load() for name, group in tree.children.items()}
    return legacy(attrs=dict(tree.attrs), **groups)


def dataset(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    *,
    sample_dims: Sequence[str] = ("chain", "draw"),
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Build one group: arrays with names of the dims after the draws', coordinates and the schema's attributes."""
    import arviz_base
    import pyro

    return arviz_base.dict_to_dataset(
        dict(values),
        dims={name: list(named) for name, named in dims.items()},
        coords=dict(coords),
        sample_dims=list(sample_dims),
        inference_library=pyro,
        attrs=None if attrs is None else dict(attrs),
        check_conventions=False,
    )


def elpd_data(
    elpd_i: Any,
    khat: np.ndarray,
    effective_i: np.ndarray,
    num_draws: int,
    *,
    log_weights: Any = None,
    approximate: bool = False,
) -> Any:
    """Build ArviZ's result of a cross-validation: ``ELPDData`` of kind loo in 0.8, ``ELPDDataLOO`` since 1.x.

    Args:
        elpd_i: ``xarray.DataArray``, an entry a datum, whose dims and labels the others have.
        khat, effective_i: of the same shape.
        num_draws: S, which sets the limit for k-hat.
        log_weights: ``xarray.DataArray`` with the dims of the draws in front.
    """
    from arviz_stats import utils

    pointwise, good = elpd_i.rename("elpd_i"), good_khat(num_draws)
    total, error, effective, _ = pointwise.azstats.loo_summary(pointwise.copy(data=effective_i))
    values: dict[str, Any] = {
        "elpd": float(total),
        "se": float(error),
        "p": float(effective),
        "n_samples": num_draws,
        "n_data_points": int(elpd_i.size),
        "scale": "log",
        "warning": bool((khat > good).any()),
        "good_k": good,
        "elpd_i": pointwise,
        "pareto_k": elpd_i.copy(data=khat).rename("pareto_shape"),
        "approx_posterior": approximate,
    }
    if log_weights is not None:
        values["log_weights"] = log_weights.rename("log_weights")
    if hasattr(utils, "ELPDDataLOO"):
        return utils.ELPDDataLOO(**values)
    return utils.ELPDData(kind="loo", **values)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries, by attribute name."""
    packages = {
        "creation_library": "pyro-hvae",
        "pyro": "pyro-ppl",
        "torch": "torch",
        "arviz_base": "arviz-base",
        "xarray": "xarray",
    }
    return {f"{name}_version": _version(package) for name, package in packages.items()}


def check_tree(tree: Any) -> None:
    """Refuse what is no DataTree.

    Raises:
        TypeError: with its type.
    """
    if not (hasattr(tree, "children") and hasattr(tree, "attrs")):
        raise TypeError(f"tree must be a DataTree of pyro_hvae.diagnostics.to_datatree, got {type(tree).__name__}")


def ranked(results: Mapping[str, Any], method: str) -> Any:
    """Call ``arviz_stats.compare`` without the rounding of 1.x, and without a warning of pandas 3.1 in 0.8."""
    import arviz_stats

    exact = {"round_to": "none"} if "round_to" in inspect.signature(arviz_stats.compare).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The inplace keyword")
        return arviz_stats.compare(dict(results), method=method, **exact)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
