"""Check shapes of sites, and observed values against the supports of their likelihoods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.util import check_site_shape
from torch import Tensor

from pyro_hvae import devices
from pyro_hvae.problem.structure import sample_sites

__all__ = ["check_enumerated_shapes", "check_observation", "check_observations", "check_particles", "check_shapes"]


def check_particles(num_particles: int) -> None:
    """Refuse a number of particles that is not an integer of at least 1."""
    if not isinstance(num_particles, int) or isinstance(num_particles, bool) or num_particles < 1:
        raise ValueError(f"num_particles must be an integer of at least 1, got {num_particles!r}")


def check_observations(model_trace: Trace) -> None:
    """Check every observation of a trace against its distribution.

    Raises:
        ValueError: naming the site, and the count and first index of the offending values.
    """
    for site in sample_sites(model_trace):
        if site["is_observed"] and site["mask"] is not False:
            check_observation(site["name"], site["fn"], site["value"], site["mask"])


def check_shapes(model_trace: Trace, guide_trace: Trace) -> None:
    """Check the shape of every site against its plates.

    Raises:
        ValueError: naming the site.
    """
    for trace in (model_trace, guide_trace):
        with _unvalidated(trace):  # a draw of the guide may have density zero in the model
            trace.compute_log_prob()
        for site in sample_sites(trace):
            check_site_shape(site, float("inf"))


@contextmanager
def _unvalidated(trace: Trace) -> Iterator[None]:
    """Let the distributions of a trace take values outside of their supports."""
    changed: list[tuple[Any, dict[str, Any]]] = []
    for site in sample_sites(trace):
        fn = site["fn"]
        while fn is not None:
            if not isinstance(getattr(type(fn), "_validate_args", None), property):  # a property passes it to the base
                changed.append((fn, {key: value for key, value in vars(fn).items() if key == "_validate_args"}))
                fn._validate_args = False
            fn = getattr(fn, "base_dist", None)
    try:
        yield
    finally:
        for fn, own in reversed(changed):
            del fn._validate_args
            vars(fn).update(own)


def check_enumerated_shapes(nesting: int, *traces: Trace) -> None:
    """Check the dims of sites that depend on enumerated ones, of a run with one particle.

    Raises:
        ValueError: naming a site that reads a variable which ``pyro.markov`` has dropped from its history.
    """
    for trace in traces:
        trace.compute_log_prob()
        for site in sample_sites(trace):
            check_site_shape(site, nesting)


def check_observation(name: str, fn: Any, value: Tensor, mask: Any = None) -> None:
    """Check observed values for NaN, infinities and the support of their distribution.

    Raises:
        ValueError: with the count and the first index of the values outside.
    """
    if not isinstance(value, Tensor) or not devices.has_values(value, mask):
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
            else "choose a likelihood whose support contains the data"
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
    """Return which entries a mask hides from the likelihood."""
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
