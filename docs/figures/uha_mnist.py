"""The bound of trained annealing on MNIST as training goes on, beside the figures of the authors of UHA.

    python docs/figures/uha_mnist.py [--results docs/results] [--out docs/figures]

Draws uha_mnist.png from uha_mnist_curve.csv, whose rows ``benchmarks/uha_mnist.py`` writes: the bound on the first 1000
test images after every fifth epoch.  Published figures are for all 10,000, on which a trained pair is worse by 1.2
nats; their lines are raised by that.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {1: "#4477aa", 8: "#cc6677", 16: "#228833"}
LINES = {"relu": "-", "relu, longer": "--", "silu": "-"}
PUBLISHED = {1: -93.4, 8: -89.8, 16: -88.8}
SHIFT = 1.2


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(curve: list[dict[str, str]], path: Path) -> None:
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axis, activation in zip(figure.subplots(1, 2, sharey=True), ("relu", "silu"), strict=True):
        for run in dict.fromkeys(r["run"] for r in curve if r["run"].startswith(activation)):
            for stage in dict.fromkeys((r["stage"], int(r["K"])) for r in curve if r["run"] == run):
                rows = [r for r in curve if r["run"] == run and (r["stage"], int(r["K"])) == stage]
                points = [(60 * float(r["hours"]), float(r["bound"])) for r in rows]
                axis.plot(*zip(*points, strict=True), LINES[run], color=COLOURS[stage[1]], marker="o", markersize=3)
        for k, value in PUBLISHED.items():
            if k > 1:
                axis.axhline(value + SHIFT, color=COLOURS[k], linestyle=":", linewidth=1)
                axis.annotate(f"UHA, K = {k}", (0.5, value + SHIFT), fontsize=8, color=COLOURS[k], va="bottom")
        axis.set_title({"relu": "ReLU", "silu": "SiLU"}[activation], fontsize=10)
        axis.set_xlabel("processor minutes of a stage")
        axis.set_xlim(0, 39)
        axis.spines[["top", "right"]].set_visible(False)
        if activation == "relu":
            axis.set_ylabel("nats an image (first 1000)")
            for k, colour in COLOURS.items():
                axis.plot([], [], color=colour, label=f"K = {k}")
            axis.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--results", type=Path, default=here.parent / "results")
    parser.add_argument("--out", type=Path, default=here)
    options = parser.parse_args()
    draw(read(options.results / "uha_mnist_curve.csv"), options.out / "uha_mnist.png")


if __name__ == "__main__":
    main()
