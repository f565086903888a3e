"""Exact joint draws of latents and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_hvae import devices
from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem.isolation import RUNNING, fingerprint, isolated, kept_buffers, unchanged
from pyro_hvae.problem.knowledge import argument_key
from pyro_hvae.problem.structure import is_deterministic, is_factor, plates_of, sample_sites

if TYPE_CHECKING:
    from pyro_hvae.problem.problem import Problem

__all__ = ["Simulation", "simulate"]


class Simulation(NamedTuple):
    """A joint draw of a model.

    Attributes:
        values: latents by site, without a leading dim.
        problem: the same programs, with the simulated data instead of the observed arguments.
    """

    values: dict[str, Tensor]
    problem: Problem


def simulate(problem: Problem) -> Simulation:
    """Draw latents and data from a model, with its observations released.

    Raises:
        ValueError: for a model without an observed argument; one that observes a tensor that is no argument, or one
            argument at two sites; one whose density has a ``pyro.factor`` or a ``poutine.scale``; one that computes
            with its observed arguments.
    """
    model, args, kwargs = problem.model, problem.args, problem.kwargs
    bound_model, _, rest = problem.programs.bound()
    facts, key = problem.knowledge.facts, ("simulated", argument_key(args, kwargs), fingerprint(model))
    leaves, spec = tree_flatten((args, dict(kwargs)))
    with RUNNING, evaluation_mode(model), torch.no_grad():
        with isolated(model), pyro.validation_enabled(key not in facts and devices.has_values(*leaves)):
            seen = {s["name"]: s for s in sample_sites(poutine.trace(bound_model).get_trace(*args, **rest))}
        observed = {name: s for name, s in seen.items() if s["is_observed"] and not is_deterministic(s)}
        _check_densities(seen)
        places = _places(observed, leaves)
        fresh = key not in facts
        looking = kept_buffers(model) if problem.training else unchanged(model)
        with looking, pyro.validation_enabled(False):
            released = poutine.trace(poutine.uncondition(bound_model)).get_trace(*args, **rest)
    drawn = {site["name"]: site["value"].detach() for site in sample_sites(released)}
    for name, place in places.items():
        if drawn[name].shape != leaves[place].shape:
            raise ValueError(
                f"the model draws site '{name}' in shape {tuple(drawn[name].shape)}, and observes it in shape "
                f"{tuple(leaves[place].shape)}: let the plates and event dims of the site have the shape of its data"
            )
        leaves[place] = drawn[name].to(leaves[place].dtype)
    new_args, new_kwargs = tree_unflatten(leaves, spec)
    if fresh:
        _check_unread(problem(*new_args, **new_kwargs), seen)
        facts[key] = True
    values = {name: value for name, value in drawn.items() if name not in observed and not _computed(seen, name)}
    return Simulation(values, problem(*new_args, **new_kwargs))


def _computed(seen: Mapping[str, Any], name: str) -> bool:
    return name in seen and is_deterministic(seen[name])


ADVICE = "so simulated data would not be the model's"


def _check_densities(seen: Mapping[str, Any]) -> None:
    """Refuse a model whose density is not that of its draws."""
    for name, site in seen.items():
        if is_factor(site):
            raise ValueError(
                f"site '{name}' is a pyro.factor, {ADVICE}: nothing is drawn from a factor. Write the density as a "
                "distribution, or leave the factor out of the model that is simulated"
            )
        plain = 1.0
        for plate in plates_of(site):
            plain *= plate.scale
        scale = site["scale"]
        if isinstance(scale, Tensor) or abs(scale - plain) > 1e-9 * plain:
            raise ValueError(
                f"site '{name}' carries a poutine.scale, {ADVICE}: a power of a density has no draws of its own. Leave "
                "the scale out of the model that is simulated"
            )


def _places(observed: Mapping[str, Any], leaves: list[Any]) -> dict[str, int]:
    """Return the position of the argument that each observed site observes."""
    by_identity = {id(leaf): position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    places = {name: by_identity.get(id(site["value"]), -1) for name, site in observed.items()}
    if not any(place >= 0 for place in places.values()):
        raise ValueError(
            f"no argument is an observed tensor of the model (observed sites: {sorted(observed)}), so the guide can't "
            "get what the model drew; pass the data as an argument, and observe the argument itself"
        )
    loose = sorted(name for name, place in places.items() if place < 0)
    if loose:
        raise ValueError(
            f"site(s) {loose} observe tensors that are no arguments, or parts of arguments, {ADVICE}: the guide would "
            "still see the old ones. Pass each observed tensor as an argument of its own"
        )
    if len(set(places.values())) < len(places):
        twice = sorted(name for name in places if list(places.values()).count(places[name]) > 1)
        raise ValueError(
            f"sites {twice} observe one argument, which can't hold two draws: pass it twice, as two arguments"
        )
    return places


def _check_unread(simulated: Problem, seen: Mapping[str, Any]) -> None:
    """Refuse a model whose distributions change with its data, detached or copied data included."""
    draws = poutine.Trace()
    for name, site in seen.items():
        if not site["is_observed"]:
            draws.add_node(name, **site)
    model, _, rest = simulated.programs.bound()
    with evaluation_mode(simulated.model), isolated(simulated.model), torch.no_grad(), pyro.validation_enabled(False):
        again = poutine.trace(poutine.replay(model, trace=draws)).get_trace(*simulated.args, **rest)
    bad = []
    for name, site in seen.items():
        if is_deterministic(site) or name not in again.nodes:
            continue
        before, after = (fn.log_prob(site["value"]) for fn in (site["fn"], again.nodes[name]["fn"]))
        if before.shape != after.shape or not devices.close(before, after):
            bad.append(name)
    _refuse_reads(sorted(bad))


def _refuse_reads(bad: list[str]) -> None:
    if bad:
        raise ValueError(
            f"the model computes site(s) {bad} from its observed data, which it would have to draw first: pass what "
            "it reads (earlier values, a mask, sizes) as an argument of its own"
        )

