"""Runs that are killed, interrupted, or out of disk, and files that are no checkpoints."""

import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_hvae.bounds import Regularised, TraceELBO, warm_up
from pyro_hvae.data import Batches
from pyro_hvae.models import hvae, ladder_vae, vae
from pyro_hvae.training import CheckpointError, EarlyStopping, History, fit, load
from pyro_hvae.training import checkpoint as files

quiet = {"progress": False}


def binarized(x):
    """Binarise anew at each use: the data, too, draws from torch's generator."""
    return torch.bernoulli(x)


def train(run_dir, *, callbacks=(), kind="tensor", **options):
    """A run with everything that has a state: noise, shuffling, schedule, averages, warm-up, validation."""
    torch.manual_seed(11)
    pyro.clear_param_store()
    x = torch.rand(60, 6)
    model, guide = hvae((6,), [3, 2], hidden=(5,))
    torch.manual_seed(12)
    data = x
    if kind == "loader":
        data = DataLoader(TensorDataset(x), batch_size=7, shuffle=True)
    elif kind == "batches":
        data = Batches(x, batch_size=7, seed=3)
    settings = {
        "bound": Regularised(TraceELBO(), kl_weight=warm_up(30)),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
        "schedule": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
        "transform": binarized,
        "batch_size": 7,
        "steps": 40,
        "ema": 0.9,
        "clip_norm": 5.0,
        "validation": x[:10],
        "validate_every": 13,
        "checkpoint_every": 4,
        "log_every": 3,
        "check_every": 5,
    }
    result = fit(
        model, guide, data, run_dir=run_dir, resume=True,
        callbacks=[EarlyStopping(patience=100), *callbacks], **{**settings, **options}, **quiet,
    )  # fmt: skip
    return result


def end_of(run_dir):
    """Everything a finished run has come to: weights, averages, optimiser, losses."""
    last = files.latest(run_dir / "checkpoints")
    state = files.read_state(last)
    tensors = dict(files.read_weights(last))
    tensors.update({f"ema.{name}": value for name, value in state["ema"]["parameters"].items()})
    for key, own in state["optimizer"]["state"].items():
        tensors.update({f"optimizer.{key}.{name}": value for name, value in own.items()})
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in History.read(run_dir / "history.jsonl")]
    return state["step"], tensors, records


