"""Two gloo processes, one of which gets a signal, is killed or is stopped: both end, and the run can be resumed."""

import functools
import os
import random
import signal
import time

import pyro
import pytest
import torch

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.models import hvae
from pyro_hvae.training import checkpoint as files
from pyro_hvae.training import fit
from tests.processes import FAILED, in_two_ranks, start_ranks

pytest.importorskip("lightning_fabric")

LIMIT = 60.0
"""Seconds within which all processes must have ended."""


class Slow:
    """Steps that take some milliseconds; a file says that this process trains."""

    def __init__(self, seconds=0.01, fail_at=None):
        self.seconds, self.fail_at = seconds, fail_at

    def on_step(self, run, loss):
        time.sleep(self.seconds)
        if run.step == 5:
            (run.run_dir / f"trains-{run.ranks.rank}").touch()
        if run.step == self.fail_at and run.ranks.rank == 1:
            raise KeyError("this callback fails on one process")


def train(fabric, run_dir, *, steps=100_000, fail_at=None, every=20):
    torch.manual_seed(4)
    pyro.clear_param_store()
    model, guide = hvae((6,), [3, 2], hidden=(5,))
    x = torch.arange(192).reshape(32, 6).remainder(2).to(torch.get_default_dtype())
    return fit(
        model, guide, x, bound=TraceELBO(), steps=steps, batch_size=8, fabric=fabric, run_dir=run_dir, seed=3,
        resume=True, progress=False, log_every=7, callbacks=[Slow(fail_at=fail_at)], checkpoint_every=every,
    )  # fmt: skip


def end_after(tmp_path, act, **options):
    """Start two processes, let ``act(processes)`` send signals when both train; exit codes and seconds."""
    ranks = start_ranks(functools.partial(train, run_dir=tmp_path, **options), tmp_path)
    try:
        until = time.monotonic() + LIMIT
        while not all((tmp_path / f"trains-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < until
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.02)
        begin = time.monotonic()
        act(ranks)
        for process in ranks:
            process.join(max(begin + LIMIT - time.monotonic(), 0.0))
        seconds = time.monotonic() - begin
        assert not any(process.is_alive() for process in ranks), f"alive after {LIMIT} s"
        return [process.exitcode for process in ranks], seconds
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()


def message(folder, rank):
    return (folder / f"stderr-{rank}").read_text()


def resumes(run_dir, *, at_least=5):
    """Whether one process, and two, go on from the last checkpoint."""
    last = files.latest(run_dir / "checkpoints")
    files.verify(last)
    step = files.read_state(last)["step"]
    assert step >= at_least
    assert train(None, run_dir, steps=step + 2).steps == step + 2
    in_two_ranks(functools.partial(train, run_dir=run_dir, steps=step + 4))
    return step


def send(number, delays):
    """Send a signal to the ranks that have a delay, after it."""

    def act(ranks):
        begin = time.monotonic()
        for rank, delay in sorted(delays.items(), key=lambda item: item[1]):
            time.sleep(max(begin + delay - time.monotonic(), 0.0))
            os.kill(ranks[rank].pid, number)

    return act


def signal_to_one(tmp_path, number, rank):
    codes, seconds = end_after(tmp_path, send(number, {rank: 0.0}), every=10**6)
    assert codes == [128 + number if number == signal.SIGTERM else 0] * 2
    resumes(tmp_path)
    return seconds


def signal_to_both(tmp_path, number, delay, first):
    codes, _ = end_after(tmp_path, send(number, {first: 0.0, 1 - first: delay}), every=10**6)
    # a signal that comes when fit has saved and returned has its usual effect
    good = {128 + signal.SIGTERM, -signal.SIGTERM} if number == signal.SIGTERM else {0, 1, -signal.SIGINT}
    assert set(codes) <= good
    resumes(tmp_path)


def killed(tmp_path, rank):
    codes, _ = end_after(tmp_path, send(signal.SIGKILL, {rank: 0.0}), every=10**6)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == FAILED
    told = message(tmp_path, 1 - rank)
    assert f"process {rank} (" in told
    assert "has ended" in told
    assert "is saved: resume=True goes on from there" in told
    resumes(tmp_path)


def stopped(tmp_path, rank):
    codes, seconds = end_after(tmp_path, send(signal.SIGSTOP, {rank: 0.0}), every=10**6)
    assert codes[1 - rank] == FAILED
    assert codes[rank] in (FAILED, -signal.SIGKILL)
    assert "LostProcessError" in message(tmp_path, 1 - rank)
    assert "is stopped" in message(tmp_path, 1 - rank)
    resumes(tmp_path)
    return seconds


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    assert signal_to_one(tmp_path, signal.SIGTERM, 1) < 20


def test_a_killed_process_ends_the_other_with_a_checkpoint(tmp_path):
    killed(tmp_path, 0)


def test_an_error_in_one_process_ends_the_other(tmp_path):
    codes, _ = end_after(tmp_path, lambda ranks: None, fail_at=9)
    assert codes == [FAILED, FAILED]
    assert "this callback fails on one process" in message(tmp_path, 1)
    assert "LostProcessError" in message(tmp_path, 0)
    resumes(tmp_path)


REPEATS = range(10)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_ten_signals_to_one(tmp_path, number, repeat):
    signal_to_one(tmp_path, number, repeat % 2)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_ten_signals_to_both(tmp_path, number, repeat):
    delay = random.Random(repeat).uniform(0.0, 0.1) if repeat else 0.0
    signal_to_both(tmp_path, number, delay, repeat % 2)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", REPEATS)
def test_ten_kills_of_one(tmp_path, repeat):
    killed(tmp_path, repeat % 2)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", REPEATS)
def test_ten_stops_of_one(tmp_path, repeat):
    stopped(tmp_path, repeat % 2)
