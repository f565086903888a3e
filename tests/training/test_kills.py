"""A run compiled by Inductor that is killed twenty times, and goes on bit for bit each time."""

import functools
import random

import pytest

from tests.training.runs import assert_same_end, end_of, train
from tests.training.test_checkpoint import KillAt, in_a_process


@pytest.mark.slow
def test_twenty_kills_of_one_run_compiled_by_inductor(tmp_path):
    """Each process goes on from the checkpoint before the kill, with graphs from Inductor's cache on disk."""
    steps = sorted(random.Random(6).sample(range(1, 40), 20))
    assert in_a_process(functools.partial(train, tmp_path / "whole", compile=True)) == 0
    for step in steps:
        killed = functools.partial(train, tmp_path / "killed", compile=True, callbacks=[KillAt(step)])
        assert in_a_process(killed) == -9
    assert in_a_process(functools.partial(train, tmp_path / "killed", compile=True)) == 0
    assert_same_end(end_of(tmp_path / "killed"), end_of(tmp_path / "whole"))
