"""The optimiser's update: torch's own, with the hyper-parameters of the moment."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from pyro_hvae.training.compile.update import FusedAdam, clip
from tests.training.compile.pairs import objective_of, steps_of


def train(change, kind, compiled, steps=6, **options):
    objective = objective_of()
    optimizer = kind(objective.parameters(), lr=0.01, **options)
    step = steps_of(objective, optimizer=optimizer, compiled=compiled)
    torch.manual_seed(0)
    x = torch.rand(8, 6)
    losses = []
    for index in range(steps):
        change(optimizer, index)
        losses.append(step(x))
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in objective.parameters()]), step


CHANGES = {
    "rate": lambda group, index: group.update(lr=0.01 * (index + 1)),
    "betas": lambda group, index: group.update(betas=(0.9 - 0.1 * index, 0.99 - 0.05 * index)),
    "eps": lambda group, index: group.update(eps=1e-3 * index + 1e-8),
    "weight decay": lambda group, index: group.update(weight_decay=0.3 * index),
    "direction": lambda group, index: group.update(maximize=index % 2 == 0),
    "amsgrad": lambda group, index: group.update(lr=0.01),
}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("name", CHANGES)
def test_hyper_parameters_are_read_at_every_step(kind, name):
    def change(optimizer, index):
        for group in optimizer.param_groups:
            CHANGES[name](group, index)

    options = {"amsgrad": True} if name == "amsgrad" else {}
    found, state, step = train(change, kind, True, **options)
    expected, other, _ = train(change, kind, False, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, other, rtol=1e-7, atol=1e-9)
    assert step.graphs == 1
    fixed, *_ = train(lambda *_: None, kind, True)
    assert name == "amsgrad" or not torch.allclose(found[2:], fixed[2:])


def test_a_schedule_that_cycles_momentum():
    ends = []
    for compiled in (True, False):
        objective = objective_of()
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=True)
        step = steps_of(objective, optimizer=optimizer, compiled=compiled)
        torch.manual_seed(0)
        x = torch.rand(8, 6)
        for _ in range(9):
            step(x)
            schedule.step()
        ends.append(torch.cat([p.detach().flatten() for p in objective.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


def test_hooks_of_an_optimiser_are_called():
    calls = []
    objective = objective_of()
    optimizer = torch.optim.Adam(objective.parameters())
    step = steps_of(objective, optimizer=optimizer)
    step(torch.rand(8, 6))
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step(torch.rand(8, 6))
    assert calls == [1]


def test_a_loaded_or_emptied_state_is_used():
    """The kernel never goes on with moments that the optimiser no longer holds."""

    def emptied(optimizer, index):
        if index == 3:
            optimizer.state.clear()

    def loaded(optimizer, index):
        if index == 3:
            optimizer.load_state_dict(optimizer.state_dict())
            next(iter(optimizer.state.values()))["exp_avg"].zero_()

    def recounted(optimizer, index):
        if index == 3:
            for state in optimizer.state.values():
                state["step"] = torch.tensor(50.0)

    for change in (emptied, loaded, recounted):
        found, state, _ = train(change, torch.optim.Adam, True)
        expected, other, _ = train(change, torch.optim.Adam, False)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state, other, rtol=1e-7, atol=1e-9)


def test_moments_get_the_layout_of_their_parameters():
    """A saved state may hold them in another one, and the kernel runs over the memory of both."""

    def saved(optimizer, index):
        if index == 3:
            for state in optimizer.state.values():
                state["step"] = state["step"].clone()
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = state[name]
                    state[name] = moment.t().contiguous().t() if moment.dim() == 2 else moment

    found, state, _ = train(saved, torch.optim.Adam, True)
    expected, other, _ = train(saved, torch.optim.Adam, False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, other, rtol=1e-7, atol=1e-9)


def test_gradients_get_the_layout_of_their_parameters():
    """The gradient of a sum is one number seen many times, which the kernel must not read as memory."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x.sum() * self.a.sum() + ((x.t() @ self.b) * (x.t() @ self.a.detach())).sum()

    ends = []
    for compiled in (True, False):
        torch.manual_seed(2)
        objective = Sum()
        step = steps_of(objective, compiled=compiled)
        for x in (torch.arange(6.0).view(3, 2), torch.ones(3, 2)):
            step(x)
        ends.append(torch.cat([objective.a.detach().flatten(), objective.b.detach().flatten()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_parameters_with_gaps_in_memory_are_left_to_torch():
    parameter = nn.Parameter(torch.randn(4, 6)[:, ::2])
    assert not FusedAdam(torch.optim.Adam([parameter]), [parameter]).applies()
    parameter = nn.Parameter(torch.randn(4, 6).t())
    assert FusedAdam(torch.optim.Adam([parameter]), [parameter]).applies()


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_is_torchs(max_norm):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (), (5,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    found = clip([p.grad for p in parameters], max_norm)
    nn.utils.clip_grad_norm_(parameters, max_norm)
    torch.testing.assert_close(found, [p.grad for p in parameters])
