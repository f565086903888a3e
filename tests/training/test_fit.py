"""fit(): what it minimises, what it records, and what it refuses."""

import functools
import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_hvae.bounds import LayerwiseELBO, Regularised, TraceELBO, warm_up
from pyro_hvae.data import Batches
from pyro_hvae.training import Averages, EarlyStopping, History, NonFiniteError, fit, fit_restarts
from pyro_hvae.training.feed import feed

quiet = {"progress": False}
sgd = functools.partial(torch.optim.SGD, lr=0.1)


class Model(PyroModule):
    """z ~ N(m, 1), x|z ~ N(z, 1): log p(x) = log N(x; m, 2)."""

    def __init__(self):
        super().__init__("model")
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, x, data_size=None):
        size = len(x) if data_size is None else data_size
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(PyroModule):
    """q(z|x) = N(a x + b, s)."""

    def __init__(self):
        super().__init__("guide")
        self.net = nn.Linear(1, 1)
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, x, data_size=None):
        size = len(x) if data_size is None else data_size
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(self.net(x[:, None])[:, 0], self.scale))


@pytest.fixture
def data():
    return 2.0 + math.sqrt(2.0) * torch.randn(200)


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


def test_history_has_losses_terms_and_validation(data, tmp_path):
    result = fit(
        Model(),
        Guide(),
        data,
        bound=LayerwiseELBO(),
        epochs=2,
        batch_size=50,
        log_every=2,
        validation=data[:60],
        run_dir=tmp_path,
        **quiet,
    )
    expected = {"loss", "rate", "reconstruction", "kl_z", "validation_loss", "validation_kl_z"}
    assert expected <= set(result.history.names())
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == list(result.history)
    frame = result.history.to_pandas()
    assert list(frame.index) == [2, 4, 6, 8]
    assert result.history.to_xarray()["loss"].dims == ("step",)
    assert [r["step"] for r in result.history if "validation_loss" in r] == [4, 8]


def test_validation_loss_is_the_bound_on_all_held_out_data():
    """With the exact guide every estimate is log p(x), so the validation loss is known to round-off."""
    model, guide = Model(), Guide()
    with torch.no_grad():
        guide.net.weight.fill_(0.5)
        guide.net.bias.zero_()
    guide.scale = torch.tensor(0.5**0.5)
    x, held_out = torch.randn(40), torch.randn(33)
    frozen = functools.partial(torch.optim.SGD, lr=0.0)
    options = {"optimizer": frozen, "epochs": 1, "batch_size": 10, "validation": held_out}
    result = fit(model, guide, x, bound=TraceELBO(), **options, **quiet)
    exact = -dist.Normal(0.0, 2**0.5).log_prob(held_out).mean().item()
    assert result.history["validation_loss"][0] == pytest.approx(exact, abs=1e-10)


def test_early_stopping_stops_and_says_why(data):
    result = fit(
        Model(),
        Guide(),
        data,
        bound=TraceELBO(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.0),
        epochs=50,
        validation=data[:50],
        callbacks=[EarlyStopping(patience=3)],
        **quiet,
    )
    assert result.steps == 2 * 4
    assert "has not improved" in result.stopped


def test_early_stopping_on_what_is_never_recorded_is_an_error(data):
    with pytest.raises(ValueError, match=r"watches 'validation_loss', but fit\(\) got no validation data"):
        fit(Model(), Guide(), data, bound=TraceELBO(), epochs=1, callbacks=[EarlyStopping(patience=3)], **quiet)


def test_callbacks_see_their_moments_and_need_not_have_all(data):
    seen = []

    class Count:
        def on_step(self, run, loss):
            seen.append((run.step, loss.shape))

        def on_epoch(self, run):
            seen.append("epoch")

    fit(Model(), Guide(), data, bound=TraceELBO(), epochs=2, callbacks=[Count()], **quiet)
    assert seen == [(1, ()), (2, ()), "epoch", (3, ()), (4, ()), "epoch"]


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

    fit(
        Model(), Guide(), data, bound=Regularised(TraceELBO(), kl_weight=weight), steps=2, batch_size=25, accumulate=4,
        **quiet,
    )  # fmt: skip
    assert max(seen) <= 2
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


