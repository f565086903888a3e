"""Compiled steps equal eager ones under the same noise, one graph a shape; refusals and fallbacks name their reason."""

import copy
import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_hvae.bounds import IWELBO, Regularised, TraceELBO, warm_up
from pyro_hvae.models import hvae, vae
from pyro_hvae.training import fit
from pyro_hvae.training.compile import (
    CompiledStep,
    CompileMismatchError,
    CompileWarning,
    NotTraceable,
    compile_step,
    trace,
)
from pyro_hvae.training.compile.graph import loss_and_gradients
from pyro_hvae.training.compile.program import same


def run(step, batches, seed=0):
    torch.manual_seed(seed)
    return torch.stack([step(*batch) for batch in batches])


def small(bound, **options):
    torch.manual_seed(1)
    model, guide = hvae((6,), [3, 2], hidden=(5,))
    objective = bound(model, guide)
    return objective, torch.optim.Adam(objective.parameters(), lr=0.01, **options)


def state_of(objective):
    return torch.cat([parameter.detach().flatten() for parameter in objective.parameters()])


@pytest.fixture
def batches():
    return [((torch.rand(8, 6) < 0.5).double(),) for _ in range(5)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.8, 0.9), "eps": 1e-4},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_steps_equal_those_of_torchs_adam(batches, options, clip_norm):
    objective, optimizer = small(TraceELBO(), **options)
    other, reference = small(TraceELBO(), **options)
    step = compile_step(objective, optimizer, batches[0][0], backend="eager", clip_norm=clip_norm)

    def eager(x):
        reference.zero_grad()
        loss = other(x)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(other.parameters(), clip_norm)
        reference.step()
        return loss.detach()

    torch.testing.assert_close(run(step, batches), run(eager, batches), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state_of(objective), state_of(other), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_other_optimisers_run_on_compiled_gradients(batches, kind):
    ends = []
    for compiled in (True, False):
        pyro.clear_param_store()
        objective, _ = small(TraceELBO())
        optimizer = kind(objective.parameters(), lr=0.01)
        step = CompiledStep(objective, optimizer, backend="eager")
        if not compiled:
            step.fallback = "on purpose"
        run(step, batches)
        ends.append(state_of(objective))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)


def test_eager_and_compiled_steps_may_alternate(batches):
    """The optimiser's state is one and the same for both, step counts included."""
    objective, optimizer = small(TraceELBO(), fused=True)
    other, reference = small(TraceELBO(), fused=True)
    compiled = compile_step(objective, optimizer, batches[0][0], backend="eager")

    def eager(objective, optimizer, x):
        optimizer.zero_grad()
        objective(x).backward()
        optimizer.step()

    torch.manual_seed(0)
    for index, (x,) in enumerate(batches * 2):
        compiled(x) if index % 3 else eager(objective, optimizer, x)
    torch.manual_seed(0)
    for (x,) in batches * 2:
        eager(other, reference, x)
    torch.testing.assert_close(state_of(objective), state_of(other), rtol=1e-7, atol=1e-9)
    steps = {float(own["step"]) for own in optimizer.state_dict()["state"].values()}
    assert steps == {10.0}


def test_a_saved_optimiser_goes_on_eagerly(batches):
    objective, optimizer = small(TraceELBO(), fused=True)
    step = compile_step(objective, optimizer, batches[0][0], backend="eager")
    run(step, batches)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(objective.state_dict())
    run(step, batches, seed=1)
    other, reference = small(TraceELBO(), fused=True)
    other.load_state_dict(weights)
    reference.load_state_dict(saved)
    torch.manual_seed(1)
    for (x,) in batches:
        reference.zero_grad()
        other(x).backward()
        reference.step()
    torch.testing.assert_close(state_of(objective), state_of(other), rtol=1e-7, atol=1e-9)


def test_learning_rates_may_change(batches):
    objective, optimizer = small(TraceELBO())
    step = compile_step(objective, optimizer, batches[0][0], backend="eager")
    step(*batches[0])
    optimizer.param_groups[0]["lr"] = 0.0
    before = state_of(objective)
    step(*batches[1])
    assert torch.equal(before, state_of(objective))
    assert step.graphs == 1


def test_one_graph_a_shape_and_no_more(batches):
    objective, optimizer = small(TraceELBO())
    step = compile_step(objective, optimizer, batches[0][0], backend="eager")
    for index in range(1000):
        x = batches[index % 5][0]
        step(x[:3] if index % 7 == 6 else x)
    assert step.graphs == 2


