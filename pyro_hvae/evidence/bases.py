"""Bases of annealing and importance sampling: the guide or the prior, also with sites that are summed out."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine import infer_config

from pyro_hvae.problem import Problem

__all__ = ["base_problem", "drawn_prior"]


def base_problem(problem: Problem, base: str) -> Problem:
    """Return the problem with the base of a path, ``"guide"`` or ``"prior"``, as its guide.

    Raises:
        ValueError: for another base, a missing guide, or a prior that is a mixture over sites that are summed out.
    """
    if base not in ("guide", "prior"):
        raise ValueError(f"base must be 'guide' or 'prior', got {base!r}")
    if base == "guide":
        if not problem.guided:
            raise ValueError("base='guide' needs a guide; use base='prior' for none")
        return problem
    prior = problem.prior()
    mixed = _mixed(prior)
    if mixed:
        raise ValueError(
            f"the prior of site(s) {mixed} depends on {list(prior.structure.enumerated)}, summed out in the model, so "
            "that it is a mixture, whose density at a draw differs from that of the component which was drawn. Anneal "
            'from a guide instead (base="guide")'
        )
    return prior


def drawn_prior(problem: Problem) -> Problem:
    """Return the problem with its prior as the guide; draw summed-out sites over which the prior is a mixture.

    The density of a draw's component alone would give a wrong weight.
    """
    prior = problem.prior()
    return problem.with_model(infer_config(problem.model, config_fn=_unmark)).prior() if _mixed(prior) else prior


def _mixed(prior: Problem) -> list[str]:
    """Return the latents whose prior depends on a site that is summed out, and so has a dim for its values."""
    structure = prior.structure
    if not structure.enumerated:
        return []
    with torch.no_grad():
        run = prior.run()
    shapes = {name: run.model_trace.nodes[name]["fn"].batch_shape for name in structure.latent}
    rank = run.layout.rank
    return [name for name, shape in shapes.items() if any(size > 1 for size in shape[: max(0, len(shape) - rank)])]


def _unmark(site: Any) -> dict[str, Any]:
    return {"enumerate": None} if site["type"] == "sample" and not site["is_observed"] else {}
