"""Discrete latents of the model that are summed out instead of drawn, by Pyro's own machinery.

A model site marked ``infer={"enumerate": "parallel"}`` that the guide does not draw is enumerated: the model's
log p of the sites that depend on it becomes one marginal log p, with the sum over its values inside and the product
over inner plates outside, as Tensor Variable Elimination for Factor Graphs (Obermeyer et al., 2019) does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyro
import pyro.poutine as poutine
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine import Trace
from torch import Tensor

from pyro_hvae.traces.structure import PARTICLES, Plate, Structure, plates_of, sample_sites, user_scale

__all__ = ["enumerated", "marginalise"]


def enumerated(model: Callable[..., Any], structure: Structure, num_particles: int) -> Callable[..., Any]:
    """The model with its enumerated sites laid out left of all plates and of the particles."""
    dims = structure.max_plate_nesting + (num_particles > 1)
    return poutine.enum(model, first_available_dim=-1 - dims)


def marginalise(
    trace: Trace, structure: Structure, reduce: Callable[[Tensor], Tensor], data_plates: tuple[Plate, ...]
) -> dict[str, Tensor]:
    """log p by site, those that depend on an enumerated site joined into one marginal under their names.

    Raises:
        ValueError: if sites that are summed together are scaled, other than by the datum's plates.
    """
    with pyro.validation_enabled(False):
        trace.compute_log_prob()
    trace.pack_tensors()
    sites = list(sample_sites(trace))
    symbols = {s["infer"]["_enumerate_symbol"] for s in sites if s["infer"].get("_enumerate_dim") is not None}
    terms: dict[str, Tensor] = {}
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    joined: list[str] = []
    kept = {plate.dim for plate in data_plates}
    target: set[str] = set()
    for site in sites:
        log_prob = packed.scale_and_mask(site["packed"]["unscaled_log_prob"], mask=site["packed"]["mask"])
        scale = user_scale(site, tuple(plate for plate in plates_of(site) if plate in data_plates))
        if symbols.isdisjoint(log_prob._pyro_dims) and structure.sites[site["name"]].role != "enumerated":
            terms[site["name"]] = reduce(packed.unpack(packed.scale_and_mask(log_prob, scale), trace.symbol_to_dim))
            continue
        if not (isinstance(scale, (int, float)) and scale == 1.0):
            raise ValueError(
                f"site '{site['name']}' depends on an enumerated variable and carries a scale ({scale}) of a "
                "subsampled plate that does not enclose all sites, or of poutine.scale; a scale can't stand inside "
                "the sum over its values. Draw the discrete variable in the guide instead."
            )
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        ordinal = frozenset(trace.plate_to_symbol[frame.name] for frame in frames)
        factors.setdefault(ordinal, []).append(log_prob)
        target |= {trace.plate_to_symbol[f.name] for f in frames if f.dim in kept or f.name == PARTICLES}
        if structure.sites[site["name"]].role != "enumerated":
            joined.append(site["name"])
    total = contract_to_tensor(factors, symbols, target_ordinal=frozenset(target))
    terms["+".join(joined) or "+".join(sorted(s["name"] for s in sites))] = reduce(
        packed.unpack(total, trace.symbol_to_dim)
    )
    return terms
