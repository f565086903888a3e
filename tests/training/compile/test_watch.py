"""A graph belongs to one state of the modules; buffers that change in place are a part of it."""

import warnings

import pytest
import torch
from torch import nn

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.models import hvae
from pyro_hvae.training.compile import CompileWarning
from pyro_hvae.training.compile.step import MAX_GRAPHS
from pyro_hvae.training.compile.watch import Watch
from tests.training.compile.pairs import objective_of, steps_of


def both(change, steps=6, make=objective_of, **options):
    """Losses and the final state, compiled and eager, where ``change(objective, index)`` acts before each step."""
    x = torch.rand(8, 6)
    results = []
    for compiled in (True, False):
        objective = make(**options)
        step = steps_of(objective, compiled=compiled)
        torch.manual_seed(0)
        losses = []
        for index in range(steps):
            change(objective, index)
            losses.append(step(x))
        results.append((torch.stack(losses), {k: v.detach().clone() for k, v in objective.state_dict().items()}, step))
    (found, state, step), (expected, other, _) = results
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for name, value in other.items():
        torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-9, msg=name)
    return step


def dropping():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))


def test_training_and_evaluation_mode_are_two_graphs():
    step = both(lambda objective, index: objective.train(index % 2 == 0), net=dropping)
    assert step.graphs == 2
    assert step.fallback is None


def test_the_rate_of_a_dropout_may_change():
    def change(objective, index):
        objective.guide.net[1].p = 0.5 if index < 3 else 0.0

    assert both(change, net=dropping).graphs == 2


def test_parameters_may_be_frozen_and_released():
    def change(objective, index):
        objective.guide.net.weight.requires_grad_(index not in (2, 3))

    step = both(change)
    assert step.graphs == 2


@pytest.mark.parametrize("transposed", [False, True])
def test_the_memory_of_a_parameter_may_be_replaced(transposed):
    def change(objective, index):
        if index == 3:
            weight = objective.guide.net.weight
            value = 0.5 * weight.detach()
            weight.data = value.t().contiguous().t() if transposed else value

    step = both(change)
    assert step.graphs == (2 if transposed else 1)
    assert step.fallback is None


def test_a_replaced_parameter_that_the_optimiser_does_not_hold_is_an_error():
    objective = objective_of()
    step = steps_of(objective)
    step(torch.rand(8, 6))
    objective.guide.net.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"does not hold 1 parameter\(s\) of the objective: \['guide.net.bias'\]"):
        step(torch.rand(8, 6))


def test_a_replaced_module_is_noticed():
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.register_buffer("factor", torch.tensor(factor))

        def forward(self, x):
            return self.factor * x[:, :2]

    def change(objective, index):
        if index == 3:
            objective.guide.net = Scale(2.0)

    both(change, net=lambda: Scale(1.0))


def test_numbers_in_modules_are_a_part_of_the_state():
    def change(objective, index):
        objective.guide.weight = float(index // 2)

    def make():
        objective = objective_of(lambda guide, x: guide.weight * x[:, :2])
        objective.guide.weight = 0.0
        return objective

    assert both(change, make=make).graphs == 3


def test_a_number_that_counts_calls_runs_eagerly():
    def count(guide, x):
        guide.calls += 1
        return guide.calls * x[:, :2]

    def make():
        objective = objective_of(count)
        objective.guide.calls = 0
        return objective

    objective = make()
    step = steps_of(objective)
    with pytest.warns(CompileWarning, match=r"replaces the attribute 'calls' of the module guide: keep it in a buffer"):
        step(torch.rand(8, 6))
    assert step.graphs == 0


class WarmUp(nn.Module):
    """A loss with a weight that rises by a tenth at each call, in a buffer."""

    def __init__(self, bound, *, in_place=True):
        super().__init__()
        self.inner = bound
        self.in_place = in_place
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        loss = self.inner(x) * (self.count / 10).clamp(max=1.0)
        with torch.no_grad():
            if self.in_place:
                self.count.add_(1)
                self.mean.lerp_(loss.detach(), 0.1)
            else:
                self.count = self.count + 1
        return loss


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_buffers_changed_in_place_are_a_part_of_the_graph(backend):
    x = torch.rand(8, 6)
    results = []
    for compiled in (True, False):
        objective = WarmUp(objective_of())
        step = steps_of(objective, compiled=compiled)
        step.backend = backend
        step.prepare((x,), {})  # the check and the trace leave the buffers as they were
        assert objective.count == 0
        assert objective.mean == 0
        torch.manual_seed(0)
        results.append(torch.stack([step(x) for _ in range(12)]))
        assert objective.count == 12
        results.append(objective.mean.clone())
    assert results[0][0] == 0.0
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[1], results[3], rtol=1e-9, atol=1e-9)


def test_a_buffer_that_is_replaced_runs_eagerly():
    objective = WarmUp(objective_of(), in_place=False)
    count = objective.count
    step = steps_of(objective)
    with pytest.warns(CompileWarning, match=r"replaces the attribute 'count' of the module itself: change the buffer"):
        step.prepare((torch.rand(8, 6),), {})
    assert objective.count is count
    assert count == 0
    for _ in range(3):
        step(torch.rand(8, 6))
    assert objective.count == 3


def test_no_more_than_a_few_graphs_are_made():
    objective = objective_of()
    step = steps_of(objective, check=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in range(1, MAX_GRAPHS + 1):
            step(torch.rand(size, 6))
    before = objective.guide.net.bias.detach().clone()
    with pytest.warns(CompileWarning, match=f"has made {MAX_GRAPHS} graphs"):
        step(torch.rand(MAX_GRAPHS + 1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in range(1, MAX_GRAPHS + 20):
            step(torch.rand(size, 6))
    assert step.graphs == MAX_GRAPHS
    assert not torch.equal(before, objective.guide.net.bias)
    assert step.fallback is None


def test_values_of_a_batch_are_told_apart_by_type_and_layout():
    def make():
        objective = objective_of()
        forward = objective.forward
        objective.forward = lambda x, flag=None: forward(x) * (2.0 if isinstance(flag, bool) else 1.0)
        return objective

    objective = make()
    step = steps_of(objective, optimizer=torch.optim.SGD(objective.parameters(), lr=0.0))
    x = torch.rand(6, 6)
    for batch in ((x, 1), (x, True), (x.t(), 1)):
        torch.manual_seed(0)
        found = step(*batch)
        torch.manual_seed(0)
        torch.testing.assert_close(found, objective(*batch).detach())
    assert step.graphs == 3
    with pytest.raises(TypeError, match=r"got ndarray: convert arrays by torch\.as_tensor"):
        step(x, x.numpy())


def test_the_state_is_the_same_object_until_something_changes():
    objective = TraceELBO()(*hvae((6,), [3, 2], hidden=(5,)))
    watch = Watch(objective)
    state = watch()
    assert watch() is state
    objective.eval()
    assert watch() != state
    objective.train()
    assert watch() == state
    objective.model.extra = nn.Linear(1, 1)
    assert watch() != state
    assert watch.generation == 1