def assert_same_end(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        assert torch.equal(found[1][name], expected[1][name]), name
    assert found[2] == expected[2]


def in_a_process(action):
    """Run in a fork; how it ended, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except SystemExit as error:
            os._exit(error.code)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(70)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


class KillAt:
    def __init__(self, step, number=signal.SIGKILL):
        self.step, self.number = step, number

    def on_step(self, run, loss):
        if run.step == self.step:
            os.kill(os.getpid(), self.number)


def kill_while_writing(run_dir, number, **options):
    """SIGKILL at the ``number``-th time that something is forced to the disk: in the middle of a save."""
    calls = itertools.count(1)
    sync = os.fsync

    def fsync(descriptor):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync
    train(run_dir, **options)


def kill_and_resume(tmp_path, kills, seed, **options):
    train(tmp_path / "whole", **options)
    expected = end_of(tmp_path / "whole")
    choice = random.Random(seed)
    for number in range(kills):
        run_dir = tmp_path / f"killed-{number}"
        for _ in range(2):  # killed twice, once at a step and once within a save
            step = choice.randrange(1, 40)
            in_a_process(functools.partial(train, run_dir, callbacks=[KillAt(step)], **options))
            in_a_process(functools.partial(kill_while_writing, run_dir, choice.randrange(1, 25), **options))
        assert in_a_process(functools.partial(train, run_dir, **options)) == 0
        assert_same_end(end_of(run_dir), expected)
        assert not [p for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]
        shutil.rmtree(run_dir)


@pytest.mark.parametrize(("kind", "seed"), [("tensor", 0), ("loader", 1), ("batches", 2)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, kind, seed):
    kill_and_resume(tmp_path, kills=1, seed=seed, kind=kind)


@pytest.mark.parametrize("kind", ["tensor", "loader", "batches"])
def test_resuming_at_the_end_of_an_epoch(tmp_path, kind):
    """The ninth of nine batches was the last thing that the killed run saw."""
    train(tmp_path / "whole", kind=kind, checkpoint_every=9)
    in_a_process(functools.partial(train, tmp_path / "killed", callbacks=[KillAt(10)], kind=kind, checkpoint_every=9))
    assert files.latest(tmp_path / "killed" / "checkpoints").name == "step-00000009"
    train(tmp_path / "killed", kind=kind, checkpoint_every=9)
    assert_same_end(end_of(tmp_path / "killed"), end_of(tmp_path / "whole"))


def test_a_killed_compiled_run_resumes_bit_for_bit(tmp_path):
    kill_and_resume(tmp_path, kills=1, seed=5, compile={"backend": "eager"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "loader", "batches"])
def test_many_kills(tmp_path, kind):
    kill_and_resume(tmp_path, kills=7, seed=7, kind=kind)


def test_a_finished_run_can_be_made_longer(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "parts", steps=17)
    train(tmp_path / "parts", steps=29)
    train(tmp_path / "parts")
    whole, parts = end_of(tmp_path / "whole"), end_of(tmp_path / "parts")
    assert_same_end((*parts[:2], None), (*whole[:2], None))
    before = (tmp_path / "parts" / "history.jsonl").read_text()
    train(tmp_path / "parts")  # nothing left to do
    assert (tmp_path / "parts" / "history.jsonl").read_text() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signals_save_and_leave(tmp_path, number, code):
    train(tmp_path / "whole")
    assert in_a_process(lambda: train(tmp_path / "stopped", callbacks=[KillAt(18, number)])) == code
    assert files.latest(tmp_path / "stopped" / "checkpoints").name == "step-00000018"
    train(tmp_path / "stopped")
    assert_same_end(end_of(tmp_path / "stopped"), end_of(tmp_path / "whole"))


def test_last_k_and_best_are_kept(tmp_path):
    result = train(tmp_path, keep=3, validate_every=8)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best", "step-00000032", "step-00000036", "step-00000040"]
    best = files.read_state(tmp_path / "checkpoints" / "best")
    losses = {r["step"]: r["validation_loss"] for r in result.history if "validation_loss" in r}
    assert best["step"] == min(losses, key=losses.get)


def test_a_full_disk_leaves_the_last_checkpoint_good(tmp_path):
    def starve():
        class Starve:
            def on_step(self, run, loss):
                if run.step == 10:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

        try:
            train(tmp_path / "full", callbacks=[Starve()])
        except OSError as error:
            told = "could not write checkpoint" in str(error) and "step-00000008" in str(error)
            os._exit(3 if told else 4)

    train(tmp_path / "whole")
    assert in_a_process(starve) == 3
    directory = tmp_path / "full" / "checkpoints"
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000004", "step-00000008"]
    train(tmp_path / "full")
    assert_same_end(end_of(tmp_path / "full"), end_of(tmp_path / "whole"))


# -- files that are no checkpoints


@pytest.fixture
def run_dir(tmp_path):
    train(tmp_path, steps=8)
    return tmp_path


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_damaged_checkpoints_are_refused_by_name(run_dir, name, damage):
    path = files.latest(run_dir / "checkpoints") / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "foreign":
        path.write_bytes(b"GIF89a and more of the same" * 10)
    else:
        path.unlink()
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=name):
        train(run_dir)
    assert before == {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    if name == "weights.safetensors":
        with pytest.raises(CheckpointError, match=name):
            load(run_dir)


def test_another_architecture_is_refused_and_nothing_changed(run_dir):
    pyro.clear_param_store()
    model, guide = hvae((6,), [4, 2], hidden=(5,))
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    with pytest.raises(CheckpointError, match=r"weights.safetensors is of another architecture.*in the program"):
        fit(model, guide, torch.rand(60, 6).round(), bound=TraceELBO(), steps=9, run_dir=run_dir, resume=True, ema=0.9,
            schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50), **quiet)  # fmt: skip
    after = [*model.parameters(), *guide.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_other_arguments_are_refused(run_dir):
    with pytest.raises(CheckpointError, match=r"was written with schedule=, this run is not"):
        train(run_dir, schedule=None)


def test_a_run_is_not_overwritten(run_dir):
    model, guide = hvae((6,), [3, 2], hidden=(5,))
    with pytest.raises(FileExistsError, match="resume=True"):
        fit(model, guide, torch.rand(60, 6).round(), bound=TraceELBO(), steps=9, run_dir=run_dir, **quiet)


# -- load


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
    train(tmp_path, steps=8, validate_every=100)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'best'; it has \['step-00000004', 'step-00000008'\]"):
        load(tmp_path, which="best")


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
    _, again = load(tmp_path)
    assert torch.equal(again.net.weight, guide.net.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    config["factory"]["factory"] = "users_programs:gone"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="users_programs:gone"):
        load(tmp_path)


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