def test_noise_is_alive(batches):
    objective, optimizer = small(TraceELBO())
    optimizer.param_groups[0]["lr"] = 0.0
    step = compile_step(objective, optimizer, batches[0][0], backend="eager")
    losses = {float(step(*batches[0])) for _ in range(10)}
    assert len(losses) == 10


def test_pyros_own_bound_looks_at_its_loss_and_runs_eagerly(batches):
    objective, optimizer = small(Trace_ELBO())
    with pytest.warns(CompileWarning, match=r"pyro/infer/.*\.py:\d+"):
        compile_step(objective, optimizer, batches[0][0], backend="eager")


def test_several_steps_in_one_call(batches):
    objective, optimizer = small(TraceELBO())
    other, reference = small(TraceELBO())
    stacked = torch.stack([x for (x,) in batches])
    many = compile_step(objective, optimizer, stacked, backend="eager", steps=5)
    one = compile_step(other, reference, batches[0][0], backend="eager")
    torch.manual_seed(0)
    losses = many(stacked)
    torch.testing.assert_close(losses, run(one, batches), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state_of(objective), state_of(other), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"leading dimension steps=5, got shapes \[\(3, 8, 6\)\]"):
        many(stacked[:3])


def test_weights_that_follow_the_step_are_read_not_burned_in(batches):
    results = []
    for compiled in (True, False):
        pyro.clear_param_store()
        objective, optimizer = small(Regularised(TraceELBO(), kl_weight=warm_up(4)))
        step = CompiledStep(objective, optimizer, backend="eager")
        if not compiled:
            step.fallback = "on purpose"
        results.append(run(step, batches))
        assert objective.elbo.step == 5
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_running_statistics_move_as_they_do_eagerly(batches):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

        def forward(self, parent, context=None):
            loc, scale = self.net(parent).chunk(2, -1)
            return dist.Normal(loc, nn.functional.softplus(scale) + 0.1).to_event(1)

    from pyro_hvae.chains import BottomUp

    ends = []
    for compiled in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(1)
        model, _ = vae((6,), 1, hidden=(5,))
        objective = TraceELBO()(model, BottomUp(z1=Encoder()))
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
        step = CompiledStep(objective, optimizer, backend="eager")
        if not compiled:
            step.fallback = "on purpose"
        run(step, batches)
        ends.append(torch.cat([buffer.flatten().double() for buffer in objective.buffers()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)
    assert ends[0][-1] == 5 + 0 * ends[0][-1]


class Peeks(PyroModule):
    def __init__(self):
        super().__init__("peeks")
        self.net = nn.Linear(6, 2)

    def forward(self, x):
        loc = self.net(x)
        if loc.sum() > 0:  # depends on a value
            loc = loc + 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


class Plain(PyroModule):
    def __init__(self):
        super().__init__("plain")
        self.net = nn.Linear(2, 6)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


def test_control_flow_on_values_falls_back_and_names_its_line(batches):
    objective = TraceELBO()(Plain(), Peeks())
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    with pytest.warns(CompileWarning, match=r"test_step\.py:\d+ \(if loc\.sum\(\) > 0:") as caught:
        step = compile_step(objective, optimizer, batches[0][0], backend="eager")
    assert len(caught) == 1
    before = state_of(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(step, batches)
    assert not torch.equal(before, state_of(objective))
    assert step.graphs == 0


def test_a_parameter_that_is_looked_at_is_not_burned_in(batches):
    class Looks(Plain):
        def forward(self, x):
            if self.net.bias[0].item() > 100.0:
                raise AssertionError
            return super().forward(x)

    class Quiet(Peeks):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))

    objective = TraceELBO()(Looks(), Quiet())
    objective(*batches[0])
    with pytest.raises(NotTraceable, match="value of a tensor") as caught:
        trace(objective, list(objective.parameters()), batches[0], {})
    assert "bias[0].item()" in caught.value.where


def test_another_generators_noise_is_refused(batches):
    import numpy as np

    class Outside(Plain):
        def forward(self, x):
            noise = float(np.random.normal())  # noqa: NPY002
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z) + noise, 1.0).to_event(1), obs=x)

    class Quiet(Peeks):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))

    objective = TraceELBO()(Outside(), Quiet())
    optimizer = torch.optim.Adam(objective.parameters())
    before = state_of(objective)
    with pytest.raises(CompileMismatchError, match="the loss is off by"):
        compile_step(objective, optimizer, batches[0][0], backend="eager")
    assert torch.equal(before, state_of(objective))


