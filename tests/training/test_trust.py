"""Files from somebody else: each way in that was thought of, refused, and with trust allowed."""

import json
import os
import pickle
import re

import numpy as np
import pyro
import pytest
import torch

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.cli import main
from pyro_hvae.cli.specs import make_pair
from pyro_hvae.models import vae
from pyro_hvae.training import CheckpointError, UntrustedError, fit, load
from pyro_hvae.training import checkpoint as files
from pyro_hvae.training.trust import is_trusted

EVIL = '''
import pathlib
pathlib.Path({marker!r}).touch()


def pair(**arguments):
    from pyro_hvae.models import vae
    return vae(6, 2, hidden=(5,))


def data():
    import torch
    return torch.ones(8, 6)


class Net:
    pass


thing = 3
'''


class Case:
    """A run directory, a Python file that leaves a mark when it is imported, and the mark."""

    def __init__(self, folder):
        self.run_dir, self.marker, self.file = folder / "run", folder / "executed", folder / "evil.py"
        self.file.write_text(EVIL.format(marker=str(self.marker)))
        model, guide = vae(6, 2, hidden=(5,))
        self.x = torch.ones(8, 6)
        np.save(folder / "x.npy", self.x.numpy())
        fit(model, guide, self.x, bound=TraceELBO(), steps=2, run_dir=self.run_dir, progress=False)
        self.factory(json.loads((self.run_dir / "config.json").read_text())["factory"])
        self.command(data=str(folder / "x.npy"))

    def factory(self, record):
        """Write a config with valid checksums."""
        config = json.loads((self.run_dir / "config.json").read_text())
        files.write_config(self.run_dir, {k: v for k, v in config.items() if k != "sha256"} | {"factory": record})

    def command(self, **content):
        (self.run_dir / "command.json").write_text(json.dumps({"held_out": None, "binarize": None, **content}))

    @property
    def executed(self):
        return self.marker.exists()


