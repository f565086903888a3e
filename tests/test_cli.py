"""The command line as a person meets it: each verb in a process of its own, on small data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.cli import main
from pyro_hvae.cli.specs import Redrawn, absolute, load_data, load_object, make, make_pair
from pyro_hvae.training import load

ROOT = Path(__file__).parent.parent

PROGRAMS = '''
import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from torch import nn


def data():
    generator = torch.Generator().manual_seed(0)
    return 3.0 + torch.randn(40, generator=generator)


def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("mean", dist.Normal(loc, scale))


def pairs():
    return torch.stack([data(), data() * 0.5], -1)


class Flow(nn.Module):
    """q(z | x) by a normalising flow from zuko."""

    def __init__(self):
        super().__init__()
        self.flow = zuko.flows.NSF(features=1, context=2, transforms=1, hidden_features=(8,))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(self.flow(x)))


def latent(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1), obs=x)


answer = 42
'''


def run(*words, cwd=None, code=0):
    """Run a verb in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pyro_hvae.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def programs(tmp_path):
    path = tmp_path / "programs.py"
    path.write_text(PROGRAMS)
    return path


@pytest.fixture
def images(tmp_path):
    x = torch.bernoulli(torch.linspace(0.1, 0.9, 6).expand(30, 6)).numpy()
    np.save(tmp_path / "x.npy", x)
    return tmp_path / "x.npy"


def test_every_verb_on_a_run_directory(tmp_path, images):
    config = tmp_path / "config.yaml"
    config.write_text(
        "pair: pyro_hvae.models.hvae\n"
        "pair_args: {event_shape: 6, latent_dims: [3, 2], hidden: [8]}\n"
        "bound: {class_path: IWELBO, init_args: {num_particles: 2}}\n"
        "optimizer: {class_path: Adam, init_args: {lr: 0.01}}\n"
        "steps: 10\nbatch_size: 10\nprogress: false\n"
    )
    out = run("fit", "run", images, "--config", config, cwd=tmp_path).stdout
    assert "run: 10 steps, loss" in out
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["bound"].startswith("IWELBO(num_particles=2")

    out = run("evaluate", "run", "--num_particles", 50, cwd=tmp_path).stdout
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["num_data"] == 30
    assert found["elbo"] <= found["iwelbo"] < 0
    assert set(found["terms"]) == {"reconstruction", "rate_z1", "kl_z2"}
    assert f"{found['iwelbo']:.4f}" in out
    run("evaluate", "run", "--num_particles", 50, cwd=tmp_path, code=2)
    again = run("evaluate", "run", "--num_particles", 50, "--force", cwd=tmp_path).stdout
    assert again == out

    out = run("sample", "run", "--size", 5, "--image_shape", "[2,3]", cwd=tmp_path).stdout
    with np.load(tmp_path / "run" / "samples.npz") as drawn:
        assert {name: drawn[name].shape for name in drawn.files} == {"z2": (5, 2), "z1": (5, 3), "x": (5, 6)}
        assert set(np.unique(drawn["x"])) <= {0.0, 1.0}
    picture = (tmp_path / "run" / "samples.png").read_bytes()
    width, height = (int.from_bytes(picture[start : start + 4]) for start in (16, 20))
    assert width > 4 * height  # five draws beside five data, in one row

    out = run("diagnose", "run", "--num_draws", 20, cwd=tmp_path).stdout
    assert "z1" in out
    assert (tmp_path / "run" / "posterior.nc").stat().st_size > 0

    out = run("fit", "run", images, "--config", config, "--steps", 20, "--resume", cwd=tmp_path).stdout
    assert "run: 20 steps" in out


