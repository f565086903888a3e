"""Every example runs as a user would run it, for a few steps, and leaves the picture that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LONG = {
    "distributed",
    "hierarchies",
    "lightning_trainer",
    "semi_supervised",
    "conditional",
    "vdm_digits",
    "diagnose",
    "masked_text",
    "multimodal",
}


def fills_in_better_than_at_random(numbers):
    """A model of why entries are missing beats one that takes them to be missing at random, also in the mean."""
    truth, _, at_random, mean_at_random, not_at_random, mean = numbers
    assert not_at_random < 0.8 * at_random
    assert abs(mean - truth) < 0.5 * abs(mean_at_random - truth)


def tells_labels_from_images(numbers):
    """A tenth would be chance; a label alone costs log 10 = 2.3 nats, and image and label more than the image."""
    assert numbers[-1] > 60.0
    both, image, label = numbers[0], numbers[4], numbers[8]
    assert both < image < label
    assert abs(label + 2.3) < 0.1


CLAIMS = {"not_at_random": fills_in_better_than_at_random, "multimodal": tells_labels_from_images}
SCRIPTS = [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem in LONG else [], id=path.stem)
    for path in sorted(EXAMPLES.glob("*.py"))
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_in_its_short_mode(script, tmp_path):
    if script.stem == "lightning_trainer":
        pytest.importorskip("lightning")
    # another folder than the repository's, so that nothing is found by chance and nothing is left behind
    out = tmp_path / "runs"
    run = subprocess.run(
        [sys.executable, str(script), "--short", "--out", str(out)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) >= 2  # a table
    if script.stem in CLAIMS:
        CLAIMS[script.stem]([float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", run.stdout)])
    named = re.findall(r"\b([a-z_]+\.(?:png|nc))\b", script.read_text().split('"""')[1])
    assert named
    for name in named:
        assert (out / name).stat().st_size > 1000


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_short(script):
    assert len(script.read_text().splitlines()) < 80


def test_all_are_shown_in_the_documentation():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    assert [path.name for path in sorted(EXAMPLES.glob("*.py")) if path.name not in page] == []