def test_round_off_is_no_mismatch_and_more_is():
    one = torch.ones(100, dtype=torch.float32)
    labels = ["the loss", "the gradient of w"]
    same("the graph", labels, (one * (1 + 1e-4), one), (one, one))
    same("the graph", labels, (one, 2e-9 * one), (one, 1e-9 * one))  # what is left where parts of size one cancel
    with pytest.raises(CompileMismatchError, match="the loss is off by"):
        same("the graph", labels, (one * 1.001, one), (one, one))
    exact = one.double()
    with pytest.raises(CompileMismatchError, match="the gradient of w is off by"):
        same("the graph", labels, (exact, exact * (1 + 1e-4)), (exact, exact))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "magic"}, "backend must be"),
        ({"noise": "loud"}, "noise must be"),
        ({"backend": None}, "backend must be"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"check": "no"}, "check must be True or False, got 'no'"),
        ({"clip_norm": -1}, "clip_norm must be a number above 0, got -1"),
        ({"clip_norm": 0.0}, "clip_norm must be a number above 0, got 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be a finite number"),
        ({"clip_norm": float("inf")}, "clip_norm must be a finite number"),
        ({"clip_norm": "1"}, "clip_norm must be a finite number"),
    ],
)
def test_refused_arguments(batches, options, message):
    objective, optimizer = small(TraceELBO())
    with pytest.raises(ValueError, match=message):
        compile_step(objective, optimizer, batches[0][0], **options)


def test_an_optimiser_that_misses_parameters_is_refused(batches):
    objective, _ = small(TraceELBO())
    with pytest.raises(ValueError, match=r"does not hold \d+ parameter"):
        compile_step(objective, torch.optim.Adam(objective.model.parameters()), batches[0][0], backend="eager")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_compiled_ends_where_fit_eager_does(accumulate):
    x = (torch.rand(50, 6) < 0.5).double()
    ends = []
    for compile in (False, {"backend": "eager"}):
        pyro.clear_param_store()
        torch.manual_seed(2)
        model, guide = hvae((6,), [3, 2], hidden=(5,))
        result = fit(
            model, guide, x, bound=TraceELBO(), epochs=4, batch_size=8, accumulate=accumulate, compile=compile,
            clip_norm=1.0, ema=0.9, progress=False, optimizer=functools.partial(torch.optim.Adam, lr=0.01, fused=True),
        )  # fmt: skip
        ends.append(torch.cat([p.detach().flatten() for p in (*model.parameters(), *guide.parameters())]))
        ends[-1] = torch.cat([ends[-1], *(p.flatten() for p in result.averages.parameters.values())])
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "bound",
    [TraceELBO(), pytest.param(IWELBO(num_particles=3, gradient="dreg"), marks=pytest.mark.slow)],
    ids=["elbo", "dreg"],
)
def test_inductor_equals_eager(batches, bound):
    """Loss and gradients (as first moments) of the compiled code are checked by compile_step itself; here the path."""
    objective, optimizer = small(bound)
    other, reference = small(bound)
    step = compile_step(objective, optimizer, batches[0][0])
    eager = CompiledStep(other, reference)
    eager.fallback = "on purpose"
    torch.testing.assert_close(run(step, batches), run(eager, batches), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(state_of(objective), state_of(other), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 3])
def test_annealing_compiles_without_the_looks_at_the_pair(steps):
    """A look that shapes are read from draws too; its draws are no part of the graph."""
    from pyro_hvae.evidence import AnnealedBound

    torch.manual_seed(1)
    model, guide = vae(6, 2, hidden=(5,))
    x = (torch.rand(8, 6) < 0.5).double()
    objective = AnnealedBound(steps).prepare(model, guide, x)(model, guide)
    twin = copy.deepcopy(objective)
    step = compile_step(objective, torch.optim.Adam(objective.parameters(), lr=0.01), x, backend="eager")
    own = torch.optim.Adam(twin.parameters(), lr=0.01)
    torch.manual_seed(0)
    found = [step(x) for _ in range(4)]
    torch.manual_seed(0)
    for value in found:
        loss = twin(x)
        torch.testing.assert_close(loss.detach(), value)
        own.zero_grad()
        loss.backward()
        own.step()
    torch.testing.assert_close(state_of(objective), state_of(twin))


def test_the_check_multiplies_in_full(monkeypatch):
    """Where products of float32 may be rounded (bfloat16, TF32), the check compares without that, and restores it."""
    seen = []
    monkeypatch.setattr(
        "pyro_hvae.training.compile.step.same", lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    monkeypatch.setattr(
        "pyro_hvae.training.compile.step.loss_and_gradients",
        lambda *args: seen.append(torch.get_float32_matmul_precision()) or loss_and_gradients(*args),
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        objective, optimizer = small(TraceELBO())
        compile_step(objective, optimizer, (torch.rand(8, 6) < 0.5).double(), backend="eager")
        assert seen[0] == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