def test_a_users_file_of_two_plain_functions(tmp_path, programs):
    where = f"{programs.name}:"
    out = run(
        "fit", "run", where + "data", "--model", where + "model", "--guide", where + "guide", "--bound", "TraceELBO",
        "--optimizer.lr", 0.05, "--steps", 400, "--batch-size", "null", "--no-progress",
        cwd=tmp_path,
    ).stdout  # fmt: skip
    assert "400 steps" in out
    assert "--trust" in run("evaluate", tmp_path / "run", cwd=tmp_path, code=2).stderr
    out = run("evaluate", tmp_path / "run", "--num_particles", 200, "--trust", cwd=tmp_path.parent).stdout
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    x = load_data(f"{programs}:data")[0].double()
    n, s2 = len(x), 100.0
    exact = torch.distributions.MultivariateNormal(torch.zeros(n), torch.eye(n) + s2 * torch.ones(n, n)).log_prob(x)
    assert found["elbo"] <= float(exact) + 0.05
    assert found["iwelbo"] == pytest.approx(float(exact), abs=0.2)
    assert "all data as one" in out
    run("sample", "run", "--trust", cwd=tmp_path)
    with np.load(tmp_path / "run" / "samples.npz") as drawn:
        assert drawn["x"].shape == (40,)


def test_a_users_file_with_a_flow_as_guide(tmp_path, programs):
    where = f"{programs}:"
    run(
        "fit", "run", where + "pairs", "--model", where + "latent", "--guide", where + "Flow", "--bound", "TraceELBO",
        "--steps", 5, "--progress", "false", cwd=tmp_path,
    )  # fmt: skip
    out = run("evaluate", "run", "--num_particles", 20, "--trust", cwd=tmp_path).stdout
    assert "40 data" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "run", "digits"], "name the programs either by pair, or by model and guide"),
        (["fit", "run", "digits", "--pair", "pyro_hvae.models.nothing"], "has no 'nothing'; it has"),
        (["fit", "run", "digits", "--pair", "programs.py:pair"], "no file"),
        (
            ["fit", "run", "digits", "--pair", "pyro_hvae.models.vae", "--binarize", "2 and 3"],
            "threshold in [0, 1], or random",
        ),
        (["evaluate", "nowhere"], "nowhere"),
        (["sample", "nowhere", "--size", "0"], "size must be >= 1, got 0"),
        (["demo", "--seconds", "0"], "seconds must be positive"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    if "models.vae" in " ".join(words):
        words = [*words, "--pair_args.event_shape", "64", "--pair_args.latent_dim", "2"]
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"pyro-hvae {words[0]}: ")
    assert message in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["fit", "run", "nowhere.npy", "--pair", "pyro_hvae.models.vae", "--steps", 1], "missing"),
        (["evaluate", "nowhere"], "nowhere"),
        (["sample", "nowhere"], "nowhere"),
        (["diagnose", "nowhere"], "nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_verb_leaves_with_code_2_and_one_line(tmp_path, words, what):
    (line,) = run(*words, cwd=tmp_path, code=2).stderr.strip().splitlines()
    assert line.startswith(f"pyro-hvae {words[0]}: ")
    assert what in line


@pytest.mark.slow
def test_demo_as_a_verb(tmp_path):
    out = run("demo", "--seconds", 0.2, "--out", "demo", "--progress", "false", cwd=tmp_path).stdout
    assert "written to demo" in out
    assert json.loads((tmp_path / "demo" / "results.json").read_text())


def test_grey_pixels_are_refused_in_one_line_and_debug_shows_the_traceback(tmp_path):
    np.save(tmp_path / "grey.npy", np.full((4, 6), 0.3))
    words = ["fit", "run", "grey.npy", "--pair", "pyro_hvae.models.vae", "--pair_args.event_shape", "6",
             "--pair_args.latent_dim", "2", "--steps", "3", "--progress", "false"]  # fmt: skip
    done = run(*words, cwd=tmp_path, code=2)
    assert "24 of 24" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("--debug", *words[:1], "other", *words[2:], cwd=tmp_path, code=1)
    assert "Traceback" in done.stderr


def small(*words):
    """Arguments of a fit of three steps."""
    return ["fit", "run", "x.npy", "--pair", "vae", "--pair_args.event_shape", "6", "--pair_args.latent_dim", "2",
            "--steps", "3", *words]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fitt", "run"], "there is no verb 'fitt' (did you mean 'fit'?)"),
        (small("--resum"), "there is no --resum (did you mean 'resume'?)"),
        (small("--bound", "IWEBLO"), "there is no bound 'IWEBLO' (did you mean 'IWELBO'?)"),
        (small("--optimizer", "Adm"), "there is no optimizer 'Adm' (did you mean 'Adam'?)"),
        (small("--bound", "IWELBO"), "num_particles"),
        (["fit", "run", "digits", "--pair", "vea", "--steps", "1"], "there is no pair 'vea' (did you mean 'vae'?)"),
        (["fit", "run", "digit", "--pair", "vae", "--steps", "1"], "latent_dim"),
        (["fit", "run"], "data"),
        (small("--lr", "-1"), "lr must be a positive number, got -1.0"),
        (small("--lr", "1", "--optimizer", "SGD"), "either by --lr, or by --optimizer.lr"),
        (small("--held_out", "digit"), "data can't be 'digit' (did you mean 'digits'?)"),
    ],
)
def test_what_is_missing_or_misspelt_is_told(folder, capsys, words, message):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (folder / "run").exists()


