"""The groups of the ArviZ schema, from one run of a problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_hvae.diagnostics.sites import TreeSites
from pyro_hvae.problem import Layout, Problem, Run, total
from pyro_hvae.problem.structure import sample_sites

__all__ = [
    "Groups",
    "as_array",
    "constant_data",
    "observed_data",
    "posterior_groups",
    "prior_groups",
    "unconstrained_shapes",
]

Groups = dict[str, dict[str, np.ndarray]]


def prior_groups(problem: Problem, sites: TreeSites, num_particles: int) -> Groups:
    """Draw from the model with nothing observed."""
    trace, layout = problem.released(num_particles), Layout(problem.structure.max_plate_nesting, num_particles)
    return {
        "prior": _values(trace, sites, layout, "latent", "enumerated", "deterministic"),
        "prior_predictive": _values(trace, sites, layout, "observed"),
    }


def _values(trace: Trace, sites: TreeSites, layout: Layout, *roles: str) -> dict[str, np.ndarray]:
    return {name: as_array(sites.value(name, trace.nodes[name]["value"], layout)) for name in sites.role(*roles)}


def posterior_groups(
    problem: Problem, run: Run, sites: TreeSites, wanted: frozenset[str], *, weighed: bool = True
) -> Groups:
    """Return draws of the guide with their densities and predictions.

    Args:
        weighed: whether to evaluate the guide's density.
    """
    groups: Groups = {}
    if wanted & {"log_likelihood", "log_prior", "sample_stats"}:
        densities = _enumerated_densities if sites.role("enumerated") else _densities
        groups |= {name: group for name, group in densities(run, sites, weighed).items() if name in wanted}
    if "unconstrained_posterior" in wanted:
        groups["unconstrained_posterior"] = _unconstrained(run, sites)
    if wanted & {"posterior", "posterior_predictive"}:
        drawn = _drawn(problem, run, sites, "posterior_predictive" in wanted)
        groups |= {name: group for name, group in drawn.items() if name in wanted}
    return groups


def _drawn(problem: Problem, run: Run, sites: TreeSites, predictive: bool) -> Groups:
    """Return latents, summed-out sites, deterministic sites, and a draw of the data at each draw of the latents.

    A single observed site is drawn from its distribution in the trace.  For several, which may depend on each other,
    and for summed-out sites, which are drawn from their posterior, the model runs once more.
    """
    layout, states = run.layout, run.draw_states()
    latent = {name: as_array(sites.value(name, run.values[name], layout)) for name in sites.role("latent")}
    latent |= {name: as_array(sites.value(name, states[name], layout)) for name in sites.role("enumerated")}
    observed, trace = sites.role("observed"), run.model_trace
    if (states and (predictive or sites.role("deterministic"))) or (predictive and len(observed) > 1):
        trace = problem.released(run.num_particles, _with_states(run.guide_trace, states))
        replicates = _values(trace, sites, layout, "observed") if predictive else {}
    elif predictive:
        replicates = {name: as_array(sites.value(name, trace.nodes[name]["fn"].sample(), layout)) for name in observed}
    else:
        replicates = {}
    computed = _values(trace, sites, layout, "deterministic")
    return {"posterior": latent | computed, "posterior_predictive": replicates}


def _with_states(guide_trace: Trace, states: Mapping[str, Tensor]) -> Trace:
    """Return the guide's draws, with values of sites that it does not draw."""
    draws = guide_trace.copy()
    for name, value in states.items():
        draws.add_node(name, type="sample", name=name, value=value, is_observed=False, infer={})
    return draws


def _densities(run: Run, sites: TreeSites, weighed: bool) -> Groups:
    """Return densities pointwise, by datum and in total; each is computed once."""
    layout, whole = run.layout, run.over(())
    groups: Groups = {"log_likelihood": {}, "log_prior": {}, "sample_stats": {}}
    sums: dict[str, Tensor] = {}
    for kind, trace in (("p", run.model_trace), ("q", run.guide_trace)):
        if kind == "q" and not weighed:
            continue
        for site in sample_sites(trace):
            name, role = site["name"], sites[site["name"]].role
            if role == "deterministic" or site["mask"] is False:
                continue
            raw = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            for key, part in ((kind, whole), (f"datum {kind}", run)):
                term = part.weigh(site, raw)
                sums[key] = sums[key] + term if key in sums else term
            mask = run.mask_of(site)
            pointwise = raw if mask is None else scale_and_mask(raw, 1.0, mask)
            values = as_array(sites.density(name, pointwise, layout))
            if kind == "p":
                group, label = _P_GROUPS[role]
                groups[group][f"{label}{name}"] = values
            elif role in ("latent", "auxiliary"):
                _add_log_q(groups["sample_stats"], run, sites, name, values)
    groups["sample_stats"] = _totals(sums, run, weighed) | groups["sample_stats"]
    return groups


_P_GROUPS = {
    "latent": ("log_prior", ""),
    "observed": ("log_likelihood", ""),
    "factor": ("sample_stats", "log_factor_"),
}


