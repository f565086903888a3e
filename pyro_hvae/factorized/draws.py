"""Draws of a guide, and densities of model and guide at values, in chunks; tensors are ``(K, *data)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hvae.factorized.sites import Latents, same_support
from pyro_hvae.problem import Problem, Run, total
from pyro_hvae.problem.prior import prior_guide
from pyro_hvae.weights import chunks, default_chunk

__all__ = ["Draws", "draw", "log_density", "log_joint", "prepare", "with_prior"]

Program = Callable[..., Any]


class Draws(NamedTuple):
    """K draws of the latents.

    Attributes:
        values: by site, ``(K, *site.shape)``.
        log_p, log_q: log p(x, z), and log q(z) of their guide, ``(K, *data)``.
    """

    values: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor


def prepare(problem: Problem, proposal: Program | None = None) -> Problem:
    """Return the problem with the guide to draw from: the proposal, else its own guide, else the model's prior.

    Modules are not registered in Pyro's store, where several products would have one name.
    """
    problem = problem.evaluation().unregistered()
    if proposal is not None:
        return problem.with_guide(proposal)
    return problem if problem.guided else with_prior(problem)


def with_prior(problem: Problem) -> Problem:
    """Return the problem with its prior as the guide; the prior draws sites marked for enumeration too."""
    return problem.with_guide(prior_guide(poutine.infer_config(problem.model, lambda site: {"enumerate": None})))


def draw(problem: Problem, latents: Latents, count: int) -> Draws:
    """Draw the latents from the problem's guide.

    Raises:
        ValueError: for a guide that has auxiliary sites, enumerates, is a point estimate or draws not all latents; or
            where the support of a site depends on other draws.
    """
    if problem.points:
        problem.require_density("a posterior by importance weights")
    parts = []
    for size in chunks(count, default_chunk(problem.structure.entries)):
        run = problem.run(size).over(latents.common)
        _check_guide(run, latents)
        _check_supports(run, latents)
        values = {name: run.values[name].reshape(size, *site.shape) for name, site in latents.sites.items()}
        parts.append((values, run.shaped(total(run.log_p)), run.shaped(total(run.log_q))))
    values = {name: torch.cat([part[0][name] for part in parts]) for name in latents.sites}
    return Draws(values, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts]))


def log_joint(problem: Problem, latents: Latents, values: Mapping[str, Tensor]) -> Tensor:
    """Return log p(x, z) at K values of each site.

    Raises:
        ValueError: where the support of a site depends on other draws.
    """
    parts = []
    for run in _runs(problem, latents, values):
        _check_supports(run, latents)
        parts.append(run.shaped(total(run.log_p)))
    return torch.cat(parts)


def log_density(problem: Problem, latents: Latents, values: Mapping[str, Tensor]) -> Tensor:
    """Return log q(z) of the problem's guide at K values of each site."""
    return torch.cat([run.shaped(total(run.log_q)) for run in _runs(problem, latents, values)])


def _runs(problem: Problem, latents: Latents, values: Mapping[str, Tensor]) -> Iterator[Run]:
    start = 0
    for size in chunks(len(next(iter(values.values()))), default_chunk(problem.structure.entries)):
        part = {name: value[start : start + size] for name, value in values.items()}
        yield problem.run(size, part).over(latents.common)
        start += size


def _check_guide(run: Run, latents: Latents) -> None:
    structure = run.structure
    if structure.auxiliary:
        raise ValueError(
            f"the guide draws {list(structure.auxiliary)}, which the model lacks: the density of its draws of the "
            "latents is an integral over them without closed form. Give a guide without such sites"
        )
    if structure.enumerated_in_guide:
        raise ValueError(
            f"the guide enumerates {list(structure.enumerated_in_guide)}, and weighted draws are needed: remove "
            'infer={"enumerate": ...} from its sites'
        )
    missing = [name for name in latents.sites if name not in run.values]
    if missing:
        raise ValueError(
            f"the guide draws nothing for site(s) {missing}, which the model sums out: give a guide that draws "
            "them too, or use log_evidence, which accepts it"
        )


def _check_supports(run: Run, latents: Latents) -> None:
    """Refuse a site whose support at these draws differs from its factor's."""
    for name, site in latents.sites.items():
        fn = run.model_trace.nodes[name]["fn"]
        if fn is not site.prior and not same_support(site.prior.support, fn.support):
            raise ValueError(
                f"the support of site '{name}' depends on other draws ({type(site.leaf).__name__}), and a factor of a "
                "product has one support: draw the site on a fixed support and transform it in the "
                "model, as in low + (high - low) * pyro.sample(..., Uniform(0, 1)), or give impossible values a "
                "probability of 0"
            )
