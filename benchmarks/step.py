"""Time of a training step, each candidate in a process of its own, in turns.

    python benchmarks/step.py [--cases vae hvae2 hvae5 iwae5 iwae50] [--only NAME ...] [--rounds 5] [--steps 200]
                              [--csv FILE]

Binary images of 784 pixels, batch 100, hidden layers 200-200 (tanh); latents 50 (L=1), 100-50 (L=2) or 64-32-16-8-4
(L=5), bottom-up guide.  In each round every candidate runs once, in a process that does nothing else: a warm-up, then
``--steps`` steps, of which the median is taken.  Printed are the medians over the rounds, and their ratios:

- ``floor``: the matrix products of the step alone, forward and backward, with the shapes and layouts that the loss has;
- ``pyro``: ``pyro.infer.SVI.step`` with ``Trace_ELBO`` at Pyro's defaults (its validation on), for K=1;
- ``svi``: the same with the bound of this package;
- ``module``: ``bound(model, guide)`` with one fused Adam;
- ``hand``: the same mathematics written out in torch, with one fused Adam;
- ``compiled``: ``compile_step`` of the module; ``fused``: with noise drawn inside of the kernels;
- ``many``: as ``fused``, 10 steps a call;
- ``fit``: ``fit(..., compile=True)``, a step with its batch and bar (records and checks: ``feeding.py``);
- ``numpyro``, ``scan``: ``svi.update`` jitted, and 10 of them in one ``lax.scan`` (if NumPyro is there).

Compiled graphs come from Inductor's cache on disk after the first round.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_hvae as ph
from pyro_hvae.training.compile import compile_step

HERE = Path(__file__).resolve().parent
LATENTS = {1: [50], 2: [100, 50], 5: [64, 32, 16, 8, 4]}
CASES = {"vae": (1, 1), "hvae2": (2, 1), "hvae5": (5, 1), "iwae5": (1, 5), "iwae50": (1, 50)}
CANDIDATES = ["floor", "pyro", "svi", "module", "hand", "compiled", "fused", "many", "fit", "numpyro", "scan"]
PIXELS, HIDDEN, BATCH, SCANNED = 784, (200, 200), 100, 10
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)

Step = Callable[[], object]


def pair(layers: int, tag: str) -> tuple[nn.Module, nn.Module]:
    """Model and guide, with names of their own in the parameter store."""
    model, guide = ph.hvae(PIXELS, LATENTS[layers], hidden=HIDDEN)
    for program, name in ((model, f"model_{tag}"), (guide, f"guide_{tag}")):
        program._pyro_set_supermodule(name, program._pyro_context)
    return model, guide


def by_hand(layers: int, particles: int) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """The loss of the same model and guide without Pyro, and its parameters."""
    model, guide = pair(layers, "hand")
    upward = [guide.kernels[f"z{t + 1}"] for t in range(layers)]
    downward = [model.kernels[f"z{t + 1}"] for t in range(layers - 1)]
    decoder = model.kernels["x"].net

    def gaussian(kernel: nn.Module, parent: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = kernel.net(parent).chunk(2, -1)
        return loc, F.softplus(raw + kernel._shift) + kernel.min_scale

    def loss(x: Tensor) -> Tensor:
        below: Tensor = x
        log_w: Tensor | float = 0.0
        draws = []
        for index, kernel in enumerate(upward):
            loc, scale = gaussian(kernel, below)
            shape = (particles, *loc.shape) if index == 0 and particles > 1 else loc.shape
            noise = torch.randn(shape)
            below = loc + scale * noise
            draws.append(below)
            log_w = log_w + (0.5 * noise**2 + scale.log()).sum(-1)
        log_w = log_w - 0.5 * (draws[-1] ** 2).sum(-1)
        for t, kernel in enumerate(downward):
            loc, scale = gaussian(kernel, draws[t + 1])
            log_w = log_w - (0.5 * ((draws[t] - loc) / scale) ** 2 + scale.log()).sum(-1)
        logits = decoder(draws[0])
        log_w = log_w - F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return -(torch.logsumexp(log_w, 0) if particles > 1 else log_w).sum()

    return loss, [*model.parameters(), *guide.parameters()]


def torch_step(loss: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> Step:
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        optimizer.step()
        return value

    return step


def svi_step(bound: object, layers: int, tag: str, x: Tensor) -> Step:
    svi = pyro.infer.SVI(*pair(layers, tag), pyro.optim.Adam({"lr": 1e-3}), bound)
    return lambda: svi.step(x)


class Products(TorchDispatchMode):
    """Record the two factors of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            left, right = (torch.empty_strided(t.shape, t.stride()).normal_() for t in args[-2:])
            self.factors.append((left, right))
        return func(*args, **(kwargs or {}))


