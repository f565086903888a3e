"""What ``fit`` costs besides the compiled step, and what feeding costs of an epoch.

    python benchmarks/feeding.py [--blocks 9] [--clock wall|cpu] [--csv FILE]

The VAE 784-200-200-50 at batch 100.  ``fit(..., compile=True)`` with its bar, records, checks for NaN and held terms
runs in blocks of 500 steps; after each block the same compiled step is called 500 times on one batch, in the same
thread, so both see the same machine.  Feeding: an epoch's batches of 60,000 images in memory, in a random order,
without a step; and the same from a memory map on disk.  Medians.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

if "cpu" in sys.argv:  # before any library makes its threads
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

import pyro_hvae as ph
from pyro_hvae.training.compile import compile_step
from pyro_hvae.training.feed import feed

BLOCK, BATCH, IMAGES = 500, 100, 60_000


class Alternate:
    """A callback that runs the bare step after each block of a run, and stops the run when all blocks are done."""

    def __init__(self, step: object, x: torch.Tensor, blocks: int, clock: object) -> None:
        self.step, self.x, self.blocks, self.clock = step, x, blocks, clock
        self.fit: list[float] = []
        self.bare: list[float] = []
        self.left = 0.0

    def on_step(self, run: object, loss: torch.Tensor) -> None:
        if run.step % BLOCK:
            return
        start = self.clock()
        if run.step > BLOCK:  # the first block compiles
            self.fit.append((start - self.left) / BLOCK)
            start = self.clock()
            for _ in range(BLOCK):
                self.step(self.x)
            self.bare.append((self.clock() - start) / BLOCK)
        if len(self.fit) == self.blocks:
            run.stop("measured")
        self.left = self.clock()


def fit_over_bare(x: torch.Tensor, blocks: int, clock: object) -> tuple[float, float]:
    """Seconds a step of ``fit`` and of the bare compiled step."""
    objective = ph.TraceELBO()(*ph.vae(784, 50))
    objective(x[:BATCH])
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3, fused=True)
    turns = Alternate(compile_step(objective, optimizer, x[:BATCH]), x[:BATCH], blocks, clock)
    import pyro

    pyro.clear_param_store()
    with tempfile.TemporaryDirectory() as run_dir:
        ph.fit(
            *ph.vae(784, 50), x, bound=ph.TraceELBO(), steps=(blocks + 2) * BLOCK, batch_size=BATCH, compile=True,
            run_dir=run_dir, callbacks=[turns],
        )  # fmt: skip
    return statistics.median(turns.fit), statistics.median(turns.bare)


def feeding(data: object, clock: object) -> float:
    """Seconds to hand out an epoch."""
    source = feed(data, batch_size=BATCH, seed=0)
    seconds = []
    for epoch in range(5):
        start = clock()
        for _ in source.epoch(epoch):
            pass
        seconds.append(clock() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    x = (torch.rand(IMAGES, 784) < 0.3).float()
    inside, bare = fit_over_bare(x, options.blocks, clock)
    epoch = bare * IMAGES / BATCH
    memory = feeding(x, clock)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        np.save(path, x.numpy())
        mapped = feeding(np.load(path, mmap_mode="r"), clock)
    rows = [
        ("fit, ms a step", 1e3 * inside, inside / bare),
        ("bare compiled step, ms", 1e3 * bare, 1.0),
        ("feeding an epoch from memory, s", memory, memory / epoch),
        ("feeding an epoch from a memory map, s", mapped, mapped / epoch),
    ]
    for what, figure, ratio in rows:
        print(f"{what:40s} {figure:9.3f}   {ratio:7.4f} x bare")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("what", "figure", "times_bare"), *rows])


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
