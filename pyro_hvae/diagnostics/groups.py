"""What one run of a pair says, by group of the ArviZ schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_hvae.diagnostics.layout import Layout, is_deterministic
from pyro_hvae.traces import Reading
from pyro_hvae.traces.running import Particles, bind_context
from pyro_hvae.traces.structure import sample_sites

__all__ = [
    "Groups",
    "constant_data",
    "observed_data",
    "posterior_groups",
    "prior_groups",
    "released",
    "unconstrained_shapes",
]

Groups = dict[str, dict[str, np.ndarray]]


class _Released(Messenger):
    """Draw what was observed; what the program computes or adds as a factor stays."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not is_deterministic(msg) and type(msg["fn"]).__name__ != "Unit":
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def released(
    model: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    max_plate_nesting: int,
    num_particles: int,
    draws: Trace | None = None,
) -> Trace:
    """A trace of the model with its observations drawn, and its latents too unless they are given."""
    (run,), rest = bind_context((model,), kwargs)
    run = _Released()(run)
    if num_particles > 1:
        run = Particles(num_particles, -max_plate_nesting - 1, frozenset())(run)
    if draws is not None:
        run = poutine.replay(run, trace=draws)
    with pyro.validation_enabled(False):
        return poutine.trace(run).get_trace(*args, **rest)


def prior_groups(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], layout: Layout, num_particles: int
) -> Groups:
    """Draws of the model with nothing observed."""
    trace = released(model, args, kwargs, layout.max_plate_nesting, num_particles)
    return {
        "prior": _values(trace, layout, num_particles, "latent", "enumerated", "deterministic"),
        "prior_predictive": _values(trace, layout, num_particles, "observed"),
    }


def _values(trace: Trace, layout: Layout, num_particles: int, *roles: str) -> dict[str, np.ndarray]:
    return {name: _array(layout.value(name, trace.nodes[name]["value"], num_particles)) for name in layout.role(*roles)}


def posterior_groups(
    reading: Reading,
    layout: Layout,
    wanted: frozenset[str],
    model: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    weighed: bool = True,
) -> Groups:
    """Draws of the guide with their densities and predictions.

    Args:
        weighed: the draws come from the guide, whose density says something.
    """
    count = reading.num_particles
    groups: Groups = {}
    if "posterior" in wanted:
        latent = {name: _array(layout.value(name, reading.values[name], count)) for name in layout.role("latent")}
        trace = reading.model_trace
        if layout.role("enumerated") and layout.role("deterministic"):  # computed from one value, not from all
            trace = released(model, args, kwargs, layout.max_plate_nesting, count, reading.guide_trace)
        groups["posterior"] = latent | _values(trace, layout, count, "deterministic")
    if "unconstrained_posterior" in wanted:
        groups["unconstrained_posterior"] = _unconstrained(reading, layout)
    if "posterior_predictive" in wanted:
        groups["posterior_predictive"] = _predictive(reading, layout, model, args, kwargs)
    if wanted & {"log_likelihood", "log_prior", "sample_stats"}:
        densities = _enumerated_densities if layout.role("enumerated") else _densities
        groups |= {name: group for name, group in densities(reading, layout, weighed).items() if name in wanted}
    return groups


def _densities(reading: Reading, layout: Layout, weighed: bool) -> Groups:
    """Each density is computed once, and used pointwise, by datum and in total."""
    count, whole = reading.num_particles, reading.over(())
    groups: Groups = {"log_likelihood": {}, "log_prior": {}, "sample_stats": {}}
    sums: dict[str, Tensor] = {}
    for kind, trace in (("p", reading.model_trace), ("q", reading.guide_trace)):
        if kind == "q" and not weighed:
            continue
        for site in sample_sites(trace):
            name, role = site["name"], layout.sites[site["name"]].role
            if role == "deterministic" or site["mask"] is False:
                continue
            raw = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            for key, reader in ((kind, whole), (f"datum {kind}", reading)):
                term = reader.weigh(site, raw)
                sums[key] = sums[key] + term if key in sums else term
            pointwise = raw if site["mask"] is None else scale_and_mask(raw, 1.0, site["mask"])
            values = _array(layout.density(name, pointwise, count))
            point = reading.structure.sites[name].guide_distribution == "Delta"
            if kind == "p":
                group, label = _P_GROUPS[role]
                groups[group][f"{label}{name}"] = values
            elif role in ("latent", "auxiliary"):
                of = name.removesuffix("_unconstrained")
                if role == "auxiliary" and of in layout.sites and values.shape[1:] == _batch(layout, of):
                    name = of  # its other part is the change of variables
                elif point and f"{name}_unconstrained" not in layout.sites:
                    continue  # computed from another site of the guide, whose density says it all
                stats = groups["sample_stats"]
                stats[f"log_q_{name}"] = stats[f"log_q_{name}"] + values if f"log_q_{name}" in stats else values
    groups["sample_stats"] = _totals(sums, layout, count, weighed) | groups["sample_stats"]
    return groups


_P_GROUPS = {
    "latent": ("log_prior", ""),
    "observed": ("log_likelihood", ""),
    "factor": ("sample_stats", "log_factor_"),
}


def _batch(layout: Layout, name: str) -> tuple[int, ...]:
    return tuple(plate.size for plate in layout.sites[name].plates)


