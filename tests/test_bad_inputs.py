"""Bad inputs are refused in a sentence of this library: over the public surface, and on the command line."""

import os
import traceback
import warnings

import numpy as np
import pyro
import pytest
import torch

import pyro_hvae
from pyro_hvae.cli import main
from tests.bad_inputs import CALLS
from tests.bad_statistics import STATISTICS

CALLS = CALLS | STATISTICS

ROOT = os.path.dirname(pyro_hvae.__file__)
EXPECTED = (ValueError, TypeError, ImportError, OSError, RuntimeError)


def answer(call, argument, value):
    """How a call answers a bad value: clear if a ``raise`` of this library does, silent if nothing does, else raw."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**{argument: value})
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        own = last.filename.startswith(ROOT) and (last.line or "").startswith("raise")
        return "clear" if own and isinstance(error, EXPECTED) else f"raw {type(error).__name__}: {error}"
    return "silent"


def test_there_are_many():
    """Each of them is refused clearly, none is taken in silence, and none fails in another library."""
    assert sum(len(values) for _, arguments in CALLS.values() for values in arguments.values()) >= 1200


@pytest.mark.parametrize("name", STATISTICS)
def test_the_call_of_an_entry_works(name):
    """What is refused is the bad value, not the call."""
    torch.set_default_dtype(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        STATISTICS[name][0]()


@pytest.mark.parametrize("name", CALLS)
def test_bad_inputs_get_a_clear_answer(name):
    torch.set_default_dtype(torch.float32)
    call, arguments = CALLS[name]
    for argument, values in arguments.items():
        for value in values:
            pyro.clear_param_store()
            torch.manual_seed(0)
            assert answer(call, argument, value) == "clear", f"{name}({argument}={value!r})"


FIT = ["fit", "out", "x.npy", "--pair", "vae", "--pair_args.event_shape", "6", "--pair_args.latent_dim", "2"]
VALUES = {
    "steps": ("0", "-1", "2.5", "many", "nan"),
    "epochs": ("0", "-1", "2.5", "many"),
    "batch_size": ("0", "-3", "2.5", "all"),
    "lr": ("0", "-1", "nan", "inf", "fast"),
    "clip_norm": ("0", "-1", "nan", "inf", "no"),
    "ema": ("1", "-0.1", "nan", "much"),
    "seed": ("-1", "2.5", "x"),
    "log_every": ("0", "-1", "x"),
    "terms_every": ("0", "-1", "x"),
    "checkpoint_every": ("0", "-1", "x"),
    "binarize": ("2", "-0.5", "nan", "half"),
    "held_out": ("nowhere.npy", "empty.npy", "x.txt"),
    "bound": ("ELBO", "3", "IWELBO", "torch.nn.Linear"),
    "optimizer": ("Admm", "3", "torch.nn.Linear"),
    "resume": ("maybe",),
    "compile": ("maybe",),
    "pair": ("hvea", "nowhere.py:x", "no.module", "pyro_hvae.models.nothing", "math.pi", "os.getcwd"),
}
DATA = ("broken.npy", "broken.npz", "broken.pt", "broken.csv", "d", "idx:nowhere", "empty.npy", "words.npy", "nan.npy",
        "")  # fmt: skip
CONFIGS = ("nowhere.yaml", "broken.yaml", "list.yaml", "unknown.yaml")
LINES = [
    [],
    ["train"],
    ["fit"],
    ["fit", "out"],
    ["fit", "out", "x.npy"],
    ["fit", "out", "x.npy", "--steps"],
    ["fit", "x.npy", "x.npy", *FIT[3:], "--steps", "1"],
    *([*FIT[:2], name, *FIT[3:], "--steps", "1"] for name in DATA),
    *([*FIT, "--steps", "1", "--config", name] for name in CONFIGS),
    *([verb, name] for verb in ("evaluate", "sample", "diagnose") for name in ("nowhere", "x.npy", "broken", "")),
    ["evaluate", "run", "--num_particles", "0"],
    ["evaluate", "run", "--chunk_size", "0"],
    ["evaluate", "run", "--which", "../run"],
    ["evaluate", "run", "--which", "best"],
    ["evaluate", "run", "--ema"],
    ["evaluate", "run", "--data", "nowhere.npy"],
    ["evaluate", "run", "--data", "empty.npy"],
    ["evaluate", "run", "--num_particels", "3"],
    ["sample", "run", "--size", "0"],
    ["sample", "run", "--size", "many"],
    ["sample", "run", "--out", "."],
    ["sample", "run", "--image_shape", "[2]"],
    ["sample", "run", "--image_shape", "[5,5]"],
    ["diagnose", "run", "--num_draws", "0"],
    ["diagnose", "run", "--max_data", "-1"],
    ["demo", "--seconds", "-1"],
    ["demo", "--seconds", "nan"],
    ["demo", "--seconds", "long"],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_default_dtype(torch.float32)
    path = tmp_path_factory.mktemp("bad")
    x = np.ones((8, 6), dtype="float32")
    np.save(path / "x.npy", x)
    np.save(path / "empty.npy", x[:0])
    np.save(path / "words.npy", np.array(["a", "b"]))
    np.save(path / "nan.npy", x * np.nan)
    for name in ("broken.npy", "broken.npz", "broken.pt", "x.txt"):
        (path / name).write_bytes(b"GIF89a and more")
    (path / "broken.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    (path / "broken.yaml").write_text("a: [1")
    (path / "list.yaml").write_text("- 1\n- 2\n")
    (path / "unknown.yaml").write_text("stepz: 3\n")
    (path / "broken").mkdir()
    (path / "broken" / "config.json").write_text("{")
    here = os.getcwd()
    os.chdir(path)
    try:
        assert main([*FIT[:1], "run", *FIT[2:], "--steps", "2", "--no-progress"]) == 0
    finally:
        os.chdir(here)
    return path


def told(words, folder, monkeypatch, capsys):
    """Assert exit code 2 and one line, which is no traceback and not a word of another library alone."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(folder)
    pyro.clear_param_store()
    assert main(list(words)) == 2, words
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("pyro-hvae")
    assert "Traceback" not in line
    assert len(line) > 30, line
    assert not (folder / "out" / "history.jsonl").exists()


@pytest.mark.parametrize("flag", VALUES)
def test_flags_with_bad_values(folder, monkeypatch, capsys, flag):
    for value in VALUES[flag]:
        line = [*FIT, f"--{flag}={value}"]
        told(line if flag in ("steps", "epochs") else [*line, "--steps", "1"], folder, monkeypatch, capsys)


@pytest.mark.parametrize("words", LINES, ids=lambda words: " ".join(words)[:60] or "nothing")
def test_lines_that_say_nothing(folder, monkeypatch, capsys, words):
    told(words, folder, monkeypatch, capsys)
