"""Check that programs can run with many particles at once, along a dim to the left of all plates."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_hvae import devices
from pyro_hvae.problem.isolation import fingerprint, isolated
from pyro_hvae.problem.plates import LayoutError
from pyro_hvae.problem.structure import leaf_distribution, sample_sites

if TYPE_CHECKING:
    from pyro_hvae.problem.problem import Problem
    from pyro_hvae.problem.run import Run

__all__ = ["check_particles_apart"]

ADVICE = (
    "Particles run at once, along a dim to the left of all plates: count dims from the right, as in z.sum(-1), "
    "e[..., idx] for e[idx], z.unbind(-1) for a, b = z, z.shape[-1] for len(z); or use one particle"
)
LAYOUT_WORDS = (
    "shape", "size", "dim", "broadcast", "index", "unpack", "expand", "match", "scalar", "mat1", "positional argument",
    "-d", "element", "ambiguous", "iterable", "length", "same number", "channel", "expected",
)  # fmt: skip
LEAST = 5
"""Smallest number of particles of the comparison."""
SLACK = 10.0
"""Accepted difference of a density, in changes that round-off of the draws makes."""


def check_particles_apart(problem: Problem, once: frozenset[str]) -> None:
    """Refuse programs that mix particles, or that can't run with several.

    Densities of particles that run together must be those of each particle alone.  Modules run in evaluation mode,
    since batch norm in training mode mixes particles as it mixes data.  Checked once for each structure and setting of
    switches.

    Raises:
        ValueError: naming the sites whose density differs, or with the error of the program.
    """
    structure, programs = problem.structure, problem.programs
    key = "apart", once, fingerprint(programs.model, programs.guide)
    if key in structure.facts or any(site.drawn_in_groups for site in structure.sites.values()):
        return
    evaluated = problem.evaluation()(*problem.args, **problem.kwargs)  # on a minibatch of its own, if it draws one
    count = _unlike_sizes(evaluated)
    try:
        differing = _differing(evaluated, count, once)
    except LayoutError:  # its message is complete
        raise
    except (NotImplementedError, KeyError) as error:
        if isinstance(error, KeyError) and "intermediates cache" not in str(error):
            raise
        differing = []  # a flow without an inverse has no density at other draws than its own
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"a matrix that the programs factorise is singular or not positive definite at one of {count} draws of "
            f"the guide ({_first_line(error)}): parametrise covariances by their Cholesky factors, add a small "
            "multiple of the identity, or draw from a guide (or prior) that stays where they are positive definite"
        ) from error
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        if not any(word in _first_line(error).lower() for word in LAYOUT_WORDS):  # an error of the program's own
            raise
        raise ValueError(
            f"the programs run with one particle, and fail with several at once "
            f"({type(error).__name__}: {_first_line(error)}). {ADVICE}"
        ) from error
    if differing:
        raise ValueError(
            f"the density of site(s) {differing} in one particle depends on the draws of another, or on their number. "
            f"{ADVICE}. Noise that a program draws itself (numpy, random, torch.randn) must not depend on them either"
        )
    structure.facts[key] = True


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _unlike_sizes(problem: Problem) -> int:
    """Choose a number of particles that differs from every size in the programs."""
    sizes = {plate.size for site in problem.structure.sites.values() for plate in site.plates}
    for trace in problem.look():
        for site in sample_sites(trace):
            if isinstance(site["value"], Tensor):
                sizes.update(site["value"].shape)
    return next(count for count in range(LEAST, LEAST + len(sizes) + 1) if count not in sizes)


def _differing(problem: Problem, count: int, once: frozenset[str]) -> list[str]:
    """Return the sites whose density of a particle differs between all particles at once and that one alone.

    A difference that round-off of the draws makes too, as where a posterior is narrow beside its distance from 0, is
    none.
    """
    programs, structure = problem.programs, problem.structure

    def run(num_particles: int, draws: Trace | None) -> Run:
        with torch.no_grad(), isolated(programs.model, programs.guide):
            if draws is not None:  # the same noise in networks and anything else that is random
                torch.manual_seed(0)
                np.random.seed(0)  # noqa: NPY002 (programs draw from the global generator)
                random.seed(0)
            return problem.execute(structure, num_particles, once, draws)

    drawn = run(count, None).guide_trace
    together = run(count, drawn)
    differing = set()
    for particle in range(count):
        own = _one_of(problem, drawn, count, particle)
        alone = run(1, own)
        shaken: list[Run] = []
        for kind in ("log_p", "log_q"):
            many, single = getattr(together, kind), getattr(alone, kind)
            for name in set(many) - once:
                terms, one = many[name].expand(count, *many[name].shape[1:])[particle], single[name][0]
                if devices.close(terms, one, rtol=1e-3, atol=1e-4):
                    continue
                shaken = shaken or [run(1, _shaken(own, side)) for side in (1, -1)]
                moved = torch.stack([(getattr(other, kind)[name][0] - one).abs() for other in shaken])
                finite = moved[moved.isfinite()]
                slack = SLACK * float(finite.max()) if finite.numel() else 0.0
                if not devices.close(terms, one, rtol=1e-3, atol=1e-4 + slack):
                    differing.add(name)
    return sorted(differing)


def _shaken(draws: Trace, side: int) -> Trace:
    """Return draws that differ by round-off, up and down in turn, with the first to one side."""
    moved = draws.copy()
    for site in sample_sites(draws):
        value = site["value"]
        if not site["is_observed"] and isinstance(value, Tensor) and value.is_floating_point():
            signs = 1 - 2 * (torch.arange(value.numel(), device=value.device) % 2).reshape(value.shape).to(value)
            by = 2 * side * torch.finfo(value.dtype).eps
            moved.nodes[site["name"]] = {**site, "value": value * (1 + by * signs)}
    return moved


def _one_of(problem: Problem, drawn: Trace, count: int, particle: int) -> Trace:
    """Return the guide's draws of one particle, in the shapes of a run with one."""
    alone = drawn.copy()
    for site in sample_sites(drawn):
        name, value = site["name"], site["value"]
        if site["is_observed"]:
            continue
        if name in problem.structure.enumerated_in_guide or type(leaf_distribution(site["fn"])).__name__ == "Delta":
            alone.remove_node(name)  # a point is computed anew: at another's round-off its density is -inf
            continue
        dim = value.dim() - site["fn"].event_dim - problem.structure.max_plate_nesting - 1
        if dim >= 0 and value.shape[dim] == count:
            value = value.select(dim, particle)
        template = problem.template.nodes[name]
        shape = template["fn"].shape()
        if value.numel() == shape.numel():
            value = value.reshape(shape)
        alone.nodes[name] = {**template, "value": value}
    return alone
