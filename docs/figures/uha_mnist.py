"""The bound of trained annealing on MNIST as training goes on, beside the figures of the authors of UHA.

    python docs/figures/uha_mnist.py [--results docs/results] [--out docs/figures]

Draws uha_mnist.png from uha_mnist_curve.csv and uha_mnist.csv, which ``benchmarks/uha_mnist.py`` writes.  The curves
are of the first 1000 test images; the last point of each K, a square, and the published lines are of all 10,000.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {1: "#4477aa", 8: "#cc6677", 16: "#228833"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(curve: list[dict[str, str]], table: list[dict[str, str]], path: Path) -> None:
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axis, start = figure.subplots(), 0.0
    for row in table:
        k, colour = int(row["K"]), COLOURS[int(row["K"])]
        points = [(start + float(r["hours"]), float(r["bound"])) for r in curve if int(r["K"]) == k]
        axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=f"K = {k}")
        start += float(row["processor hours"])
        axis.plot([start], [float(row["test bound"])], "s", color=colour, markersize=6)
        axis.axhline(float(row["UHA's bound"]), color=colour, linestyle=":", linewidth=1)
        axis.annotate(f"UHA, K = {k}", (0.01, float(row["UHA's bound"])), fontsize=8, color=colour, va="bottom")
    axis.set_xlabel("processor hours since the VAE was trained")
    axis.set_ylabel("nats an image")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--results", type=Path, default=here.parent / "results")
    parser.add_argument("--out", type=Path, default=here)
    options = parser.parse_args()
    results = options.results
    draw(read(results / "uha_mnist_curve.csv"), read(results / "uha_mnist.csv"), options.out / "uha_mnist.png")


if __name__ == "__main__":
    main()
