"""A gamma for each entry in training and in samplers; schedules, and what they refuse."""

import math

import pyro
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import (
    Diffusion,
    LinearSchedule,
    MeanLevel,
    MonotoneSchedule,
    PolynomialSchedule,
    ReverseVariance,
    Schedule,
    ddim,
    dpm_solver,
    flow_log_likelihood,
    inpaint,
    probability_flow,
)
from pyro_hvae.models import vdm
from pyro_hvae.nn import DenoisingMLP
from pyro_hvae.training.compile import trace
from pyro_hvae.training.compile.graph import split_batch
from pyro_hvae.training.objective import PairObjective
from tests.diffusion.entrywise import (
    COVARIANCE,
    PATHS,
    Bent,
    Gaussian,
    Levelled,
    Path,
    contextual,
    integrated,
    pair,
)


@pytest.mark.parametrize("route", ["svi", "module"])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("num_layers", [5, None])
@pytest.mark.parametrize("features", [0, 3])
def test_every_parameter_of_the_schedule_trains(route, local, num_layers, features):
    schedule = PolynomialSchedule((2,), -5.0, 3.0, context_features=features, hidden=4)
    net = MeanLevel(DenoisingMLP(2, hidden=8, context_features=features))
    x = torch.randn(16, 2)
    keywords = {"context": torch.randn(16, 3)} if features else {}
    with pyro.settings.context(module_local_params=local):
        model, guide = vdm(net, event_shape=2, num_layers=num_layers, schedule=schedule)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        bounds = [DiffusionELBO()] if num_layers is None else [DiffusionELBO(), ph.TraceELBO()]
        for bound in bounds:
            if route == "svi":
                svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), bound)
                for _ in range(2):
                    svi.step(x, **keywords)
            else:
                objective = bound(model, guide)
                optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
                for _ in range(2):
                    optimizer.zero_grad()
                    objective(x, **keywords).backward()
                    optimizer.step()
    assert sum(name.startswith("schedule.") for name in before) == (5 if features else 2)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_training_finds_the_best_path():
    """Between fixed ends the inside has the bound's own gradient; no path beats that on which the denoiser is exact."""
    schedule = PolynomialSchedule((2,), -4.0, 3.0, learn_ends=False)
    with torch.no_grad():
        schedule.start += torch.tensor([[1.0, -1.0], [0.5, -1.0], [-0.5, 1.0]])
    model, guide = pair(Levelled(COVARIANCE), schedule)
    first, last = (0.5 * torch.logdet(torch.eye(2) + COVARIANCE * math.exp(-gamma)) for gamma in (-4.0, 3.0))
    best = first - last
    before = integrated(model, guide).item()
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        integrated(model, guide, points=20).backward()
        optimizer.step()
    after = integrated(model, guide).item()
    assert before > best + 0.1
    assert best - 1e-9 < after < best + 0.2 * (before - best)
    x = torch.randn(64, 2) @ torch.linalg.cholesky(COVARIANCE).T
    ph.fit(model, guide, x, bound=DiffusionELBO(), steps=3, batch_size=16, progress=False)


