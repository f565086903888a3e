"""Checks before the first step: scales of batches, and observed values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.infer.autoguide.guides import AutoCallable
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.problem import Plate, Structure
from pyro_hvae.problem.checks import check_observation, check_observations
from pyro_hvae.problem.isolation import kept_generators
from pyro_hvae.problem.structure import is_factor, sample_sites
from pyro_hvae.training.feed import Batch, Feed, TensorFeed, rows_of
from pyro_hvae.training.objective import PairObjective, accepts

__all__ = ["check_data", "require_scale"]

ROWS = 8192
"""Number of data that are checked at once."""


def require_scale(objective: PairObjective, example: Batch, batches: Feed, data_size: int | None) -> None:
    """Refuse batches of a pair with latents of the whole data set, unless the pair scales a batch to the data set.

    A latent outside of the batch's plate has one prior and as many likelihood terms as there are data.  With the terms
    of one batch alone its posterior would be that of a batch.

    Args:
        example: one batch.
        data_size: N, None if unknown.

    Raises:
        ValueError: naming the sites.
    """
    rows = rows_of(*example)
    if rows is None or isinstance(objective.bound, DiffusionELBO):  # its latents are local to a datum
        return
    if (batches.batches == 1) if data_size is None else (data_size <= rows):
        return
    structure = objective.problem(*example).structure
    plates = _batch_plates(structure, rows)
    if not plates and (rows == 1 or data_size is None):  # each batch is one datum
        return
    _refuse_autoguide(objective.guide, structure, plates, rows)
    drawn = structure.drawn + structure.enumerated
    outside = [name for name in drawn if not plates & set(structure.sites[name].plates)]
    if not outside or any(plate.subsampled for plate in plates):
        return
    if any(structure.sites[name].user_scaled for name in structure.observed):
        return
    whole = "an unknown number of" if data_size is None else data_size
    where = f"plate {sorted(plate.name for plate in plates)}, which has" if plates else "any plate of the batch, with"
    if objective.data_size is None and accepts(objective.model, "data_size"):
        advice = "Pass data_size=N to fit(), so that the model can scale a batch to the N data"
    else:
        advice = (
            "Let the model take N, as in def model(x, data_size=None): ... pyro.plate('data', data_size or len(x), "
            "subsample=torch.arange(len(x))), to which fit() passes data_size=N; or pass batch_size=None, for all data "
            "at once"
        )
    raise ValueError(
        f"a batch shows {rows} of {whole} data, and the latent site(s) {outside} are outside of {where} no scale "
        f"N/B: fit() would fit their posterior given {rows} data. {advice}"
    )


def _batch_plates(structure: Structure, rows: int) -> set[Plate]:
    """Return the plates around observed sites whose size is the number of rows of the batch."""
    observed = [structure.sites[name] for name in structure.observed]
    return {
        plate
        for site in observed
        if not site.deterministic and site.model_distribution != "Unit"
        for plate in site.plates
        if plate.dim is not None and plate.size == rows
    }


def _refuse_autoguide(guide: Any, structure: Structure, plates: set[Plate], rows: int) -> None:
    """Refuse an AutoGuide that would use the same parameters for different rows of the data."""
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    for part in parts:
        if not isinstance(part, AutoGuide) or isinstance(part, AutoCallable) or part.prototype_trace is None:
            continue
        if guide.create_plates is not None:
            continue
        local = [
            name
            for name in structure.latent
            if name in part.prototype_trace.nodes and plates & set(structure.sites[name].plates)
        ]
        if local:
            raise ValueError(
                f"{type(part).__name__} has parameters for {rows} values of the latent site(s) {local}, one for each "
                "row of a batch, and would use them for every batch. Use a guide that is a function of "
                "the data (BottomUp, or a network), or pass batch_size=None; programs that draw their own subsample "
                "take AutoNormal(model, create_plates=...) and batch_size=None"
            )


def check_data(
    objective: PairObjective, example: Batch, batches: Feed, transform: Callable[[tuple, dict[str, Any]], Batch] | None
) -> None:
    """Check observed values for NaN, infinities and the support of their likelihood.

    A site that observes an argument is checked on the whole data, if these are tensors in memory.  A site that observes
    a value computed from arguments, a site with a mask, and data that are read batch by batch are checked on the first
    batch only.

    Args:
        transform: of each batch, or None.

    Raises:
        ValueError: naming the site, the count and the first of the values.
    """
    if isinstance(objective.bound, DiffusionELBO):
        return
    trace, _ = objective.problem(*example).look()
    check_observations(trace)
    if not isinstance(batches, TensorFeed):
        return
    arguments = _named(*example)
    checked = []
    for site in sample_sites(trace):
        if not site["is_observed"] or site["mask"] is not None or is_factor(site):
            continue
        for name, value in arguments.items():
            if _same(value, site["value"]) and _same_for_all_rows(site["fn"]):
                checked.append((site["name"], site["fn"], name))
    if not checked:
        return
    with torch.no_grad(), kept_generators():
        for start, batch in _pieces(batches, transform):
            values = _named(*batch)
            for site_name, fn, name in checked:
                try:
                    check_observation(site_name, fn, values[name])
                except ValueError as error:
                    raise ValueError(f"in the rows of the data from {start} on: {error}") from None


def _pieces(batches: TensorFeed, transform: Any) -> Any:
    """Yield all data in their order: in large pieces, or batch by batch if there is a transform."""
    size = ROWS if transform is None else batches.batch_size
    for start in range(0, batches.data_size, size):
        rows = slice(start, start + size)
        args, kwargs = tuple(v[rows] for v in batches.args), {name: v[rows] for name, v in batches.kwargs.items()}
        yield start, (args, kwargs) if transform is None else transform(args, kwargs)


def _named(args: tuple, kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    return {**dict(enumerate(args)), **kwargs}


def _same(argument: Any, value: Any) -> bool:
    if not (isinstance(argument, Tensor) and isinstance(value, Tensor)):
        return False
    return argument is value or (
        argument.device == value.device
        and argument.data_ptr() == value.data_ptr()
        and argument.shape == value.shape
        and argument.stride() == value.stride()
    )


def _same_for_all_rows(fn: Any) -> bool:
    """Whether the support of a distribution is the same for each row of a batch."""
    leaf = fn
    while hasattr(leaf, "base_dist"):
        if getattr(leaf, "_mask", None) is not None:
            return False
        leaf = leaf.base_dist
    try:
        return _single(fn.support)
    except (NotImplementedError, AttributeError, RuntimeError):
        return False


def _single(value: Any) -> bool:
    if isinstance(value, Constraint):
        return all(_single(part) for part in vars(value).values())
    if isinstance(value, (list, tuple)):
        return all(map(_single, value))
    return not isinstance(value, Tensor) or value.numel() == 1