@pytest.fixture
def case(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    made = Case(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    pyro.clear_param_store()
    return made


def assembled(**recipe):
    return {"factory": "pyro_hvae.cli.specs:make_pair", "args": recipe}


FACTORIES = [
    {"factory": "os:system", "args": {"command": "touch executed"}},
    {"factory": "os.system", "args": {"command": "touch executed"}},
    {"factory": "subprocess:run", "args": {"args": ["touch", "executed"]}},
    {"factory": "builtins:exec", "args": {}},
    {"factory": "evil:pair", "args": {}},
    {"factory": "evil.pair", "args": {}},
    {"factory": "pyro_hvae.models:torch.load", "args": {"f": "x"}},
    {"factory": "pyro_hvae.models.torch.os.system", "args": {"command": "touch executed"}},
    {"factory": "pyro_hvae.models:__builtins__", "args": {}},
    {"factory": "pyro_hvae.cli.specs:load_object", "args": {"path": "evil:thing"}},
    {"factory": "pyro_hvae.cli.specs:make", "args": {"spec": {"class_path": "os.system", "args": ["touch executed"]}}},
    {"factory": "pyro_hvae.cli:main", "args": {"argv": ["demo"]}},
    {"factory": "pyro_hvae.demo:demo", "args": {}},
    {"factory": "pyro_hvae:load", "args": {"run_dir": "other"}},
    {"factory": "pyro_hvae.training.rebuild:build", "args": {"record": {}, "trust": True}},
    {"factory": "torch:load", "args": {"f": "x"}},
    {"factory": "torch.hub:load", "args": {}},
    {"factory": "torch.utils.cpp_extension:load", "args": {}},
    {"factory": "torch.nn:functional", "args": {}},
    {"factory": "torch.nn:Module.__init__.__globals__", "args": {}},
    {"factory": "numpy:load", "args": {"file": "x", "allow_pickle": True}},
    assembled(pair="os.system", pair_args={"command": "touch executed"}),
    assembled(pair="evil.py:pair"),
    assembled(pair="evil:pair"),
    assembled(pair="pyro_hvae.models.vae", pair_args={"event_shape": {"class_path": "evil.Net"}}),
    assembled(pair="pyro_hvae.models.vae", pair_args={"x": [{"deep": {"object": "evil.thing"}}]}),
    assembled(model="evil.py:pair", guide="evil.py:pair"),
    assembled(model="torch.nn.Linear", guide={"class_path": "evil.Net"}),
    assembled(model={"class_path": "torch.nn.Sequential", "args": [{"class_path": "evil.Net"}]}, guide="$model"),
    assembled(model={"class_path": "builtins.eval", "args": ["open('executed', 'w')"]}, guide="$model"),
    assembled(model={"class_path": "torch.nn.Linear", "init_args": {"in_features": {"class_path": "evil.Net"}}},
              guide="torch.nn.Identity"),
]  # fmt: skip


@pytest.mark.parametrize("record", FACTORIES, ids=lambda record: f"{record['factory']} {str(record['args'])[:40]}")
@pytest.mark.parametrize("verb", ["load", "evaluate", "sample", "diagnose"])
def test_a_run_directory_calls_nothing_of_others(case, capsys, record, verb):
    case.factory(record)
    if verb == "load":
        with pytest.raises(UntrustedError, match=r"config.json would call .*trust=True"):
            load(case.run_dir)
    else:
        assert main([verb, str(case.run_dir)]) == 2
        assert "would call" in capsys.readouterr().err
    assert not case.executed


def test_with_trust_a_users_factory_is_called(case, capsys):
    case.factory(assembled(pair=f"{case.file}:pair"))
    load(case.run_dir, trust=True)
    assert case.executed
    assert main(["sample", str(case.run_dir), "--trust", "--size", "3"]) == 0
    case.factory({"factory": "os:system", "args": {"command": "true"}})
    with pytest.raises(CheckpointError, match=r"os:system returned int, no pair"):
        load(case.run_dir, trust=True)


def test_the_librarys_own_factories_need_no_trust(case):
    case.factory({"factory": "pyro_hvae.models.vae", "args": {"event_shape": 6, "latent_dim": 2, "hidden": [5]}})
    load(case.run_dir)
    case.factory(assembled(pair="pyro_hvae.models.vae", pair_args={"event_shape": 6, "latent_dim": 2, "hidden": [5]}))
    load(case.run_dir)
    linear = {"class_path": "torch.nn.Linear", "args": [2, 6]}
    chain = {"z": {"class_path": "pyro_hvae.kernels.StandardNormal", "args": [2]},
             "x": {"class_path": "pyro_hvae.kernels.Bernoulli", "init_args": {"net": linear}}}  # fmt: skip
    recipe = {"model": {"class_path": "pyro_hvae.TopDown", "init_args": chain},
              "guide": {"class_path": "pyro.infer.autoguide.AutoNormal", "args": ["$model"]}}  # fmt: skip
    model, guide = make_pair(**recipe)
    fit(model, guide, case.x, bound=TraceELBO(), steps=1, run_dir=case.run_dir.parent / "other", progress=False,
        factory=("pyro_hvae.cli.specs:make_pair", recipe), batch_size=None)  # fmt: skip


@pytest.mark.parametrize("record", [None, 3, "vae", [], {}, {"factory": 3, "args": {}}, {"factory": "vae", "args": []}])
def test_a_record_that_is_none_is_refused(case, record):
    case.factory(record)
    with pytest.raises(CheckpointError):
        load(case.run_dir)


def test_public_names_that_only_build_are_trusted_and_no_others():
    for name in ("pyro_hvae.models.hvae", "pyro_hvae:TopDown", "pyro_hvae.bounds.warm_up", "torch.nn.ReLU",
                 "torch.optim.Adam", "pyro.infer.autoguide.AutoNormal",
                 "pyro.infer.autoguide.init_to_mean"):  # fmt: skip
        assert is_trusted(name), name
    for name in ("", ".", ":", "vae", "pyro_hvae", "pyro_hvae:fit", "pyro_hvae.diagnose", "pyro_hvae.models.Any",
                 "pyro_hvae.models:_pair", "torch.nn.Module.apply", "torch.nn:modules", "torch.nn.utils.prune",
                 "torch.optim.lr_scheduler", "torch.optim:torch", "pyro.infer.autoguide:pyro",
                 "os.path.join"):  # fmt: skip
        assert not is_trusted(name), name


@pytest.mark.parametrize("name", ["evil.py:data", "evil:data", "evil.data", "os.system"])
@pytest.mark.parametrize("key", ["data", "held_out"])
@pytest.mark.parametrize("verb", ["evaluate", "diagnose"])
def test_data_that_a_run_names_is_not_run(case, capsys, name, key, verb):
    case.command(**({"data": "x.npy"} | {key: name}))
    assert main([verb, str(case.run_dir)]) == 2
    assert "would run" in capsys.readouterr().err
    assert not case.executed


def test_data_that_the_user_names_is_run(case, capsys):
    case.command(data=f"{case.file}:data")
    words = ["evaluate", str(case.run_dir), "--num-particles", "3"]
    assert main([*words, "--data", f"{case.file}:data"]) == 0
    case.marker.unlink()
    assert main([*words, "--force"]) == 2
    assert main([*words, "--force", "--trust"]) == 0
    capsys.readouterr()


CONFIGS = [
    "pair: os.system\npair_args: {command: touch executed}",
    "pair: evil.pair",
    "pair: 'evil.py:pair'",
    "pair: vae\npair_args: {event_shape: {class_path: evil.Net}}",
    "pair: vae\npair_args: {event_shape: [{deep: {object: evil.thing}}]}",
    "model: {class_path: evil.Net}\nguide: {class_path: evil.Net}",
    "model: 'evil.py:pair'\nguide: 'evil.py:pair'",
    "pair: vae\nbound: evil.Net",
    "pair: vae\nbound: {class_path: evil.Net}",
    "pair: vae\nbound: {class_path: Regularised, init_args: {bound: {class_path: evil.Net}}}",
    "pair: vae\noptimizer: evil.Net",
    "pair: vae\noptimizer: {class_path: evil.Net}",
    "pair: vae\noptimizer: os.system",
    "pair: vae\nheld_out: 'evil.py:data'",
    "pair: vae\ndata: 'evil.py:data'",
    "config: other.yaml",
    "pair: !!python/object/apply:os.system ['touch executed']",
    "!!python/object/apply:os.system ['touch executed']",
    "pair: !!python/name:evil.pair",
]


@pytest.mark.parametrize("text", CONFIGS)
@pytest.mark.parametrize("way", ["file", "inline", "equals"])
def test_yaml_calls_nothing_of_others(case, capsys, text, way):
    (case.file.parent / "other.yaml").write_text("pair: evil.pair")
    (case.file.parent / "c.yaml").write_text(text)
    where = ["--config", text] if way == "inline" else ["--config", "c.yaml"]
    where = ["--config=c.yaml"] if way == "equals" else where
    assert main(["fit", "out", "x.npy", "--steps", "1", "--no-progress", *where]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search("would call|would run|names another config file|is no YAML", line)
    assert not case.executed
    assert not (case.file.parent / "out").exists()


def test_yaml_of_others_with_trust(case, capsys):
    (case.file.parent / "c.yaml").write_text("pair: evil.pair")
    assert main(["fit", "out", "x.npy", "--steps", "1", "--no-progress", "--trust", "--config", "c.yaml"]) == 0
    assert case.executed


class Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_pickles_are_not_run(case, capsys):
    """In the trainer's state, in data, and in place of the weights."""
    marker = str(case.marker)
    last = files.latest(case.run_dir / "checkpoints")
    for name in ("state.pt", "weights.safetensors"):
        torch.save({"step": Runs(marker)}, last / name)
        sums = {part: files.digest(last / part) for part in ("state.pt", "weights.safetensors")}
        run = files.read_config(case.run_dir)["run"]
        (last / "checksums.json").write_text(json.dumps({"run": run, "sha256": sums}))
        with pytest.raises(CheckpointError):
            load(case.run_dir)
        with pytest.raises(CheckpointError):
            fit(*vae(6, 2, hidden=(5,)), case.x, bound=TraceELBO(), steps=3, run_dir=case.run_dir, resume=True)
    folder = case.file.parent
    torch.save(Runs(marker), folder / "d.pt")
    np.save(folder / "d.npy", np.array([Runs(marker)], dtype=object))
    np.savez(folder / "d.npz", x=np.array([Runs(marker)], dtype=object))
    with open(folder / "e.npy", "wb") as file:
        pickle.dump(Runs(marker), file)
    for name in ("d.pt", "d.npy", "d.npz", "e.npy"):
        assert main(["fit", "out", name, "--pair", "vae", "--pair_args.event_shape", "6", "--pair_args.latent_dim", "2",
                     "--steps", "1"]) == 2  # fmt: skip
        assert f"{name} is damaged, or no" in capsys.readouterr().err
    assert not case.executed


def test_a_stored_parameter_names_a_constraint_and_nothing_else(case):
    config = json.loads((case.run_dir / "config.json").read_text())
    weight = next(name for name in files.read_weights(files.latest(case.run_dir / "checkpoints")))
    names = ("__loader__", "__builtins__", "torch", "Callable", "warnings", "dependent_property", "register")
    real = {"name": "a", "constraint": {"class": "_Real", "arguments": {}}}
    records = [{"name": "a", "constraint": {"class": kind, "arguments": {}}} for kind in names] + [real, {}, 3]
    for record in records:
        changed = {key: value for key, value in config.items() if key != "sha256"} | {"store": {weight: record}}
        files.write_config(case.run_dir, changed)
        with pytest.raises(CheckpointError, match=r"is not one of torch|is damaged"):
            load(case.run_dir)
        assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize(
    "which", ["../../other", "..", ".", "", "/etc", "best/../../x", "step-1/..", "step-00000002/", ".lock", "\0"]
)
def test_which_names_a_checkpoint_and_no_path(case, which):
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load(case.run_dir, which=which)


def resumed(case, steps=3):
    torch.manual_seed(0)
    pyro.clear_param_store()
    return fit(*vae(6, 2, hidden=(5,)), case.x, bound=TraceELBO(), steps=steps, run_dir=case.run_dir, resume=True,
               progress=False)  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "history.jsonl", "checkpoints", ".lock"])
def test_links_out_of_the_directory_are_refused(case, name):
    outside = case.file.parent / "outside"
    path = case.run_dir / name
    path.rename(outside)
    path.symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else None
    with pytest.raises((CheckpointError, OSError), match=r"outside of|is in use|symbolic"):
        resumed(case)
    assert before is None or outside.read_bytes() == before


def test_links_of_temporary_files_and_outputs_are_not_followed(case, capsys):
    precious = case.file.parent / "precious"
    precious.write_text("mine")
    for name in (".history.jsonl.tmp", ".config.json.tmp", "evaluation.json", "samples.npz", "report.json",
                 "posterior.nc"):  # fmt: skip
        (case.run_dir / name).symlink_to(precious)
    resumed(case)
    for verb in ("evaluate", "sample", "diagnose"):
        assert main([verb, str(case.run_dir)]) == 2
        assert "pass --force to replace it" in capsys.readouterr().err
    assert main(["evaluate", str(case.run_dir), "--num-particles", "2", "--force"]) == 0
    assert main(["sample", str(case.run_dir), "--size", "2", "--force"]) == 0
    assert precious.read_text() == "mine"
    os.unlink(case.run_dir / "command.json")
    (case.run_dir / "command.json").symlink_to(precious)
    assert main(["evaluate", str(case.run_dir), "--force"]) == 2
    assert "outside of" in capsys.readouterr().err


def test_outputs_are_not_overwritten_without_force(case, capsys):
    (case.file.parent / "mine.npz").write_text("mine")
    (case.file.parent / "mine.png").write_text("mine")
    assert main(["sample", str(case.run_dir), "--out", "mine.npz"]) == 2
    assert main(["sample", str(case.run_dir), "--out", "new.npz", "--size", "2"]) == 0
    assert main(["sample", str(case.run_dir), "--out", "mine.npy", "--image_shape", "[2,3]"]) == 2
    assert (case.file.parent / "mine.npz").read_text() == (case.file.parent / "mine.png").read_text() == "mine"
    assert main(["evaluate", str(case.run_dir), "--num_particles", "2"]) == 0
    assert main(["evaluate", str(case.run_dir), "--num_particles", "2"]) == 2
    assert main(["diagnose", str(case.run_dir), "--num_draws", "0"]) == 2