def _add_log_q(stats: dict[str, np.ndarray], run: Run, sites: TreeSites, name: str, values: np.ndarray) -> None:
    """Add a density of the guide under the name of the latent that it belongs to."""
    of = name.removesuffix("_unconstrained")
    batch = tuple(plate.size for plate in sites[of].plates) if of in sites else None
    if sites[name].role == "auxiliary" and values.shape[1:] == batch:
        name = of  # the other part is the change of variables
    elif run.structure.sites[name].guide_distribution == "Delta" and f"{name}_unconstrained" not in sites:
        return  # computed from another site of the guide, which has the density
    label = f"log_q_{name}"
    stats[label] = stats[label] + values if label in stats else values


def _totals(sums: Mapping[str, Tensor], run: Run, weighed: bool) -> dict[str, np.ndarray]:
    count, zero = run.num_particles, torch.zeros(())
    totals = {"lp": as_array(sums.get("p", zero).expand(count))}
    if weighed:
        totals["log_q"] = as_array(sums.get("q", zero).expand(count))
        totals["log_weight"] = as_array((sums.get("datum p", zero) - sums.get("datum q", zero)).expand(run.shape))
    return totals


def _enumerated_densities(run: Run, sites: TreeSites, weighed: bool) -> Groups:
    """Return the densities of single sites, where discrete latents are summed out; joint ones are left out."""
    sums: dict[str, Tensor] = {}
    for kind, terms in (("p", run.log_p), ("q", run.log_q)):
        by_datum = run.shaped(total(terms)) if terms else torch.zeros(run.shape)
        sums[f"datum {kind}"] = by_datum
        sums[kind] = run.scale * by_datum.flatten(1).sum(1) if run.plates else by_datum
    groups: Groups = {"log_likelihood": {}, "log_prior": {}}
    groups["sample_stats"] = _totals(sums, run, weighed)
    for name in sites.role("latent", "observed"):
        latent, value = sites[name].role == "latent", run.log_p_alone(name)
        if value is not None:
            groups["log_prior" if latent else "log_likelihood"][name] = as_array(value)
        if weighed and latent:
            within = run.over(sites[name].plates)
            groups["sample_stats"][f"log_q_{name}"] = as_array(within.shaped(within.log_q[name]))
    return groups


def _unconstrained(run: Run, sites: TreeSites) -> dict[str, np.ndarray]:
    """Return continuous latents on the real line, by the bijection of Pyro's samplers and AutoGuides."""
    values = {}
    for name in sites.role("latent"):
        support = _support(run.model_trace.nodes[name]["fn"])
        if support.is_discrete:
            continue
        bijection = biject_to(support)
        value = bijection.inv(run.values[name])
        rank = len(sites[name].event_shape) + bijection.domain.event_dim - bijection.codomain.event_dim
        event = tuple(value.shape[value.dim() - rank :])
        values[name] = as_array(sites.put(name, value, run.layout, event))
    return values


def _support(fn: Any) -> Any:
    """Return the support of a distribution; of a mixture that of its components, which has a map to the real line."""
    support = fn.support
    while type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support


def unconstrained_shapes(run: Run, sites: TreeSites) -> dict[str, tuple[int, ...]]:
    """Return event shapes on the real line, which may lack an entry (a simplex) or a dim (a covariance)."""
    shapes = {}
    for name in sites.role("latent"):
        support = _support(run.model_trace.nodes[name]["fn"])
        if not support.is_discrete:
            value = torch.Size(sites[name].shape)
            shapes[name] = tuple(biject_to(support).inverse_shape(value))[len(sites[name].plates) :]
    return shapes


def observed_data(run: Run, sites: TreeSites) -> dict[str, np.ndarray]:
    """Return the observed data of a run with one particle."""
    layout = run.layout
    return {
        name: as_array(sites.value(name, run.model_trace.nodes[name]["value"], layout)[0])
        for name in sites.role("observed")
    }


def constant_data(
    bound: Mapping[str, Any], run: Run, sites: TreeSites
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Return arguments that are tensors or arrays and were not observed, with their dims.

    A leading dim with the size of one plate only gets its name.
    """
    observed = {name: run.model_trace.nodes[name]["value"] for name in sites.role("observed")}
    sizes: dict[int, set[str]] = {}
    for site in sites.sites.values():
        for plate in site.plates:
            sizes.setdefault(plate.size, set()).add(plate.name)
    values, dims = {}, {}
    for name, value in bound.items():
        if not isinstance(value, (Tensor, np.ndarray)):
            continue
        array = as_array(value) if isinstance(value, Tensor) else value
        if array.dtype.kind not in "biufc" or name in observed or any(_same(value, o) for o in observed.values()):
            continue
        label = name if name not in sites else f"{name}_argument"
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


def as_array(value: Tensor) -> np.ndarray:
    """Convert a tensor to a numpy array."""
    return value.detach().cpu().numpy()
