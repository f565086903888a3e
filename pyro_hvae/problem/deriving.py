"""Derive the structure of a pair from a run of one particle, with every check."""

from __future__ import annotations

from torch import Tensor

from pyro_hvae.problem.checks import check_enumerated_shapes, check_observations, check_shapes
from pyro_hvae.problem.compare import compare_programs
from pyro_hvae.problem.execute import Call, EventDims, Programs
from pyro_hvae.problem.isolation import isolated
from pyro_hvae.problem.structure import Structure, structure_of

__all__ = ["derive_structure"]


def derive_structure(programs: Programs, indices: dict[str, Tensor]) -> Structure:
    """Run one particle without side effects, check it, and return its structure.

    Args:
        programs: the pair and its data.
        indices: subsample indices by plate; those that the run draws are added.

    Raises:
        ValueError: as :attr:`Problem.structure`.
    """
    naming = EventDims()
    with isolated(programs.model, programs.guide):
        call = Call(programs, None, indices=indices, handlers=(naming,), validate=True)
        model_trace, guide_trace = call.traces()
        uncovered = compare_programs(model_trace, guide_trace)
        check_observations(model_trace)
        check_shapes(model_trace, guide_trace)
        structure = structure_of(model_trace, guide_trace, naming.names, uncovered)
        if structure.enumerated or structure.enumerated_in_guide:
            _check_enumerated(programs, structure, indices)
    return structure


def _check_enumerated(programs: Programs, structure: Structure, indices: dict[str, Tensor]) -> None:
    """Run one particle with the marked sites enumerated."""
    marked = [*structure.enumerated, *structure.enumerated_in_guide]
    try:
        traces = Call(programs, structure, indices=indices).traces()
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"the programs fail where all values of {marked} are enumerated at once, along a dim to the left of "
            f"all plates ({type(error).__name__}: {str(error).splitlines()[0]}): count dims from the right, use "
            "tensor operations (torch.where, Vindex) where the program reads a value, or draw the variable in the "
            "guide"
        ) from error
    check_enumerated_shapes(structure.max_plate_nesting, *traces)
