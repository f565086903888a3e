"""Held-out fractions, rates, the best weights, and data that are brought to the parameters."""

import functools

import pyro
import pytest
import torch

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.training import checkpoint as files
from pyro_hvae.training import fit
from pyro_hvae.training.feed import TensorFeed, feed
from pyro_hvae.training.prepare import Move, held_out
from tests.training.gaussian import Guide, Model, quiet, sgd


def seen(loader):
    return torch.cat([args[0] for args, _ in loader.epoch(0)])


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_fraction_parts_the_rows(shuffle):
    x = torch.arange(50.0)
    train, rest = held_out(feed(x, batch_size=7, shuffle=shuffle, seed=3), 0.2, 7)
    assert (train.data_size, rest.data_size) == (40, 10)
    assert sorted([*seen(train).tolist(), *seen(rest).tolist()]) == x.tolist()
    again, _ = held_out(feed(x, batch_size=7, shuffle=shuffle, seed=3), 0.2, 7)
    assert torch.equal(seen(again), seen(train))
    assert torch.equal(seen(rest), x[40:]) is not shuffle


def test_a_fraction_of_named_tensors_and_of_all_at_once():
    train, rest = held_out(feed({"x": torch.arange(9), "mask": torch.ones(9)}, batch_size=None), 1 / 3, None)
    ((_, first),) = train.epoch(0)
    ((_, second),) = rest.epoch(0)
    assert (first["x"].tolist(), second["x"].tolist(), len(second["mask"])) == ([0, 1, 2, 3, 4, 5], [6, 7, 8], 3)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5, float("nan"), 0.001, 0.999, 2, True])
def test_fractions_that_leave_nothing_are_refused(fraction):
    with pytest.raises((ValueError, TypeError), match=r"validation|data must be"):
        held_out(feed(torch.zeros(20), batch_size=5), fraction, 5)
    with pytest.raises(ValueError, match="these data are an iterable"):
        held_out(feed([torch.zeros(5)], batch_size=5), 0.2, 5)


def test_fit_holds_out_a_fraction(data):
    result = fit(Model(), Guide(), data, bound=TraceELBO(), epochs=2, seed=1, validation=0.25, batch_size=50, **quiet)
    assert result.steps == 6  # 150 of 200 data
    assert len(result.history["validation_loss"]) == 2


def test_the_rate_reaches_the_optimizer(data):
    rates = []

    class Rate:
        def on_step(self, run, loss):
            rates.append((type(run.optimizer).__name__, run.rate))

    options = {"bound": TraceELBO(), "steps": 1, "callbacks": [Rate()], **quiet}
    fit(Model(), Guide(), data, lr=0.5, **options)
    fit(Model(), Guide(), data, lr=0.5, optimizer=torch.optim.SGD, **options)
    fit(Model(), Guide(), data, lr=0.5, optimizer=functools.partial(torch.optim.SGD, lr=2.0), **options)
    assert rates == [("Adam", 0.5), ("SGD", 0.5), ("SGD", 0.5)]
    model, guide = Model(), Guide()
    made = torch.optim.SGD([*model.parameters(), *guide.parameters()], lr=0.1)
    for optimizer, message in ((made, "made already"), (lambda p: made, "does not take it")):
        with pytest.raises(ValueError, match=message):
            fit(model, guide, data, lr=0.5, optimizer=optimizer, **options)


def growing(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + step * step / 20)


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("where", ["memory", "disk", "resumed"])
def test_the_best_weights_are_restored(tmp_path, data, ema, where):
    """A rate that grows until training diverges: the best is not the last."""

    def run(steps, **options):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = Model(), Guide()
        kept = []

        class Keep:
            def on_record(self, run, record):
                if "validation_loss" in record:
                    values = dict(run.objective.named_parameters()) if ema is None else run.averages.parameters
                    kept.append((record["validation_loss"], {n: v.detach().clone() for n, v in values.items()}))

        fit(model, guide, data, bound=TraceELBO(), optimizer=sgd, steps=steps, batch_size=50, seed=1, ema=ema,
            validation=data[:40], validate_every=2, schedule=growing, callbacks=[Keep()],
            **options, **quiet)  # fmt: skip
        return model, guide, kept

    options = {} if where == "memory" else {"run_dir": tmp_path, "resume": True}
    before = run(8, **options)[2] if where == "resumed" else []
    model, guide, kept = run(14, restore_best=True, **options)
    kept = before + kept
    best = min(kept, key=lambda pair: pair[0])
    assert best[0] < kept[-1][0]
    programs = {"model": model, "guide": guide}.items()
    own = {f"{which}.{name}": p for which, program in programs for name, p in program.named_parameters()}
    assert all(torch.equal(own[name].detach(), value) for name, value in best[1].items())
    if where != "memory":  # and the run goes on from the last
        last = files.read_weights(files.latest(tmp_path / "checkpoints"))
        assert not all(torch.equal(last[name], value) for name, value in best[1].items())


def test_without_validation_there_is_no_best(data):
    with pytest.raises(ValueError, match="pass validation="):
        fit(Model(), Guide(), data, bound=TraceELBO(), steps=1, restore_best=True, **quiet)


def test_other_dtypes_are_converted_with_one_warning(data):
    with pytest.warns(UserWarning, match=r"data are torch.float32 and the parameters torch.float64") as caught:
        result = fit(Model(), Guide(), data.float(), bound=TraceELBO(), epochs=2, batch_size=50, seed=1, **quiet)
    assert len(caught) == 1
    expected = fit(Model(), Guide(), data.float().double(), bound=TraceELBO(), epochs=2, batch_size=50, seed=1, **quiet)
    assert len(result.history["loss"]) == len(expected.history["loss"])


def test_batches_follow_the_parameters_and_whole_numbers_keep_their_dtype():
    move = Move(lambda args, kwargs: (args, kwargs), Model().to("meta"), Guide().to("meta"))
    args, kwargs = move((torch.zeros(3), torch.arange(3)), {"mask": torch.ones(3, dtype=torch.bool), "size": 3})
    assert [value.device.type for value in (*args, kwargs["mask"])] == ["meta"] * 3
    assert [value.dtype for value in (*args, kwargs["mask"])] == [torch.float64, torch.int64, torch.bool]
    assert kwargs["size"] == 3
    assert move.moves


def test_devices_that_are_not_there_are_refused(data):
    options = {"bound": TraceELBO(), "steps": 1, **quiet}
    for device in ("nowhere", "cuda:99", 3.5):
        with pytest.raises(ValueError, match="can't be used"):
            fit(Model(), Guide(), data, device=device, **options)
    with pytest.raises(ValueError, match="neither is one"):
        fit(lambda x: None, lambda x: None, data, device="cpu", **options)
    fit(Model(), Guide(), data, device="cpu", **options)
    assert isinstance(feed(data, batch_size=3), TensorFeed)
