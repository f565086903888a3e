"""Runs that are killed, interrupted, or out of disk, and files that are no checkpoints."""

import functools
import itertools
import os
import random
import resource
import shutil
import signal

import pyro
import pytest
import torch

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.models import hvae
from pyro_hvae.training import CheckpointError, fit, load
from pyro_hvae.training import checkpoint as files
from tests.processes import in_a_process
from tests.training.runs import assert_same_end, end_of, quiet, train


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
    stopped = functools.partial(train, tmp_path / "stopped", callbacks=[KillAt(18, number)])
    assert in_a_process(stopped) == code
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


class Starve:
    def on_step(self, run, loss):
        if run.step == 10:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def starve(run_dir):
    try:
        train(run_dir, callbacks=[Starve()])
    except OSError as error:
        told = "could not write checkpoint" in str(error) and "step-00000008" in str(error)
        os._exit(3 if told else 4)


def test_a_full_disk_leaves_the_last_checkpoint_good(tmp_path):
    train(tmp_path / "whole")
    assert in_a_process(functools.partial(starve, tmp_path / "full")) == 3
    directory = tmp_path / "full" / "checkpoints"
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000004", "step-00000008"]
    train(tmp_path / "full")
    assert_same_end(end_of(tmp_path / "full"), end_of(tmp_path / "whole"))


@pytest.fixture
def run_dir(tmp_path):
    train(tmp_path, steps=8)
    return tmp_path


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_damaged_checkpoints_are_refused_by_name(run_dir, name, damage):
    for directory in files.checkpoints(run_dir / "checkpoints"):
        path = directory / name
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
    with pytest.raises(CheckpointError, match=name):
        load(run_dir)


def test_another_architecture_is_refused_and_nothing_changed(tmp_path):
    def run(latents, steps):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = hvae((6,), latents, hidden=(5,))
        before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
        x = torch.arange(360).reshape(60, 6).remainder(2).to(torch.get_default_dtype())
        try:
            fit(model, guide, x, bound=TraceELBO(), steps=steps, run_dir=tmp_path, resume=True, ema=0.9, seed=1,
                schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50), **quiet)  # fmt: skip
        finally:
            after = [*model.parameters(), *guide.parameters()]
            unchanged.append(all(torch.equal(a, b) for a, b in zip(after, before, strict=True)))

    unchanged = []
    run([3, 2], 2)
    with pytest.raises(CheckpointError, match=r"weights.safetensors is of another architecture.*in the program"):
        run([4, 2], 3)
    assert unchanged == [False, True]


def test_other_arguments_are_refused(run_dir):
    with pytest.raises(CheckpointError, match=r"schedule was torch\S+CosineAnnealingLR, and is None now"):
        train(run_dir, schedule=None)


def test_a_run_is_not_overwritten(run_dir):
    model, guide = hvae((6,), [3, 2], hidden=(5,))
    with pytest.raises(FileExistsError, match="resume=True"):
        fit(model, guide, torch.rand(60, 6).round(), bound=TraceELBO(), steps=9, run_dir=run_dir, **quiet)
