"""Values of sites that replace a guide's draws, in the dims of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyro.poutine import Trace
from torch import Tensor

from pyro_hvae.problem.plates import Layout

if TYPE_CHECKING:
    from pyro_hvae.problem.problem import Problem
    from pyro_hvae.problem.structure import Structure

__all__ = ["count_draws", "given", "place", "shared"]


def place(problem: Problem, name: str, value: Tensor, num_particles: int) -> Tensor:
    """Reshape a value of a drawn site so that its draws are left of every plate.

    Raises:
        ValueError: for another number of draws.
    """
    fn = problem.template.nodes[name]["fn"]
    if num_particles > 1 and value.shape[0] != num_particles:
        raise ValueError(f"site '{name}' has {value.shape[0]} draws where {num_particles} are evaluated")
    return Layout(problem.structure.max_plate_nesting, num_particles).place(value, fn.shape(), fn.event_dim)


def count_draws(problem: Problem, values: Mapping[str, Tensor]) -> int:
    """Return the number of draws of each site in ``values``; 1 for values without a leading dim.

    Raises:
        ValueError: if sites have different numbers of draws.
    """
    counts = {
        len(values[name]) if values[name].dim() > len(problem.template.nodes[name]["fn"].shape()) else 1
        for name in problem.structure.drawn
        if name in values
    }
    if len(counts) > 1:
        raise ValueError(f"sites have different numbers of draws: {sorted(counts)}")
    return counts.pop() if counts else 1


def given(problem: Problem, structure: Structure, values: Mapping[str, Tensor], num_particles: int) -> Trace:
    """Return a trace of the guide with these values of the sites that it draws.

    Raises:
        ValueError: if ``values`` lack a site that the guide neither computes nor enumerates.
    """
    free = {n for n in structure.drawn if structure.sites[n].guide_distribution == "Delta"}
    free |= set(structure.enumerated_in_guide)
    missing = sorted(set(structure.drawn) - set(values) - free)
    if missing:
        raise ValueError(f"values lack site(s) {missing} that the guide draws; they have {sorted(values)}")
    draws = problem.template.copy()
    for name in structure.drawn:
        if name not in values:
            draws.remove_node(name)
            continue
        draws.nodes[name] = {**draws.nodes[name], "value": place(problem, name, values[name], num_particles)}
    return draws


def shared(problem: Problem, values: Mapping[str, Tensor]) -> Trace:
    """Return a trace of the guide that has these sites alone, with values that all particles share."""
    draws = Trace()
    for name, value in values.items():
        draws.add_node(name, **{**problem.template.nodes[name], "value": value})
    return draws
