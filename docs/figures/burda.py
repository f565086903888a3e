"""How far the networks of Burda et al. come on MNIST, over processor hours, beside the published figures.

    python docs/figures/burda.py [--results docs/results] [--out docs/figures]

Draws burda.png from burda.csv (the authors' stages) and burda_recipe.csv (the schedule of this package), which
``benchmarks/burda.py`` writes.  The curves are of the first 1000 test images, the published figures of all 10,000, on
which a trained pair is worse by what the tables have for the pair that was measured on both; the published lines are
lowered by that.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {1: "#4477aa", 5: "#cc6677", 50: "#228833"}
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curves(rows: list[Row], hours: str) -> dict[tuple[int, int, str], list[tuple[float, float]]]:
    """Points (hours, nats) of each run by (layers, k, what came before)."""
    found: dict[tuple[int, int, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["images"] == "1000" and row["draws"] == "1000" and row["bound"] == "iwelbo" and not row.get("pair"):
            key = int(row["layers"]), int(row["k"]), row.get("recipe", "") + row.get("before", "")
            found.setdefault(key, []).append((float(row[hours]) / 3600, float(row["nll"])))
    return found


def offset(rows: list[Row]) -> float:
    """Nats by which all images are worse than the first 1000, of the runs that were measured on both."""
    last: dict[tuple[str, ...], float] = {}
    differences = []
    for row in rows:
        key = tuple(row[name] for name in ("layers", "k", "recipe", "before", "epochs"))
        if row["images"] == "1000":
            last[key] = float(row["nll"])
        else:
            differences.append(float(row["nll"]) - last[key])
    return sum(differences) / len(differences)


def draw(stages: list[Row], recipe: list[Row], path: Path) -> None:
    shift = offset(recipe)
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axis, layers in zip(figure.subplots(1, 2, sharey=True), (1, 2), strict=True):
        for rows, hours, line in ((stages, "train_seconds", "--"), (recipe, "cpu_seconds", "-")):
            for (own, k, _), points in curves(rows, hours).items():
                if own == layers:
                    axis.plot(*zip(*sorted(points), strict=True), line, color=COLOURS[k], marker="o", markersize=3)
        published = {}
        for rows, name in ((stages, "published_8_stages"), (recipe, "published")):
            published |= {int(r["k"]): float(r[name]) for r in rows if int(r["layers"]) == layers and r[name]}
        for k, value in published.items():
            axis.axhline(value - shift, color=COLOURS[k], linestyle=":", linewidth=1)
            axis.annotate(f"published, k={k}", (0.0025, value - shift + 0.05), fontsize=7, color=COLOURS[k])
        axis.set_xscale("log")
        axis.set_ylim(82.0, 98.0)
        axis.set_xlim(0.002, 3.0)
        axis.set_xlabel("processor hours of training")
        axis.set_title("one layer of latents" if layers == 1 else "two layers", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if layers == 1:
            axis.set_ylabel("nats an image (first 1000)")
            for k, colour in COLOURS.items():
                axis.plot([], [], color=colour, label=f"k = {k}")
            axis.plot([], [], "-", color="0.4", label="own schedule")
            axis.plot([], [], "--", color="0.4", label="the authors' first stages")
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--results", type=Path, default=here.parent / "results")
    parser.add_argument("--out", type=Path, default=here)
    options = parser.parse_args()
    draw(read(options.results / "burda.csv"), read(options.results / "burda_recipe.csv"), options.out / "burda.png")


if __name__ == "__main__":
    main()
