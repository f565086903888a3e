"""What a run directory gives back."""

import json
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.models import hvae, ladder_vae, vae
from pyro_hvae.training import CheckpointError, fit, load
from pyro_hvae.training import checkpoint as files
from tests.training.runs import quiet, train


@pytest.mark.parametrize("make", [vae, hvae, ladder_vae])
def test_load_gives_back_the_programs_and_their_numbers(tmp_path, make):
    x = torch.rand(30, 6).round()
    model, guide = make((6,), 2, hidden=(5,)) if make is vae else make((6,), [3, 2], hidden=(5,))
    fit(model, guide, x, bound=TraceELBO(), steps=3, run_dir=tmp_path, **quiet)
    model.eval(), guide.eval()
    torch.manual_seed(0)
    expected = TraceELBO().per_datum(model, guide, x)
    pyro.clear_param_store()
    again = load(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(TraceELBO().per_datum(*again, x), expected)


def test_load_best_and_averages(tmp_path):
    result = train(tmp_path, validate_every=4)
    state = files.read_state(tmp_path / "checkpoints" / "best")
    pyro.clear_param_store()
    model, _ = load(tmp_path, which="best")
    weights = files.read_weights(tmp_path / "checkpoints" / "best")
    assert state["step"] <= 40
    assert all(torch.equal(value, weights[f"model.{name}"]) for name, value in model.state_dict().items())
    pyro.clear_param_store()
    model, _ = load(tmp_path, ema=True)
    averages = result.averages.parameters
    assert all(torch.equal(value, averages[f"model.{name}"]) for name, value in model.named_parameters())


def test_load_says_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        load(tmp_path)
    train(tmp_path, steps=8)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint 'step-2'; it has \['step-00000004', 'step-00000008'"
    ):
        load(tmp_path, which="step-2")


class Own(PyroModule):
    def __init__(self, width):
        super().__init__(f"own{width}")
        self.net = nn.Linear(width, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x).squeeze(-1), 1.0))


class Prior(PyroModule):
    def __init__(self):
        super().__init__("prior")
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], torch.ones(x.shape[1])).to_event(1), obs=x)


def own_pair(width):
    return Prior(), Own(width)


def test_load_by_a_factory_of_ones_own(tmp_path, monkeypatch):
    import types

    module = types.ModuleType("users_programs")
    module.own_pair = own_pair
    monkeypatch.setitem(sys.modules, "users_programs", module)
    model, guide = own_pair(width=4)
    factory = ("users_programs:own_pair", {"width": 4})
    fit(model, guide, torch.randn(20, 4), bound=TraceELBO(), steps=3, run_dir=tmp_path, factory=factory, **quiet)
    pyro.clear_param_store()
    _, again = load(tmp_path, trust=True)
    assert torch.equal(again.net.weight, guide.net.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    config["factory"]["factory"] = "users_programs:gone"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(CheckpointError, match="users_programs:gone"),
        pytest.warns(UserWarning, match="has been changed since"),
    ):
        load(tmp_path, trust=True)


def test_load_without_a_factory_asks_for_the_programs(tmp_path):
    model, guide = own_pair(4)
    fit(model, guide, torch.randn(20, 4), bound=TraceELBO(), steps=3, run_dir=tmp_path, **quiet)
    with pytest.raises(CheckpointError, match=r"load\(run_dir, programs=\(model, guide\)\)"):
        load(tmp_path)
    pyro.clear_param_store()
    _, again = load(tmp_path, programs=own_pair(4))
    assert torch.equal(again.net.weight, guide.net.weight)


def test_parameters_of_the_store_are_saved_resumed_and_loaded(tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.ones(()), constraint=constraints.interval(0.1, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    def run(run_dir, steps):
        pyro.clear_param_store()
        torch.manual_seed(0)
        x = torch.randn(50)
        fit(model, guide, x, bound=TraceELBO(), steps=steps, run_dir=run_dir, resume=True, **quiet)
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    whole = run(tmp_path / "whole", 20)
    run(tmp_path / "parts", 7)
    parts = run(tmp_path / "parts", 20)
    assert whole == parts
    pyro.clear_param_store()
    load(tmp_path / "whole", programs=(model, guide))
    guide(torch.randn(3))
    assert torch.equal(pyro.param("scale").detach(), whole["scale"])
    assert torch.equal(pyro.param("mean").detach(), whole["mean"])


def test_shared_tensors_are_written_once_and_found_under_both_names(tmp_path):
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, nn.Tanh(), shared)
    path = files.save(tmp_path, "step-00000001", module.state_dict(), {"step": 1})
    weights = files.read_weights(path)
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert (path / "weights.safetensors").stat().st_size < 600
    other = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    files.restore_weights(other, weights, path)
    assert torch.equal(other[2].weight, shared.weight)