class Breaks(PyroModule):
    """A guide that breaks at the datum 99."""

    def __init__(self, kind):
        super().__init__("breaks")
        self.net = nn.Linear(1, 1)
        self.kind = kind

    def forward(self, x, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            loc = self.net(x[:, None])[:, 0]
            good = (x != 99.0).to(x)
            if self.kind == "value":
                loc = loc / good
            else:  # the value is fine, its gradient is not
                loc = torch.sqrt(good * (1.0 + loc**2))
            pyro.sample("z", dist.Normal(loc, 1.0))


@pytest.mark.parametrize(
    ("kind", "what"), [("value", "the guide's draw of 'z'"), ("gradient", "the gradient of guide.net.weight")]
)
def test_nan_is_traced_to_its_step_and_site(kind, what):
    x = torch.zeros(100)
    x[86] = 99.0  # met in the ninth batch
    model, guide = Model(), Breaks(kind)
    path = {}

    class Watch:
        def on_step(self, run, loss):
            path[run.step] = run.guide.net.weight.detach().clone()

    with pytest.raises(NonFiniteError) as caught:
        fit(
            model, guide, x, bound=TraceELBO(), epochs=2, batch_size=10, shuffle=False, check_every=6,
            callbacks=[Watch()], **quiet,
        )  # fmt: skip
    assert caught.value.step == 9
    assert what in caught.value.sites
    assert "step 9" in str(caught.value)
    assert torch.equal(guide.net.weight, path[6])


def test_nan_in_the_data_is_refused_before_the_first_step(data):
    data[17] = math.nan
    data[40] = math.inf
    model = Model()
    message = r"2 of 200 values of the data are NaN or infinite; the first is nan at index \(17,\)"
    with pytest.raises(ValueError, match=message):
        fit(model, Guide(), data, bound=TraceELBO(), epochs=1, batch_size=10, **quiet)
    assert model.mean.item() == 0.0


def test_nan_behind_a_mask_is_no_nan_in_the_data(data):
    from pyro_hvae.training.feed import feed

    mask = torch.ones(200, dtype=torch.bool)
    mask[17], data[17] = False, math.nan
    assert feed({"x": data, "mask": mask}, batch_size=10).data_size == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of epochs and steps"),
        ({"epochs": 1, "steps": 1}, "exactly one of epochs and steps"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": 1, "clip_norm": -1.0}, "clip_norm must be positive"),
        ({"steps": 1, "precision": "fp4"}, "precision must be None or 'bf16'"),
        ({"steps": 1, "ema": 1.0}, r"must be in \[0, 1\)"),
        ({"steps": 1, "resume": True}, "resume=True goes on from a run_dir"),
        ({"steps": 1, "tensorboard": True}, "tensorboard=True writes under run_dir"),
    ],
)
def test_refused_arguments(options, message, data):
    with pytest.raises(ValueError, match=message):
        fit(Model(), Guide(), data, bound=TraceELBO(), **options, **quiet)


def test_pyro_optimisers_are_refused_with_the_reason(data):
    with pytest.raises(TypeError, match=r"belong to pyro\.infer\.SVI"):
        fit(Model(), Guide(), data, bound=TraceELBO(), steps=1, optimizer=pyro.optim.Adam({"lr": 1e-3}), **quiet)


def test_an_optimizer_that_misses_parameters_is_refused(data):
    model, guide = Model(), Guide()
    with pytest.raises(ValueError, match=r"does not hold 1 parameter\(s\) of the pair, among them \['model.mean'\]"):
        fit(model, guide, data, bound=TraceELBO(), steps=1, optimizer=torch.optim.Adam(guide.parameters()), **quiet)


def test_a_used_up_iterator_is_an_error(data):
    result = fit(Model(), Guide(), iter([data[:150], data[150:]]), bound=TraceELBO(), epochs=1, data_size=200, **quiet)
    assert result.steps == 2
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="one-shot iterator"):
        fit(Model(), Guide(), iter([data]), bound=TraceELBO(), epochs=2, **quiet)


def test_tensorboard_gets_every_record(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(
        Model(), Guide(), data, bound=TraceELBO(), steps=4, log_every=2, run_dir=tmp_path, tensorboard=True, **quiet
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(result.history["loss"], rel=1e-6)


def test_history_forgets_a_line_cut_short(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 1, "epoch": 0, "loss": 2.0}\n{"step": 2, "ep')
    assert list(History.read(tmp_path / "history.jsonl")) == [{"step": 1, "epoch": 0, "loss": 2.0}]


def test_averages_refuse_a_decay_of_one():
    with pytest.raises(ValueError, match=r"got 1\.0"):
        Averages(nn.Linear(1, 1), 1.0)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_all_data_at_once_stay_in_their_order(batch_size):
    """A series in time is one datum whose rows mean something; with batches each epoch has an order of its own."""
    x = torch.arange(12.0)
    whole = feed(x, batch_size=batch_size, shuffle=True, drop_last=False, seed=0)
    for epoch in range(2):
        order = torch.cat([args[0] for args, _ in whole.epoch(epoch)])
        assert torch.equal(order, x) == (batch_size is None)
        assert torch.equal(order.sort().values, x)
