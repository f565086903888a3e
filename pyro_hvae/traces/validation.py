"""Checks of the first run of a pair: shapes of sites, and observed values that a likelihood can take."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine import Trace
from pyro.util import check_site_shape
from torch import Tensor

from pyro_hvae.traces.structure import sample_sites

__all__ = ["check_observation", "check_particles", "check_values"]


def check_particles(num_particles: int) -> None:
    if not isinstance(num_particles, int) or isinstance(num_particles, bool) or num_particles < 1:
        raise ValueError(f"num_particles must be an integer of at least 1, got {num_particles!r}")


def check_values(model_trace: Trace, guide_trace: Trace) -> None:
    """Check the shape of every site against its plates, and every observation against its distribution.

    Raises:
        ValueError: naming the site, and the count and first index of the offending values.
    """
    for site in sample_sites(model_trace):
        if site["is_observed"] and site["mask"] is not False:
            check_observation(site["name"], site["fn"], site["value"], site["mask"])
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
        for site in sample_sites(trace):
            check_site_shape(site, float("inf"))


def check_observation(name: str, fn: Any, value: Tensor, mask: Any = None) -> None:
    """Check observed values for NaN, infinities and the support of their distribution.

    Raises:
        ValueError: with count and first index of what does not fit.
    """
    if not isinstance(value, Tensor):
        return
    hidden = _hidden(mask, value, fn)
    if value.is_floating_point():
        _refuse(name, value, ~torch.isfinite(value) & ~hidden, "are NaN or infinite", "drop or mask these entries")
    try:
        support = fn.support
        inside = support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError):
        return
    outside = ~inside
    if outside.dim() < value.dim():
        outside = outside.reshape(outside.shape + (1,) * (value.dim() - outside.dim())).expand(value.shape)
        exact = _elementwise(fn, value)
        outside = outside if exact is None else ~exact
    if outside.dim() == value.dim():
        advice = (
            "binarize the data first (pyro_hvae.data.binarize), or choose a likelihood for such values"
            if "Bernoulli" in _leaf(fn)
            else "choose a likelihood whose support holds the data"
        )
        _refuse(name, value, outside & ~hidden, f"lie outside of the support of {_leaf(fn)}", advice)


def _elementwise(fn: Any, value: Tensor) -> Tensor | None:
    while type(fn).__name__ in ("Independent", "ExpandedDistribution"):
        fn = fn.base_dist
    try:
        inside = fn.support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError):
        return None
    return inside if inside.shape == value.shape else None


def _leaf(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


def _hidden(mask: Any, value: Tensor, fn: Any) -> Tensor:
    """Entries that the likelihood never sees."""
    hidden = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    for candidate in (mask, _base_mask(fn)):
        if isinstance(candidate, Tensor) and candidate.dtype == torch.bool:
            shape = candidate.shape + (1,) * (value.dim() - candidate.dim())
            try:
                hidden = hidden | ~candidate.reshape(shape).expand(value.shape)
            except RuntimeError:
                continue
    return hidden


def _base_mask(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        if hasattr(fn, "_mask"):
            return fn._mask
        fn = fn.base_dist
    return None


def _refuse(name: str, value: Tensor, bad: Tensor, what: str, advice: str) -> None:
    count = int(bad.sum())
    if count:
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{count} of {value.numel()} observed values at site '{name}' {what}; "
            f"the first is {value[first].item()} at index {first}: {advice}"
        )