def _totals(sums: Mapping[str, Tensor], layout: Layout, count: int, weighed: bool) -> dict[str, np.ndarray]:
    shape = (count, *(plate.size for plate in layout.common))
    zero = torch.zeros(())
    totals = {"lp": _array(sums.get("p", zero).expand(count))}
    if weighed:
        totals["log_q"] = _array(sums.get("q", zero).expand(count))
        totals["log_weight"] = _array((sums.get("datum p", zero) - sums.get("datum q", zero)).expand(shape))
    return totals


def _enumerated_densities(reading: Reading, layout: Layout, weighed: bool) -> Groups:
    """With discrete latents summed out, a density may belong to several sites; those of one site alone are kept."""
    count, common = reading.num_particles, [plate.dim for plate in reading.plates if plate.dim is not None]
    shape = (count, *(plate.size for plate in reading.plates))
    sums: dict[str, Tensor] = {}
    for kind, terms in (("p", reading.log_p), ("q", reading.log_q)):
        by_datum = sum(terms.values(), torch.zeros(())).expand(shape)
        sums[f"datum {kind}"] = by_datum
        sums[kind] = reading.scale * (by_datum.sum(common) if common else by_datum)
    groups: Groups = {"log_likelihood": {}, "log_prior": {}}
    groups["sample_stats"] = _totals(sums, layout, count, weighed)
    for name in layout.role("latent", "observed"):
        plates = layout.sites[name].plates
        within = reading.over(plates)
        shape = (count, *(plate.size for plate in plates))
        latent = layout.sites[name].role == "latent"
        if name in (terms := within.log_p):
            group = "log_prior" if latent else "log_likelihood"
            groups[group][name] = _array(_gapless(terms[name], plates).expand(shape))
        if weighed and latent:
            groups["sample_stats"][f"log_q_{name}"] = _array(_gapless(within.log_q[name], plates).expand(shape))
    return groups


def _gapless(value: Tensor, plates: tuple[Any, ...]) -> Tensor:
    return value.reshape(value.shape[0], *(value.shape[plate.dim] for plate in plates))


def _unconstrained(reading: Reading, layout: Layout) -> dict[str, np.ndarray]:
    """Continuous latents on the whole real line, by the bijection that Pyro's samplers and AutoGuides use."""
    found = {}
    for name in layout.role("latent"):
        support = reading.model_trace.nodes[name]["fn"].support
        if support.is_discrete:
            continue
        bijection = biject_to(support)
        value = bijection.inv(reading.values[name])
        site = layout.sites[name]
        rank = len(site.event_shape) + bijection.domain.event_dim - bijection.codomain.event_dim
        event = tuple(value.shape[value.dim() - rank :])
        found[name] = _array(layout.put(site, value, reading.num_particles, event))
    return found


def unconstrained_shapes(reading: Reading, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Event shapes off the support's constraint, which may lack an entry (a simplex) or a dim (a covariance)."""
    shapes = {}
    for name in layout.role("latent"):
        support = reading.model_trace.nodes[name]["fn"].support
        if not support.is_discrete:
            site = layout.sites[name]
            value = torch.Size(site.shape)
            shapes[name] = tuple(biject_to(support).inverse_shape(value))[len(site.plates) :]
    return shapes


def _predictive(
    reading: Reading, layout: Layout, model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """A draw of the data at each draw of the latents.

    One observed site is drawn from the distribution at hand.  Several may depend on each other, and variables that
    were summed out have to be drawn first, so the model runs once more.
    """
    names, count = layout.role("observed"), reading.num_particles
    if len(names) == 1 and not layout.role("enumerated"):
        drawn = reading.model_trace.nodes[names[0]]["fn"].sample()
        return {names[0]: _array(layout.value(names[0], drawn, count))}
    trace = released(model, args, kwargs, layout.max_plate_nesting, count, reading.guide_trace)
    return _values(trace, layout, count, "observed")


def observed_data(reading: Reading, layout: Layout) -> dict[str, np.ndarray]:
    """What was observed, of a run with one particle."""
    return {
        name: _array(layout.value(name, torch.as_tensor(reading.model_trace.nodes[name]["value"]), 1)[0])
        for name in layout.role("observed")
    }


def constant_data(
    bound: Mapping[str, Any], reading: Reading, layout: Layout
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Arguments that are tensors or arrays and were not observed, with their dims.

    A leading dim that has the size of exactly one plate gets its name.
    """
    observed = {name: reading.model_trace.nodes[name]["value"] for name in layout.role("observed")}
    sizes: dict[int, set[str]] = {}
    for site in layout.sites.values():
        for plate in site.plates:
            sizes.setdefault(plate.size, set()).add(plate.name)
    values, dims = {}, {}
    for name, value in bound.items():
        if not isinstance(value, (Tensor, np.ndarray)):
            continue
        array = _array(value) if isinstance(value, Tensor) else value
        if array.dtype.kind not in "biufc" or name in observed or any(_same(value, o) for o in observed.values()):
            continue
        label = name if name not in layout.sites else f"{name}_argument"
        names = [f"{label}_dim_{i}" for i in range(array.ndim)]
        plates = sizes.get(array.shape[0], set()) if array.ndim else set()
        if len(plates) == 1:
            names[0] = next(iter(plates))
        values[label], dims[label] = array, names
    return values, dims


def _same(value: Any, other: Any) -> bool:
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)) or value.shape != other.shape:
        return value is other
    return value is other or bool(torch.equal(value, other))


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
