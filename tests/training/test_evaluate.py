"""Validation, checks of the data before the first step, and evaluation in another thread."""

import functools
import random
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_hvae.bounds import CUBO, IWELBO, LayerwiseELBO, TraceELBO
from pyro_hvae.models import vae
from pyro_hvae.training import EarlyStopping, fit
from pyro_hvae.training.evaluate import validation_record
from pyro_hvae.training.feed import feed
from pyro_hvae.training.objective import PairObjective
from tests.training.gaussian import Guide, Model, quiet


def unchanged(args, kwargs):
    return args, kwargs


@pytest.mark.parametrize("bound", [TraceELBO(5), LayerwiseELBO(), IWELBO(5)], ids=repr)
def test_terms_of_a_validation_add_up_to_its_loss(bound, data):
    objective = PairObjective(bound, Model(), Guide(), (data[:30],), {}, 1000)
    record = validation_record(objective, feed(data[:70], batch_size=30, shuffle=False), unchanged)
    terms = {name.removeprefix("validation_"): value for name, value in record.items()}
    if "bound" in terms:
        assert terms["bound"] == pytest.approx(-terms["loss"], abs=1e-10)
        assert 1.0 <= terms["ess"] <= 5.0
    else:
        kl = sum(value for name, value in terms.items() if name.startswith(("kl_", "rate_")))
        assert terms["reconstruction"] - kl == pytest.approx(-terms["loss"], abs=1e-10)


def test_a_validation_runs_the_programs_once_a_batch(data):
    model, guide = Model(), Guide()
    objective = PairObjective(IWELBO(4), model, guide, (data[:50],), {}, 200)
    held_out = feed(data, batch_size=50, shuffle=False)
    validation_record(objective, held_out, unchanged)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    validation_record(objective, held_out, unchanged)
    handle.remove()
    assert len(calls) == 4


def test_validation_has_fixed_noise_of_every_generator_and_puts_them_back(data):
    def noisy(x):
        return x + 0.1 * torch.from_numpy(np.random.randn(len(x))) + 0.1 * random.gauss(0.0, 1.0)  # noqa: NPY002

    objective = PairObjective(TraceELBO(), Model(), Guide(), (data,), {}, 200)
    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002
    held_out = feed(data, batch_size=50, shuffle=False)
    records = [validation_record(objective, held_out, lambda args, kwargs: ((noisy(*args),), kwargs)) for _ in range(2)]
    assert records[0] == records[1]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == [np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002


def test_validation_leaves_statistics_and_modes_alone():
    torch.manual_seed(0)

    class Encoder(PyroModule):
        def __init__(self):
            super().__init__("encoder")
            self.net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x[:, None])[:, 0], 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = Encoder(), torch.randn(20)
    objective = PairObjective(LayerwiseELBO(), model, guide, (x,), {}, None)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    assert int(before["guide.net.0.num_batches_tracked"]) == 0
    validation_record(objective, feed(x, batch_size=5, shuffle=False), unchanged)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert guide.net[0].training


def test_a_run_shorter_than_an_epoch_is_validated_at_its_end(data):
    result = fit(Model(), Guide(), data, bound=TraceELBO(), steps=2, batch_size=20, validation=data[:40], **quiet)
    assert [record["step"] for record in result.history if "validation_loss" in record] == [2]


@pytest.mark.parametrize("monitor", ["validation_lost", "los"])
def test_early_stopping_on_an_unknown_quantity_is_refused(monitor, data):
    with pytest.raises(ValueError, match=f"watches '{monitor}', which is not recorded; recorded are .*loss"):
        fit(
            Model(), Guide(), data, bound=TraceELBO(), epochs=2, validation=data[:40], log_every=1,
            callbacks=[EarlyStopping(patience=3, monitor=monitor)], **quiet,
        )  # fmt: skip


def test_an_upper_estimate_is_validated_with_the_sign_of_its_loss():
    """With the exact posterior the estimate is log p(x)."""

    class Exact(PyroModule):
        def __init__(self):
            super().__init__("exact")
            self.slope = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x, 0.5**0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(9)
    objective = PairObjective(CUBO(2, 20), model, Exact(), (x,), {}, None)
    record = validation_record(objective, feed(x, batch_size=4, shuffle=False), unchanged)
    exact = float(dist.Normal(0.0, 2**0.5).log_prob(x).mean())
    assert record["validation_loss"] == pytest.approx(exact, abs=1e-10)


# -- observations


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": x}, lambda x: x.numpy()], ids=["tensor", "map", "array"])
@pytest.mark.parametrize("transform", [None, lambda x: x * 1.0], ids=["as it is", "transformed"])
def test_data_outside_of_the_support_are_refused_wherever_they_stand(wrap, transform):
    torch.manual_seed(0)
    model, guide = vae(6, 2, hidden=(4,))
    x = (torch.rand(300, 6) < 0.5).double()
    x[299, 2] = 0.5
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"1 of \d+ observed values at site 'x' lie outside of the support"):
        fit(model, guide, wrap(x), bound=TraceELBO(), epochs=1, batch_size=50, transform=transform, **quiet)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_the_first_batch_is_checked_where_data_come_in_batches():
    torch.manual_seed(0)
    model, guide = vae(6, 2, hidden=(4,))
    x = torch.rand(60, 6)
    with pytest.raises(ValueError, match="outside of the support"):
        fit(model, guide, DataLoader(TensorDataset(x), batch_size=20), bound=TraceELBO(), epochs=1, **quiet)


def test_supports_that_differ_from_row_to_row_are_no_reason_to_refuse():
    def model(count, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Binomial(count, logits=z), obs=x)

    def guide(count, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    count = torch.arange(1.0, 41.0)
    data = (count, count - 1.0)
    assert fit(model, guide, data, bound=TraceELBO(), epochs=1, batch_size=10, **quiet).steps == 4


# -- threads


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}], ids=["eager", "compiled"])
def test_another_thread_may_evaluate_during_training(compile, data):
    """Neither stops the other, and modules are in their modes afterwards."""
    model, guide = Model(), Guide()
    errors = []

    def train():
        try:
            fit(model, guide, data, bound=TraceELBO(), steps=150, batch_size=50, compile=compile, **quiet)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    count = 0
    while thread.is_alive():
        value = IWELBO(20).per_datum(model, guide, data[:10])
        assert value.shape == (10,)
        assert torch.isfinite(value).all()
        count += 1
    thread.join()
    assert not errors
    assert count > 0
    assert all(module.training for module in (model, guide))


def test_fits_of_several_pairs_at_once(data):
    errors = []

    def train(seed):
        try:
            fit(
                Model(), Guide(), data, bound=TraceELBO(), steps=30, batch_size=50, seed=seed,
                optimizer=functools.partial(torch.optim.Adam, lr=0.01), **quiet,
            )  # fmt: skip
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
