"""fit(): what it minimises, on which data, and by which steps."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_hvae.bounds import Regularised, TraceELBO, warm_up
from pyro_hvae.data import Batches
from pyro_hvae.training import fit, fit_restarts
from pyro_hvae.training.feed import feed
from tests.training.gaussian import Guide, Model, quiet, sgd


def test_reaches_the_maximum_likelihood_and_the_exact_posterior(data):
    model, guide = Model(), Guide()
    optimizer = functools.partial(torch.optim.Adam, lr=0.02)
    result = fit(model, guide, data, bound=TraceELBO(num_particles=5), optimizer=optimizer, steps=1500, **quiet)
    torch.testing.assert_close(model.mean.detach(), data.mean(), atol=0.08, rtol=0)
    torch.testing.assert_close(guide.net.weight.detach()[0, 0], torch.tensor(0.5), atol=0.05, rtol=0)
    torch.testing.assert_close(guide.scale.detach(), torch.tensor(0.5**0.5), atol=0.05, rtol=0)
    exact = -dist.Normal(data.mean(), 2**0.5).log_prob(data).mean()
    assert abs(result.history[-1]["loss"] - exact) < 0.1
    assert result.steps == 1500
    assert result.stopped is None


@pytest.mark.parametrize("bound", [TraceELBO(), Trace_ELBO()], ids=["ours", "pyro"])
def test_loss_is_in_nats_a_datum_whatever_the_batch(bound, data):
    """One SGD step of a minibatch moves as the per-datum gradient does, by the bound's and by Pyro's loss alike."""
    moves = []
    for batch_size in (None, 50):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = Model(), Guide()
        fit(model, guide, data, bound=bound, optimizer=sgd, steps=1, batch_size=batch_size, **quiet)
        moves.append(model.mean.item())
    # d/dm E_q log p = E_q z - m, a datum: within a few standard errors of it, and not a factor N or N/B away
    torch.manual_seed(0)
    expected = 0.1 * Guide().net(data[:, None]).mean().item()
    assert moves == pytest.approx([expected, expected], abs=0.08)
    assert abs(expected) > 0.16


def test_a_pair_without_data_size_is_divided_by_its_own_plates(data):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    result = fit(model, guide, data, bound=TraceELBO(), optimizer=sgd, steps=1, batch_size=50, log_every=1, **quiet)
    assert 1.0 < result.history[0]["loss"] < 6.0
    assert pyro.param("mean").item() != 0.0


def test_plain_functions_train_through_the_parameter_store(data):
    def model(x):
        mean = pyro.param("mean", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    net = nn.Linear(1, 1)

    def guide(x):
        pyro.module("net", net)
        scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], scale))

    optimizer = functools.partial(torch.optim.Adam, lr=0.02)
    fit(model, guide, data, bound=TraceELBO(5), optimizer=optimizer, steps=1000, batch_size=None, **quiet)
    torch.testing.assert_close(pyro.param("mean").detach(), data.mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(pyro.param("scale").detach(), torch.tensor(0.5**0.5), atol=0.05, rtol=0)
    torch.testing.assert_close(net.weight.detach()[0, 0], torch.tensor(0.5), atol=0.08, rtol=0)


def test_an_autoguide_gets_its_parameters_before_the_optimiser():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = 3.0 + torch.randn(50)
    guide = AutoNormal(model)
    optimizer = functools.partial(torch.optim.Adam, lr=0.05)
    fit(model, guide, x, bound=TraceELBO(), optimizer=optimizer, steps=500, batch_size=None, **quiet)
    exact = 50 * x.mean() / (50 + 0.01)
    torch.testing.assert_close(guide.median()["mean"], exact, atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: {"x": x},
        lambda x: x.numpy(),
        lambda x: TensorDataset(x),
        lambda x: DataLoader(TensorDataset(x), batch_size=50),
        lambda x: [x[:100], x[100:]],
        lambda x: Batches(x, batch_size=50),
    ],
    ids=["tensor", "tuple", "mapping", "array", "dataset", "loader", "list of batches", "batches"],
)
def test_takes_any_kind_of_data(wrap, data):
    model, guide = Model(), Guide()
    result = fit(model, guide, wrap(data), bound=TraceELBO(), epochs=2, data_size=200, log_every=1, **quiet)
    assert model.mean.item() != 0.0
    assert result.steps in (4, 8)


def test_memory_mapped_data(tmp_path, data):
    np.save(tmp_path / "x.npy", data.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    results = []
    for x in (mapped, data):
        pyro.clear_param_store()
        torch.manual_seed(1)
        model, guide = Model(), Guide()
        fit(model, guide, x, bound=TraceELBO(), epochs=1, batch_size=50, **quiet)
        results.append(model.mean.detach())
    assert torch.equal(*results)


def test_the_seed_determines_the_run_and_looking_does_not_change_it(data):
    ends = []
    for options in ({}, {"log_every": 1, "terms_every": 1, "check_every": 1, "validation": data[:50]}):
        pyro.clear_param_store()
        torch.manual_seed(3)
        model, guide = Model(), Guide()
        fit(model, guide, data, bound=TraceELBO(), epochs=3, batch_size=30, **options, **quiet)
        ends.append(torch.cat([p.detach().flatten() for p in (*model.parameters(), *guide.parameters())]))
    assert torch.equal(*ends)


def test_schedule_runs_by_the_step(data):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    result = fit(
        Model(), Guide(), data, bound=TraceELBO(), optimizer=sgd, steps=6, schedule=schedule, log_every=1, **quiet
    )
    assert result.history["rate"] == [0.1, 0.05, 0.05, 0.025, 0.025, 0.0125]


def test_plateau_schedule_follows_the_validation(data):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, threshold_mode="abs")

    result = fit(
        Model(), Guide(), data, bound=TraceELBO(), optimizer=sgd, epochs=3, schedule=schedule, validation=data,
        log_every=1, **quiet,
    )  # fmt: skip
    assert result.history["rate"] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_clipping_bounds_the_step(data):
    model, guide = Model(), Guide()
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    fit(
        model, guide, 100 * data, bound=TraceELBO(), optimizer=functools.partial(torch.optim.SGD, lr=1.0),
        clip_norm=0.25, steps=1, **quiet,
    )  # fmt: skip
    after = [*model.parameters(), *guide.parameters()]
    norm = torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)]).norm()
    torch.testing.assert_close(norm.detach(), torch.tensor(0.25), atol=1e-6, rtol=0)


class Deterministic(PyroModule):
    """A guide whose draw hardly varies, so that gradients depend on the data alone."""

    def __init__(self):
        super().__init__("deterministic")
        self.net = nn.Linear(1, 1)

    def forward(self, x, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Delta(self.net(x[:, None])[:, 0]))


def test_accumulated_batches_make_the_step_of_the_joined_batch(data):
    ends = []
    for batch_size, accumulate in ((100, 1), (25, 4)):
        pyro.clear_param_store()
        torch.manual_seed(5)
        model, guide = Model(), Deterministic()
        fit(
            model, guide, data, bound=TraceELBO(), optimizer=sgd, epochs=2, batch_size=batch_size,
            accumulate=accumulate, shuffle=False, **quiet,
        )  # fmt: skip
        ends.append(torch.cat([p.detach().flatten() for p in (*model.parameters(), *guide.parameters())]))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_moving_average_follows_its_recurrence(data):
    path = []

    class Watch:
        def on_step(self, run, loss):
            path.append(run.model.mean.item())

    result = fit(
        Model(), Guide(), data, bound=TraceELBO(), optimizer=sgd, steps=5, ema=0.5, callbacks=[Watch()], **quiet
    )
    expected = 0.0
    for value in path:
        expected = 0.5 * expected + 0.5 * value
    assert result.averages.parameters["model.mean"].item() == pytest.approx(expected, abs=1e-12)
    with result.averages.applied():
        assert result.model.mean.item() == pytest.approx(expected, abs=1e-12)
    assert result.model.mean.item() == pytest.approx(path[-1], abs=1e-15)


def test_warm_up_follows_the_step_not_the_batches(data):
    seen = []

    def weight(step):
        seen.append(step)
        return 1.0

    bound = Regularised(TraceELBO(), kl_weight=weight)
    seen.clear()  # a look at some steps when it is built
    fit(Model(), Guide(), data, bound=bound, steps=2, batch_size=25, accumulate=4, **quiet)
    assert [float(step) for step in seen] == [0.0] * 4 + [1.0] * 4 + [2.0]  # the last is for the record
    assert int(bound.step) == 2
    result = fit(
        Model(), Guide(), data, bound=Regularised(TraceELBO(), kl_weight=warm_up(10)), steps=5, log_every=1, **quiet
    )
    assert "bound" in result.history.names()


def test_bf16_autocast_trains(data):
    torch.set_default_dtype(torch.float32)
    model, guide = Model(), Guide()
    result = fit(model, guide, data.float(), bound=TraceELBO(), steps=20, precision="bf16", **quiet)
    assert math.isfinite(result.history[-1]["loss"])
    assert model.mean.dtype == torch.float32


def test_restarts_are_independent_and_reproducible(data):
    def build():
        pyro.clear_param_store()
        return Model(), Guide()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    results = fit_restarts(build, data, restarts=3, bound=TraceELBO(), steps=3, **quiet)
    assert torch.equal(state, torch.get_rng_state())
    means = [result.guide.net.weight.item() for result in results]
    assert len(set(means)) == 3
    again = fit_restarts(build, data, restarts=1, seed=2, bound=TraceELBO(), steps=3, **quiet)
    assert again[0].guide.net.weight.item() == means[2]


@pytest.mark.parametrize("batch_size", [None, 4])
def test_all_data_at_once_stay_in_their_order(batch_size):
    """A series in time is one datum whose rows mean something; with batches each epoch has an order of its own."""
    x = torch.arange(12.0)
    whole = feed(x, batch_size=batch_size, shuffle=True, drop_last=False, seed=0)
    for epoch in range(2):
        order = torch.cat([args[0] for args, _ in whole.epoch(epoch)])
        assert torch.equal(order, x) == (batch_size is None)
        assert torch.equal(order.sort().values, x)


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}])
def test_programs_without_arguments(tmp_path, compile):
    """They hold their data themselves: an epoch is a step, and a resumed run goes on."""
    y = torch.randn(20) + 2.0

    def model():
        loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 5.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    guide = AutoNormal(model)
    options = {
        "bound": TraceELBO(16), "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.02), "seed": 0,
        "compile": compile, "run_dir": tmp_path, "progress": False,
    }  # fmt: skip
    fit(model, guide, (), epochs=100, **options)
    result = fit(model, guide, (), epochs=500, resume=True, **options)
    assert result.steps == 500
    precision = 20 + 1 / 25
    assert abs(guide.median()["loc"] - y.sum() / precision) < 0.05
    assert abs(guide.scales.loc.item() * precision**0.5 - 1) < 0.1
    exact = dist.MultivariateNormal(torch.zeros(20), torch.eye(20) + 25.0).log_prob(y)
    assert abs(result.history[-1]["loss"] + exact) < 0.1  # all data together are one datum
    assert list(feed((), batch_size=None).epoch(3)) == [((), {})]
    assert not list(feed((), batch_size=None).epoch(3, 1))  # a resumed epoch that was complete
    with pytest.raises(ValueError, match=r"trained on data=\(\)"):
        fit(model, guide, [], bound=TraceELBO(), steps=1, progress=False)
