"""The demonstration, a second a model: what it writes, and that run directories give back the reported numbers."""

import json
import math

import pytest
import torch
import xarray

from pyro_hvae.data import binarize, digits
from pyro_hvae.demo import Clock, bernoulli_baseline, demo, depths, evaluate, report
from pyro_hvae.models import hvae
from pyro_hvae.training import History, load


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    lines = []
    torch.set_default_dtype(torch.float32)
    try:
        results = demo(out, seconds=1.0, progress=False, say=lines.append)
    finally:
        torch.set_default_dtype(torch.float64)
    return out, results, "\n".join(lines)


def test_demo_writes_what_it_says(made):
    out, results, text = made
    assert json.loads((out / "results.json").read_text()) == results
    for name in ("training", "layers", "reconstructions", "samples", "depths"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    history = History.read(out / "hvae" / "history.jsonl")
    weights = history["divergence_weight"]  # on a busy machine the first record may come when warm-up is over
    assert weights == sorted(weights)
    assert weights[0] > 0
    assert weights[-1] == 1.0
    for name in ("hvae", "ladder_vae", "vae"):
        assert len(History.read(out / name / "history.jsonl")) > 0
        assert results["models"][name]["steps"] > 0
    assert "ArviZ on q(z3 |" in text
    assert "nats an image above independent pixels" in text
    with xarray.open_datatree(out / "posterior.nc", engine="h5netcdf") as tree:
        assert tree["posterior"].sizes["draw"] == 500
        assert {"posterior", "log_likelihood", "observed_data", "sample_stats"} <= set(tree.children)


@pytest.mark.parametrize("name", ["hvae", "ladder_vae", "vae"])
def test_run_directories_give_back_the_numbers(made, name):
    out, results, _ = made
    torch.set_default_dtype(torch.float32)
    model, guide = load(out / name)
    torch.manual_seed(0)
    test = binarize(digits().test, threshold=0.5)
    again = evaluate(model, guide, test)
    reported = results["models"][name]
    assert again["elbo"] == pytest.approx(reported["elbo"], abs=1e-4)
    assert again["log_likelihood"] == pytest.approx(reported["log_likelihood"], abs=1e-4)
    assert again["elbo"] < again["log_likelihood"]
    assert again["active"] == reported["active"]


def test_the_bounds_of_a_model_that_ignores_its_latents_are_its_likelihood():
    """With zero weights q = p for the latents and pixels are fair coins: every number is known."""
    model, guide = hvae(64, (3, 2), hidden=(4,))
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.zero_()
    found = evaluate(model, guide, torch.bernoulli(torch.full((5, 64), 0.5)), num_particles=20)
    exact = -64 * math.log(2)
    assert found["elbo"] == pytest.approx(exact, abs=1e-10)
    assert found["log_likelihood"] == pytest.approx(exact, abs=1e-10)
    assert found["bits_per_dim"] == pytest.approx(1.0, abs=1e-12)
    assert found["active"] == {"z1": 0, "z2": 0}
    fake = {name: {**found, "steps": 1} for name in ("hvae", "ladder_vae", "vae")}
    text = "\n".join(report({"baseline": exact, "models": fake}))
    assert "HVAE: z1, z2 collapsed onto the prior" in text
    assert "less than the 5" in text
    assert "fewer than two layers" in text


def test_baseline_is_the_likelihood_of_smoothed_frequencies():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    test = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    expected = torch.tensor([0.6 * 0.2, 0.4 * 0.8]).log()
    torch.testing.assert_close(bernoulli_baseline(train, test), expected)


def test_depths_keep_what_they_say():
    model, guide = hvae(64, (4, 3, 2), hidden=(8,))
    x = torch.bernoulli(torch.full((5, 64), 0.5))
    rows, titles = depths(model, guide, x)
    assert titles == ["data", "z1 kept", "z2 kept", "z3 kept", "prior"]
    assert all(row.shape == (5, 64) for row in rows)
    assert torch.equal(rows[0], x)


def test_clock():
    clock = Clock(1e-9, rate=1.0)
    assert clock.kl_weight(0) == 0.0
    assert clock.free_bits(0) == 1.0

    class Run:
        stopped = None
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)

        def stop(self, reason):
            self.stopped = reason

    run = Run()
    clock.on_start(run)
    sum(range(1000))
    clock.on_step(run, None)
    assert run.stopped == "the time is over"
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    assert (clock.kl_weight(1), clock.free_bits(1)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        Clock(0, rate=1.0)
