"""What a training step of a diffusion costs, as the number of layers T grows: time and memory.

    python benchmarks/diffusion_cost.py [--noise gaussian|absorbing|uniform] [--rounds 60] [--trace-rounds 3]
        [--clock wall|cpu] [--csv FILE] [--short]

One step is the loss by the module route (``bound(model, guide)``), its gradient and Adam, on a batch of 100 vectors of
64 numbers (or, under discrete noise, bits), with a residual network of 128.  Candidates take turns in one process and
one thread; medians over the rounds.

- ``DiffusionELBO`` at T = 10, 1000, 100,000 and in continuous time;
- ``TraceELBO`` on the programs of T = 10 and T = 1000 themselves, every layer a site.

Memory is what the graph of one step keeps for its gradient, and the peak of the process, in a child process for each
candidate, after a step.  ``--clock cpu`` measures the processor time of the one thread, which other users of the
machine disturb less.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch makes its threads
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import LearnedSchedule
from pyro_hvae.models import discrete_diffusion, vdm
from pyro_hvae.nn import DenoisingMLP, TokenMLP

WIDTH, BATCH = 64, 100

Loss = Callable[[], Tensor]


def candidate(noise: str, bound: str, num_layers: int | None) -> tuple[Loss, Callable[[], None]]:
    """The loss of one batch, and a whole step."""
    torch.manual_seed(0)
    model: Any
    guide: Any
    if noise == "gaussian":
        model, guide = vdm(
            DenoisingMLP(WIDTH), event_shape=WIDTH, num_layers=num_layers, schedule=LearnedSchedule(-10.0, 5.0)
        )
        x = torch.randn(BATCH, WIDTH)
    else:
        net = TokenMLP(WIDTH, 2)
        model, guide = discrete_diffusion(
            net, event_shape=WIDTH, num_categories=2, num_layers=num_layers, corruption=noise
        )
        x = torch.randint(0, 2, (BATCH, WIDTH))
    whole = ph.TraceELBO(gradient="pathwise" if noise == "gaussian" else "score")
    objective = (DiffusionELBO() if bound == "DiffusionELBO" else whole)(model, guide)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def loss() -> Tensor:
        return objective(x)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return loss, step


def kept(loss: Loss) -> int:
    """Bytes that the graph of the loss keeps for its gradient, parameters included."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss()
    del value
    return sum(storages.values())


def memory(noise: str, bound: str, num_layers: int | None) -> tuple[float, float]:
    """(MB kept by the graph, MB at the peak of a process of its own)."""
    command = [sys.executable, __file__, "--noise", noise, "--peak-of", bound, str(num_layers)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(found[0]), float(found[1])


def peak(noise: str, bound: str, num_layers: int | None) -> None:
    loss, step = candidate(noise, bound, num_layers)
    step()
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():  # Linux has a new process inherit the peak of its parent in the line above, and not here
        most = 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    print(kept(loss) / 1e6, most / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", choices=["gaussian", "absorbing", "uniform"], default="gaussian")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--trace-rounds", type=int, default=3, help="of TraceELBO at T = 1000, at a second each")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        bound, layers = options.peak_of
        return peak(options.noise, bound, None if layers == "None" else int(layers))
    if options.short:
        options.rounds, options.trace_rounds = 8, 1
    clock = time.perf_counter if options.clock == "wall" else time.process_time

    cases: list[tuple[str, int | None]] = [("DiffusionELBO", layers) for layers in (10, 1000, 100_000, None)]
    cases += [("TraceELBO", 10), ("TraceELBO", 1000)]
    steps = {case: candidate(options.noise, *case)[1] for case in cases}
    times: dict[tuple[str, int | None], list[float]] = {case: [] for case in cases}
    for case, step in steps.items():
        for _ in range(0 if case == ("TraceELBO", 1000) else 5):  # nobody needs to warm up for a second
            step()
    every = max(1, options.rounds // options.trace_rounds)
    for number in range(options.rounds):
        for case, step in steps.items():
            if case == ("TraceELBO", 1000) and number % every:
                continue
            start = clock()
            step()
            times[case].append(clock() - start)
    medians = {case: 1e3 * statistics.median(found) for case, found in times.items()}

    rows = []
    print(f"{'bound':14s} {'T':>8s} {'ms a step':>11s} {'steps':>6s} {'graph MB':>9s} {'peak MB':>8s}")
    for case in cases:
        graph, most = memory(options.noise, *case)
        layers = "inf" if case[1] is None else str(case[1])
        print(f"{case[0]:14s} {layers:>8s} {medians[case]:11.3f} {len(times[case]):6d} {graph:9.2f} {most:8.1f}")
        rows.append([case[0], layers, f"{medians[case]:.4f}", len(times[case]), f"{graph:.3f}", f"{most:.1f}"])
    of = {layers: medians["DiffusionELBO", layers] for layers in (10, 1000)}
    print(f"\nT = 1000 against T = 10: {of[1000] / of[10]:.3f} times the time")
    print(f"TraceELBO against DiffusionELBO at T = 1000: {medians['TraceELBO', 1000] / of[1000]:.0f} times the time")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["bound", "T", "ms", "steps", "graph_MB", "peak_MB"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
