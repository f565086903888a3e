"""Gap of importance weighting and of particles to log p(x) over the length of a sequence, at equal cost.

    python benchmarks/smc_gap.py [--out docs/figures] [--particles 100] [--lengths 10 20 50 100 200 500 1000]

The linear-Gaussian model and the mediocre filter of the page on sequences, in one dimension; the Kalman filter gives
log p(x).  ``SMCBound`` has ``--particles`` particles; ``IWELBO`` has as many as take the same processor time, found by
timing both at each length.  Gaps are means over ``--sequences`` sequences and 10 evaluations (100 up to T = 100).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tables import show, write
from torch import Tensor

import pyro_hvae as ph

matplotlib.use("Agg")


def pair() -> tuple[ph.StateSpace, ph.Filter]:
    one = torch.ones(1, 1)
    model = ph.StateSpace(
        initial=ph.LinearGaussian(0, 1),
        transition=ph.LinearGaussian(1, 1, weight=0.9 * one, scale=0.5),
        emission=ph.LinearGaussian(1, 1, weight=one, scale=0.8),
    )
    guide = ph.Filter(
        initial=ph.LinearGaussian(1, 1, weight=0.5 * one, scale=0.7),
        transition=ph.LinearGaussian(2, 1, weight=torch.tensor([[0.6, 0.2]]), scale=0.5),
    )
    return model, guide


def seconds(bound: Any, programs: tuple[Any, Any], x: Tensor, repeats: int = 3) -> float:
    """Processor time of one evaluation, the least of some."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        bound.per_datum(*programs, x)
        found.append(time.process_time() - start)
    return min(found)


def row(length: int, particles: int, size: int) -> dict[str, Any]:
    programs = pair()
    x = programs[0](size=size, steps=length).detach()
    exact = programs[0].log_marginal(x).detach()
    particle_bound = ph.SMCBound(particles)
    allowed = seconds(particle_bound, programs, x)
    count = particles
    for _ in range(3):  # the cost is not in proportion to K: a few corrections
        count = max(particles, round(count * allowed / seconds(ph.IWELBO(count), programs, x)))
    weighted = ph.IWELBO(count)
    gaps = {}
    repeats = 10 if length > 100 else 100
    for name, bound in (("IWELBO", weighted), ("SMCBound", particle_bound)):
        values = torch.stack([(exact - bound.per_datum(*programs, x)).mean() for _ in range(repeats)])
        gaps[name] = f"{float(values.mean()):.4g}"
    return {
        "T": length, "IWELBO K": count, "SMCBound K": particles, **gaps,
        "IWELBO s": f"{seconds(weighted, programs, x):.3f}", "SMCBound s": f"{allowed:.3f}",
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = figure.subplots()
    lengths = [one["T"] for one in rows]
    for name, style in (("IWELBO", "s-"), ("SMCBound", "o-")):
        axis.loglog(lengths, [float(one[name]) for one in rows], style, label=name)
    slope = float(rows[-1]["SMCBound"]) / lengths[-1]
    axis.loglog(lengths, [slope * length for length in lengths], ":", color="0.5", label="linear in T")
    axis.set_xlabel("steps T")
    axis.set_ylabel("log p(x) - bound, nats a sequence")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--particles", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 20, 50, 100, 200, 500, 1000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [row(length, options.particles, options.sequences) for length in options.lengths]
    write(options.out / "smc_gap.csv", rows)
    draw(rows, options.out / "smc_gap.png")
    print(show(rows))


if __name__ == "__main__":
    main()