def floor(loss: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """The products that the loss and its gradient contain, each into memory of its own."""
    with Products() as seen:
        loss(x).backward()
    calls = [(left, right, left @ right) for left, right in seen.factors]

    def step() -> None:
        for left, right, out in calls:
            torch.matmul(left, right, out=out)

    return step


def fit_times(layers: int, particles: int, x: Tensor, steps: int) -> list[float]:
    """Seconds from step to step of ``fit``."""
    ends: list[float] = []

    class Clock:
        def on_step(self, run: ph.training.Run, loss: Tensor) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as run_dir:
        ph.fit(
            *pair(layers, "fit"), x.repeat(60, 1), bound=bound(particles), steps=steps + 51, batch_size=len(x),
            compile=True, run_dir=run_dir, callbacks=[Clock()],
        )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(ends[50:])]


def bound(particles: int) -> ph.TraceELBO | ph.IWELBO:
    return ph.TraceELBO() if particles == 1 else ph.IWELBO(particles)


def make(name: str, layers: int, particles: int, x: Tensor) -> tuple[Step, int, float]:
    """A candidate's step, how many training steps a call of it makes, and the seconds that compiling took."""
    if name == "floor":
        return floor(by_hand(layers, particles)[0], x), 1, 0.0
    if name in ("pyro", "svi"):
        loss = pyro.infer.Trace_ELBO() if name == "pyro" else bound(particles)
        return svi_step(loss, layers, name, x), 1, 0.0
    if name == "hand":
        return torch_step(*by_hand(layers, particles), x), 1, 0.0
    if name in ("numpyro", "scan"):
        from numpyro_steps import numpyro_steps

        return numpyro_steps(x.numpy(), LATENTS[layers], HIDDEN, particles, SCANNED)[name], (
            SCANNED if name == "scan" else 1
        ), 0.0
    objective = bound(particles)(*pair(layers, name))
    objective(x)
    if name == "module":
        return torch_step(objective, list(objective.parameters()), x), 1, 0.0
    options: dict[str, Any] = {} if name == "compiled" else {"noise": "fused"}
    if name == "many":
        options["steps"] = SCANNED
        x = torch.stack([x.roll(i, 0) for i in range(SCANNED)])
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3, fused=True)
    compiled = compile_step(objective, optimizer, x, **options)
    return (lambda: compiled(x)), SCANNED if name == "many" else 1, compiled.seconds


def measure(case: str, name: str, steps: int) -> dict[str, float]:
    """Median milliseconds of a step, in this process."""
    torch.manual_seed(0)
    x = (torch.rand(BATCH, PIXELS) < 0.3).float()
    layers, particles = CASES[case]
    if name == "fit":
        return {"milliseconds": 1e3 * statistics.median(fit_times(layers, particles, x, steps)), "compile_seconds": 0.0}
    step, count, seconds = make(name, layers, particles, x)
    for _ in range(max(3, 50 // count)):
        step()
    times = []
    for _ in range(max(1, steps // count)):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) / count)
    return {"milliseconds": 1e3 * statistics.median(times), "compile_seconds": seconds}


def in_a_process(case: str, name: str, steps: int) -> dict[str, float] | None:
    """The same in a process of its own; None where it fails, with the last line of its error."""
    command = [sys.executable, __file__, "--one", case, name, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{case} {name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def wanted(options: argparse.Namespace) -> list[tuple[str, str]]:
    names = options.only or CANDIDATES
    return [(case, name) for case in options.cases for name in names if not (name == "pyro" and CASES[case][1] > 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["vae", "hvae2", "hvae5"], choices=list(CASES))
    parser.add_argument("--only", nargs="+", default=None, choices=CANDIDATES, help="all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--csv", default=None)
    parser.add_argument("--one", nargs=2, default=None, metavar=("CASE", "NAME"), help="measure in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.steps)))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for round_ in range(options.rounds):
        for case, name in wanted(options):
            one = in_a_process(case, name, options.steps)
            if one is not None:
                found.setdefault((case, name), []).append(one)
        print(f"round {round_ + 1} of {options.rounds}", file=sys.stderr, flush=True)
    middle = {key: statistics.median(one["milliseconds"] for one in rounds) for key, rounds in found.items()}
    rows = []
    for (case, name), rounds in found.items():
        value, seconds = middle[case, name], [one["compile_seconds"] for one in rounds]
        others = [other for other in ("floor", "pyro", "scan") if (case, other) in middle]
        ratios = "  ".join(f"{value / middle[case, other]:5.2f} x {other}" for other in others)
        compiling = f"  compiled in {seconds[0]:.1f} s, then {seconds[-1]:.1f} s" if any(seconds) else ""
        spread = [one["milliseconds"] for one in rounds]
        print(f"{case:7s} {name:9s} {value:8.3f} ms ({min(spread):.3f} to {max(spread):.3f})  {ratios}{compiling}")
        rows.append((case, name, f"{value:.3f}", f"{seconds[0]:.1f}", f"{seconds[-1]:.1f}"))
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "candidate", "milliseconds", "first_compile_seconds", "compile_seconds"])
            writer.writerows(rows)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