def test_switches_rates_and_short_names(folder, capsys):
    assert main(small("--lr", "0.5", "--no-progress")) == 0
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["settings"]["optimizer"]["groups"][0]["lr"] == 0.5
    assert config["factory"]["args"]["pair"] == "pyro_hvae.models.vae"
    assert main(small("--lr", "0.5", "--resume", "--steps", "4")) == 0
    assert capsys.readouterr().err.count("step 4 of 4: loss ") == 1
    assert main(["evaluate", "run", "--ema"]) == 2
    assert "no moving average" in capsys.readouterr().err


def test_a_run_that_was_interrupted_can_be_evaluated(folder, capsys, monkeypatch):
    from pyro_hvae.training import ConsoleLog

    def interrupt(self, run, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(ConsoleLog, "on_record", interrupt)
    assert main(small("--log_every", "2", "--checkpoint_every", "1")) == 130
    assert main(["evaluate", "run", "--num_particles", "5"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def pair(:\n", "line 1 stopped with SyntaxError"),
        ("import no_such_module\n", "line 1 stopped with ModuleNotFoundError"),
        ("x = {}\ny = x['key']\n", "line 2 stopped with KeyError"),
        ("def pair():\n    return {}['key']\n", "line 2: KeyError: 'key'"),
        ("def pair():\n    assert False\n", "line 2: AssertionError"),
        ("def pair():\n    def p(x):\n        return x.nothing\n    return p, p\n", "line 3: AttributeError"),
    ],
)
def test_errors_of_a_users_file_are_one_line_with_its_place(folder, capsys, content, message):
    (folder / "own.py").write_text(content)
    assert main(["fit", "run", "x.npy", "--pair", "own.py:pair", "--steps", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{folder / 'own.py'}, {message}" in line


def test_tables(folder, capsys):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [0.0, 1.0, 1.0], "b": [True, False, True]})
    frame.to_csv("t.csv", index=False)
    x, held_out = load_data("t.csv")
    assert x.tolist() == [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    assert held_out is None
    frame.assign(c=["u", "v", "w"]).to_csv("words.csv", index=False)
    frame.assign(b=[1.0, None, 0.0]).to_csv("gaps.csv", index=False)
    for name, message in (("words.csv", "columns ['c'] hold no numbers"), ("gaps.csv", "columns ['b'] are missing")):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_data(name)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_with_words_and_missing_entries_from_fit_to_diagnose(folder, capsys, suffix):
    pandas = pytest.importorskip("pandas")
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    draws = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    frame = pandas.DataFrame({"age": [None, *draws[1:]], "kind": ["u", "v", None, "v"] * 15})
    getattr(frame, f"to_{suffix}")(f"all.{suffix}", index=False)
    getattr(frame[:20], f"to_{suffix}")(f"some.{suffix}", index=False)
    fit = ["fit", "run", f"all.{suffix}", "--pair", "table_vae", "--pair_args.latent_dim", "2", "--steps", "3"]
    assert main([*fit, "--held_out", f"some.{suffix}", "--progress", "false"]) == 0
    assert main(["evaluate", "run", "--num_particles", "8"]) == 0
    assert json.loads(Path("run/evaluation.json").read_text())["num_data"] == 20
    assert main(["diagnose", "run", "--data", f"some.{suffix}", "--num_draws", "100", "--max_data", "5"]) == 0
    Path(f"all.{suffix}").unlink()
    model, guide = load("run")  # the run directory has the columns
    assert model.schema.names == ["age", "kind"]
    with torch.no_grad():
        assert TraceELBO().per_datum(model, guide, frame[:7]).shape == (7,)
    capsys.readouterr()
    assert main(["fit", "other", "x.npy", "--pair", "table_vae", "--steps", "1"]) == 2
    assert "name a file .csv or .parquet" in capsys.readouterr().err


def test_samples_of_a_model_with_a_context_have_contexts_of_the_data(folder, capsys):
    (folder / "own.py").write_text(
        "import pyro_hvae as ph\nfrom torch import nn\n"
        "def pair():\n"
        "    return (ph.TopDown(z=ph.StandardNormal(2), x=ph.Gaussian(nn.Linear(3, 2))),\n"
        "            ph.BottomUp(z=ph.Gaussian(nn.Linear(2, 4))))\n"
    )
    np.savez("d.npz", x=np.zeros((4, 1), dtype="float32"), context=np.array([[0.0], [1], [2], [3]], dtype="float32"))
    words = ["fit", "run", "d.npz", "--pair", "own.py:pair", "--steps", "1", "--bound", "TraceELBO"]
    assert main(words) == 0
    assert main(["sample", "run", "--trust", "--size", "6"]) == 0
    with np.load("run/samples.npz") as drawn:
        assert len(drawn["x"]) == 6


def test_unknown_flags_and_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--help"])
    assert caught.value.code == 0
    assert "--bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nonsense", "1"], "nonsense"),
        (["--bound", "Nonsense"], "Nonsense"),
        (["--bound", "IWELBO", "--bound.num_particles", "many"], "many"),
        (["--epochs", "few"], "few"),
    ],
)
def test_flags_that_say_nothing_are_named_in_one_line(capsys, words, message):
    assert main(["fit", "run", "digits", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("pyro-hvae fit: ")
    assert message in line


def test_print_config_is_a_config(tmp_path, images):
    words = ["fit", "run", images, "--pair", "pyro_hvae.models.vae", "--pair_args.event_shape", "6",
             "--pair_args.latent_dim", "2", "--steps", "3", "--bound", "IWELBO", "--bound.num_particles", "3",
             "--progress", "false"]  # fmt: skip
    text = run(*words, "--print_config", cwd=tmp_path).stdout
    assert not (tmp_path / "run").exists()
    (tmp_path / "c.yaml").write_text(text)
    assert "run: 3 steps" in run("fit", "run", images, "--config", "c.yaml", cwd=tmp_path).stdout
    assert "IWELBO(num_particles=3" in json.loads((tmp_path / "run" / "config.json").read_text())["bound"]


def test_random_binarisation_reaches_training_and_evaluation(tmp_path):
    np.save(tmp_path / "grey.npy", np.full((20, 6), 0.5))
    run("fit", "run", "grey.npy", "--pair", "pyro_hvae.models.vae", "--pair_args.event_shape", 6,
        "--pair_args.latent_dim", 2, "--steps", 3, "--binarize", "random", "--progress", "false",
        cwd=tmp_path)  # fmt: skip
    model, guide = load(tmp_path / "run")
    assert model.latents == ("z1",)
    assert guide(torch.zeros(2, 6, dtype=next(guide.parameters()).dtype))["z1"].shape == (2, 2)
    run("evaluate", "run", "--num_particles", 5, cwd=tmp_path)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["num_data"] == 20


def test_load_object_and_make(programs):
    assert load_object(f"{programs}:answer") == 42
    assert load_object("pyro_hvae.models:vae") is load_object("pyro_hvae.models.vae")
    with pytest.raises(ImportError, match="has no 'question'; it has"):
        load_object(f"{programs}:question")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_object("/nowhere/file.py:x")
    with pytest.raises(ImportError, match="can't import 'no_such_package'"):
        load_object("no_such_package.thing")
    net = make({"class_path": "pyro_hvae.nn.MLP", "init_args": {
        "in_features": 2, "out_features": 3, "hidden": [4], "activation": {"object": "torch.nn.ReLU"}}})  # fmt: skip
    assert net(torch.zeros(5, 2)).shape == (5, 3)
    with pytest.raises(ValueError, match="not among the objects"):
        make("$model")


def test_chains_and_autoguides_by_class_path():
    def linear(before, after):
        return {"class_path": "torch.nn.Linear", "args": [before, after]}

    model = {
        "class_path": "pyro_hvae.TopDown",
        "init_args": {
            "z": {"class_path": "pyro_hvae.kernels.StandardNormal", "args": [2]},
            "x": {"class_path": "pyro_hvae.kernels.Bernoulli", "init_args": {"net": linear(2, 5)}},
        },
    }
    bottom_up = {
        "class_path": "pyro_hvae.BottomUp",
        "init_args": {"z": {"class_path": "pyro_hvae.kernels.Gaussian", "init_args": {"net": linear(5, 4)}}},
    }
    auto = {"class_path": "pyro.infer.autoguide.AutoNormal", "args": ["$model"]}
    made, guide = make_pair(model=model, guide=bottom_up)
    assert guide(made(size=3))["z"].shape == (3, 2)
    made, guide = make_pair(model=model, guide=auto)
    x = torch.zeros(3, 5)
    assert guide(x)["z"].shape == (3, 2)
    with pytest.raises(ValueError, match="got \\['argument'\\]"):
        make({"class_path": "torch.nn.Linear", "argument": 3})


def test_make_pair_refuses():
    with pytest.raises(ValueError, match="either by pair, or by model and guide"):
        make_pair(pair="a", model="b", guide="c")
    with pytest.raises(ValueError, match=r"must return \(model, guide\), got float"):
        make_pair(pair="builtins.float")


def test_load_data(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 2)), context=np.arange(3))
    found, rest = load_data(str(tmp_path / "d.npz"))
    assert rest is None
    assert found["x"].dtype == torch.float64
    assert found["context"].tolist() == [0, 1, 2]
    torch.save((torch.zeros(3), torch.ones(3)), tmp_path / "d.pt")
    assert len(load_data(str(tmp_path / "d.pt"))[0]) == 2
    train, test = load_data("digits")
    assert len(train) == 1437
    assert len(test) == 360
    with pytest.raises(FileNotFoundError, match="no file"):
        load_data("nowhere.npy")
    with pytest.raises(ValueError, match="data can't be 'nothing'"):
        load_data("nothing")


def test_redrawn_keeps_everything_but_x():
    x, context = torch.full((4, 3), 0.5), torch.arange(4)
    batch = Redrawn()(x=x, context=context)
    assert set(batch["x"].unique().tolist()) <= {0.0, 1.0}
    assert batch["context"] is context
    first, second = Redrawn()(x, context)
    assert second is context
    assert not torch.equal(first, x)


def test_recorded_paths_hold_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a.py:b") == f"{tmp_path / 'a.py'}:b"
    assert absolute({"k": ["x.npy", 3]}) == {"k": [str(tmp_path / "x.npy"), 3]}
    assert absolute("idx:d") == f"idx:{tmp_path / 'd'}"
    assert absolute("pyro_hvae.models.vae") == "pyro_hvae.models.vae"
