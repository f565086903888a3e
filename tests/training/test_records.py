"""What fit() records and shows of a run, and what stops it."""

import functools
import json

import pyro.distributions as dist
import pytest
import torch

from pyro_hvae.bounds import LayerwiseELBO, TraceELBO
from pyro_hvae.training import EarlyStopping, History, fit
from tests.training.gaussian import Guide, Model, quiet


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


def test_callbacks_see_their_moments_and_need_not_have_all(data):
    seen = []

    class Count:
        def on_step(self, run, loss):
            seen.append((run.step, loss.shape))

        def on_epoch(self, run):
            seen.append("epoch")

    fit(Model(), Guide(), data, bound=TraceELBO(), epochs=2, callbacks=[Count()], **quiet)
    assert seen == [(1, ()), (2, ()), "epoch", (3, ()), (4, ()), "epoch"]


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