@pytest.mark.parametrize("num_layers", [5, None])
def test_a_step_is_one_graph(num_layers):
    model, guide = contextual(num_layers)
    inputs = {"context": torch.randn(4, 3)}
    x = torch.randn(4, 2)
    objective = PairObjective(DiffusionELBO(), model, guide, (x,), inputs, None)
    flat = trace(objective, list(objective.parameters()), (x,), inputs)
    torch.manual_seed(3)
    found = flat(*split_batch((x,), inputs)[0])
    torch.manual_seed(3)
    loss = objective(x, **inputs)
    torch.testing.assert_close(found[0], loss.detach())
    for one, other in zip(found[1:], torch.autograd.grad(loss, flat.trained), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


# Schedules


def test_a_polynomial_increases_between_its_ends_and_has_its_slope():
    schedule = PolynomialSchedule((2, 3), -6.0, 4.0, context_features=2, hidden=8)
    context, t = torch.randn(5, 2), torch.linspace(0.0, 1.0, 41)
    with torch.no_grad():
        schedule.net[-1].weight.mul_(200.0)
    bound = schedule.given(context)
    gamma = torch.stack(bound.layers(t))
    assert gamma.shape == (41, 5, 2, 3)
    assert (gamma.diff(dim=0) > 0).all()
    assert gamma[20].std() > 0.3
    torch.testing.assert_close(gamma[0], torch.full((5, 2, 3), -6.0))
    torch.testing.assert_close(gamma[-1], torch.full((5, 2, 3), 4.0))
    times = torch.rand(7, 5)
    assert bound(times).shape == bound.derivative(times).shape == (7, 5, 2, 3)
    torch.testing.assert_close(bound.derivative(times), Schedule.derivative(bound, times), atol=1e-10, rtol=1e-10)
    assert schedule.given(torch.randn(6, 5, 2))(times[0]).shape == (6, 5, 2, 3)


def test_slopes_by_differentiation_are_those_of_the_entries():
    t, step = torch.tensor([0.2, 0.5, 0.9]), 1e-6
    for schedule in (Path("first early"), Bent()):
        numeric = (schedule(t + step) - schedule(t - step)) / (2 * step)
        torch.testing.assert_close(schedule.derivative(t), numeric, atol=1e-7, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(schedule.derivative(t), numeric, atol=1e-7, rtol=0)


class Misshapen(Path):
    def forward(self, t):
        return super().forward(t)[..., :1]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(1001, 2\); got \(1001, 3\)"):
        MonotoneSchedule(lambda t: torch.stack([t, t, t], -1), event_shape=(2,))
    with pytest.raises(ValueError, match=r"t = 0\.0010 entry \(1,\) it is -0\.001 after -?0"):
        MonotoneSchedule(lambda t: torch.stack([t, -t], -1), event_shape=(2,))
    with pytest.raises(ValueError, match=r"data of shape \(2,\), and the diffusion has event_shape=\(3,\)"):
        vdm(nn.Identity(), event_shape=3, num_layers=4, schedule=Path("straight"))
    with pytest.raises(ValueError, match=r"data of shape \(2,\), and the diffusion has event_dim=2"):
        Diffusion(Path("straight"), 4, event_dim=2)
    with pytest.raises(ValueError, match=r"must return gamma of shape .* got gamma of shape \(1,\)"):
        Diffusion(Misshapen("straight"), 4)(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"data of shape \(5, 3\)"):
        Diffusion(Path("straight"), 4)(torch.zeros(5, 3))
    for shape in ((), (0,)):
        with pytest.raises(ValueError, match="event_shape must have sizes"):
            PolynomialSchedule(shape)
    model, guide = contextual(4)
    x = torch.zeros(5, 2)
    for bound in (DiffusionELBO(), ph.TraceELBO()):
        with pytest.raises(ValueError, match="depends on a context of 3 features: call the programs with context="):
            bound.per_datum(model, guide, x)
        with pytest.raises(ValueError, match=r"a context \(\.\.\., 3\), got \(5, 2\)"):
            bound.per_datum(model, guide, x, context=torch.zeros(5, 2))
    other = Diffusion(PolynomialSchedule((2,), -4.0, 2.0, context_features=3), 4)
    with pytest.raises(ValueError, match=r"for the first of entries of shape .*one process for both"):
        DiffusionELBO().per_datum(model, other, x, context=torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one process for both"):
        DiffusionELBO().per_datum(model, Diffusion(LinearSchedule(-4.0, 3.0), 4), x, context=torch.zeros(5, 3))
    one, _ = pair(Gaussian(COVARIANCE), Path("straight"))
    for call in (
        lambda: flow_log_likelihood(one, x),
        lambda: probability_flow(one, 2, rtol=1e-3),
        lambda: ReverseVariance().calibrate(one, x),
    ):
        with pytest.raises(ValueError, match="follows one noise level, and the schedule Path"):
            call()


# Draws


@pytest.mark.parametrize("name", ["straight", "first early"])
def test_samplers_draw_the_data_of_the_exact_denoiser(name):
    low, high = torch.tensor([-9.0, -8.0]), torch.tensor([9.0, 8.0])
    schedule = MonotoneSchedule(lambda t: low + (high - low) * torch.stack(PATHS[name][0](t), -1), event_shape=(2,))
    model, _ = pair(Gaussian(COVARIANCE), schedule)
    for sample in (
        lambda: ddim(model, 8000, num_steps=400, eta=0.5),
        lambda: probability_flow(model, 8000, num_steps=60),
        lambda: dpm_solver(model, 8000, num_steps=60),
    ):
        torch.manual_seed(0)
        draws = sample()
        error = ((COVARIANCE**2 + COVARIANCE.diagonal()[:, None] * COVARIANCE.diagonal()) / 8000).sqrt()
        assert ((draws.T.cov() - COVARIANCE).abs() < 4.5 * error + 0.02).all()


def test_missing_entries_and_draws_with_a_context():
    model, guide = contextual(6)
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    mask = torch.tensor([[True, False]]).expand(5, 2)
    drawn = inpaint(model, guide, x, mask, num_particles=4, context=context)
    assert torch.equal(drawn[:, 0], x[:, 0])
    assert model(size=5, context=context).shape == (5, 2)
    for sample in (ddim, probability_flow, dpm_solver):
        assert sample(model, 5, num_steps=4, context=context).shape == (5, 2)
    tree = ph.to_datatree(model, guide, x, context=context, num_draws=10)
    assert tree["posterior"]["z6"].shape[1:] == (10, 5, 2)
    assert ph.SMCBound(8).per_datum(model, guide, x, context=context).shape == (5,)
