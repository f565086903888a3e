"""The memory of long runs stays flat: batches of changing sizes, Python floats that change, thousands of steps."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MOST = 20.0
"""Megabytes that the resident memory may grow by after the warm-up."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fit", "compile_step"])
def test_three_thousand_steps(kind):
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.memory", kind, "3000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before > 100
    assert after - before < MOST
