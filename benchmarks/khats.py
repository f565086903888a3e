"""Time of k-hats of many data: ArviZ row by row, and all rows at once.

    python benchmarks/khats.py [--data 10000] [--draws 1000] [--rounds 5] [--clock wall|cpu] [--csv FILE]

Log-weights are normal with a standard deviation of 2, in float64, draws first.  All candidates run on one thread and
take turns in each round; medians over the rounds.  ArviZ (``psislw``) always smooths the weights too; ours is timed
with smoothing (``psis``) and without (``pareto_khat``).  The largest difference of a k-hat from ArviZ's stands beside.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"  # before any library makes its threads

import torch
from arviz_stats.base import array_stats
from tables import show, write
from torch import Tensor

from pyro_hvae.weights import pareto_khat, psis


def by_row(log_weights: Tensor) -> Tensor:
    return torch.as_tensor(array_stats.psislw(-log_weights.numpy(), axis=0)[1])


CANDIDATES = {
    "ArviZ, row by row": by_row,
    "psis": lambda log_weights: psis(log_weights)[1],
    "pareto_khat": pareto_khat,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    torch.set_num_threads(1)
    log_weights = 2 * torch.randn(options.draws, options.data, dtype=torch.float64)
    for candidate in CANDIDATES.values():  # imports, caches
        candidate(log_weights[:, :100])
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    khats: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        for name, candidate in CANDIDATES.items():
            start = clock()
            khats[name] = candidate(log_weights)
            seconds[name].append(clock() - start)
    old, *_ = CANDIDATES
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {
            "k-hats": f"{options.data} data, {options.draws} draws",
            "by": name,
            "seconds": f"{medians[name]:.3f}",
            "times faster": f"{medians[old] / medians[name]:.1f}",
            "largest difference": f"{float((khats[name] - khats[old]).abs().max()):.1e}",
        }
        for name in CANDIDATES
    ]
    print(show(rows))
    write(options.csv, rows)


if __name__ == "__main__":
    main()
