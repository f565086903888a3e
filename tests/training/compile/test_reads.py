"""A value that Python reads from a tensor is never held by a graph: the program runs eagerly, with a warning."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch

from pyro_hvae.training.compile import CompileWarning, NotTraceable, trace
from tests.training.compile.pairs import objective_of, steps_of


def caught(guide, x):
    try:
        return max(x[0].tolist())
    except RuntimeError:
        return 0.0


def saved(guide, x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file).mean()


def control_flow(guide, x):
    if x.mean() > 3.0:
        return 1.0
    return 0.0


READS = {
    "numpy": lambda guide, x: float(x.numpy().max()),
    "asarray": lambda guide, x: np.asarray(x).max(),
    "array": lambda guide, x: np.array(x).max(),
    "a function of numpy": lambda guide, x: np.exp(x).mean(),
    "stack": lambda guide, x: np.stack([x, x]).max(),
    "dlpack": lambda guide, x: np.from_dlpack(x).max(),
    "tolist": lambda guide, x: max(x.flatten().tolist()),
    "item": lambda guide, x: x.max().item(),
    "float": lambda guide, x: float(x.max()),
    "int": lambda guide, x: int(x.max()),
    "bool": lambda guide, x: 1.0 if bool(x.mean() > 3.0) else 0.0,
    "round": lambda guide, x: math.floor(x.max()),
    "format": lambda guide, x: float(f"{x.max():.3f}"),
    "repr": lambda guide, x: float(len(repr(x))),
    "range": lambda guide, x: sum(range(x.max().long())),
    "slice": lambda guide, x: x.mean() * len(x[: x.max().long()]),
    "a list of tensors": lambda guide, x: torch.tensor([x[0, 0], x[1, 1]]).sum(),
    "as_tensor": lambda guide, x: torch.as_tensor([x[0, 0], x[1, 1]]).sum(),
    "new_tensor": lambda guide, x: x.new_tensor([x[0, 0]]).sum(),
    "deepcopy": lambda guide, x: copy.deepcopy(x).mean(),
    "storage": lambda guide, x: max(x.untyped_storage().tolist()),
    "saving": saved,
    "contains": lambda guide, x: float(0.5 in x),
    "equal": lambda guide, x: float(torch.equal(x, torch.zeros_like(x))),
    "a mask": lambda guide, x: x[x > 3.0].sum(),
    "nonzero": lambda guide, x: float(len(torch.nonzero(x > 3.0))),
    "a parameter": lambda guide, x: max(guide.net.bias.tolist()),
    "a draw": lambda guide, x: float(torch.randn(2).numpy().max()),
    "if": control_flow,
    "an error that the program catches": caught,
}


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of NumPy about torch
@pytest.mark.parametrize("name", READS)
def test_a_program_that_reads_values_runs_eagerly_and_names_its_line(name):
    objective = objective_of(READS[name])
    step = steps_of(objective, optimizer=torch.optim.Adam(objective.parameters(), lr=0.0))
    x, other = torch.rand(8, 6), 4.0 + torch.rand(8, 6)
    with pytest.warns(CompileWarning, match=r"test_reads\.py:\d+ \(") as warned:
        step(x)
    assert [entry.category for entry in warned].count(CompileWarning) == 1
    assert step.graphs == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        torch.manual_seed(0)
        found = step(other)
    torch.manual_seed(0)
    torch.testing.assert_close(found, objective(other).detach())


def test_the_line_of_the_program_is_named_and_nothing_else():
    objective = objective_of(control_flow)
    with pytest.raises(NotTraceable, match="value of a tensor") as refused:
        trace(objective, list(objective.parameters()), (torch.rand(8, 6),), {})
    assert "(if x.mean() > 3.0:)" in refused.value.where


def test_tensors_made_of_tensors_by_operators_are_traced():
    """What looks like a read and is none: copies that the tracer follows."""

    def change(guide, x):
        # data and detach are aliases, stack is the operator for a list, where is control flow as an operator
        return torch.where(x.mean() > 3.0, torch.stack([x.data.mean(), x.detach().max()]).sum(), torch.zeros(()))

    objective = objective_of(change)
    step = steps_of(objective, optimizer=torch.optim.Adam(objective.parameters(), lr=0.0))
    for x in (torch.rand(8, 6), 4.0 + torch.rand(8, 6)):
        torch.manual_seed(0)
        found = step(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, objective(x).detach())
    assert step.graphs == 1
    assert step.fallback is None
