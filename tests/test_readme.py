"""The README's example runs as it stands (for fewer epochs), and prints what it shows, numbers aside."""

import csv
import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


def test_example_runs_and_prints_what_is_shown(capsys):
    torch.set_default_dtype(torch.float32)
    (code,) = blocks("python")
    assert code.count("epochs=100") == 1
    exec(compile(code.replace("epochs=100", "epochs=1"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    shown = README.split(code)[1].split("```")[2].lstrip("\n")
    number = re.compile(r"-?\d+(\.\d+)?")
    assert number.sub("#", printed) == number.sub("#", shown)


def test_make_targets_that_are_named_exist():
    targets = re.findall(r"^([a-z-]+):", (Path(__file__).parent.parent / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z-]+)\b", "\n".join([*blocks(""), *re.findall(r"`([^`]*)`", README)]))
    assert named
    assert set(named) <= set(targets)


def test_pictures_and_files_that_are_shown_exist():
    root = Path(__file__).parent.parent
    assert re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(linked) > 10
    assert [path for path in linked if not (root / path).exists()] == []


def test_figures_of_the_comparison_are_the_measured_ones():
    """What the README says of Pyro's estimators and of speed stands in the tables that a command wrote."""
    results = Path(__file__).parent.parent / "docs" / "results"
    correctness = (results / "correctness.csv").read_text(encoding="utf-8")
    for figure in ["-34.2 ± 0.6", "-69.0", "-74.1 ± 0.6", "-2.42", "-1.91"]:
        assert figure in README
        assert figure in correctness
    with open(results / "step.csv", encoding="utf-8") as file:
        steps = {(row["case"], row["candidate"]): row["milliseconds"] for row in csv.DictReader(file)}
    for case in ("vae", "hvae2", "hvae5"):
        said = [steps[case, candidate] for candidate in ("pyro", "hand", "numpyro", "compiled")]
        assert [figure for figure in said if figure not in README] == [], case
