"""Time of a training step, side by side in one process.

    python benchmarks/step.py [--cases vae hvae2 hvae5 iwae5 iwae50] [--rounds 100] [--clock wall|cpu] [--csv FILE]

Binary images of 784 pixels, batch 100, hidden layers 200-200 (tanh); latents 50 (L=1), 100-50 (L=2) or 64-32-16-8-4
(L=5), bottom-up guide.  Candidates take turns; medians over the rounds, after a warm-up:

- ``pyro``: ``pyro.infer.SVI.step`` with ``Trace_ELBO`` at Pyro's defaults (its validation on), for K=1;
- ``svi``: the same with the bound of this package;
- ``module``: ``bound(model, guide)`` with one fused Adam;
- ``hand``: the same mathematics written out in torch, with one fused Adam;
- ``compiled``: ``compile_step`` of the module; ``fused``: with noise drawn inside of the kernels;
- ``many``: as ``fused``, ``--scanned`` steps a call;
- ``fit``: ``fit(..., compile=True)``, a step with its batch and bar (records and checks: ``feeding.py``);
- ``numpyro``, ``scan``: ``svi.update`` jitted, and ``--scanned`` of them in one ``lax.scan`` (if NumPyro is there).

``--clock cpu`` measures the processor time of one thread instead, which other users of the machine disturb less.
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
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
if "cpu" in sys.argv:  # before any library makes its threads
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import pyro  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import pyro_hvae as ph  # noqa: E402
from pyro_hvae.training.compile import compile_step  # noqa: E402

LATENTS = {1: [50], 2: [100, 50], 5: [64, 32, 16, 8, 4]}
CASES = {"vae": (1, 1), "hvae2": (2, 1), "hvae5": (5, 1), "iwae5": (1, 5), "iwae50": (1, 50)}
PIXELS, HIDDEN = 784, (200, 200)

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


def candidates(
    layers: int, particles: int, x: Tensor, scanned: int, wanted: set[str] | None
) -> Iterator[tuple[str, Step, int, float]]:
    """Name, step, how many training steps a call makes, seconds to compile."""

    def want(name: str) -> bool:
        return wanted is None or name in wanted

    def bound() -> ph.TraceELBO | ph.IWELBO:
        return ph.TraceELBO() if particles == 1 else ph.IWELBO(particles)

    def compiled(tag: str, **options: object) -> tuple[Callable[..., Tensor], float]:
        objective = bound()(*pair(layers, tag))
        objective(x)
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3, fused=True)
        example = torch.stack([x.roll(i, 0) for i in range(scanned)]) if "steps" in options else x
        step = compile_step(objective, optimizer, example, **options)
        return (lambda: step(example)), step.seconds

    pyro.clear_param_store()
    if particles == 1 and want("pyro"):
        yield "pyro", svi_step(pyro.infer.Trace_ELBO(), layers, "pyro", x), 1, 0.0
    if want("svi"):
        yield "svi", svi_step(bound(), layers, "svi", x), 1, 0.0
    if want("module"):
        objective = bound()(*pair(layers, "module"))
        objective(x)
        yield "module", torch_step(objective, list(objective.parameters()), x), 1, 0.0
    if want("hand"):
        yield "hand", torch_step(*by_hand(layers, particles), x), 1, 0.0
    if want("compiled"):
        step, seconds = compiled("compiled")
        yield "compiled", step, 1, seconds
    if want("fused"):
        step, seconds = compiled("fused", noise="fused")
        yield "fused", step, 1, seconds
    if want("many"):
        step, seconds = compiled("many", noise="fused", steps=scanned)
        yield "many", step, scanned, seconds
    if want("numpyro") or want("scan"):
        try:
            from numpyro_steps import numpyro_steps
        except ImportError as error:
            print(f"without NumPyro: {error}", file=sys.stderr)
            return
        for name, step in numpyro_steps(x.numpy(), LATENTS[layers], HIDDEN, particles, scanned).items():
            if want(name):
                yield name, step, scanned if name == "scan" else 1, 0.0


class Driver:
    """A callback of ``fit`` that lets the other candidates take their turns between two of its steps."""

    def __init__(self, turns: Callable[[], None], rounds: int, clock: Callable[[], float]) -> None:
        self.turns, self.rounds, self.clock = turns, rounds, clock
        self.times: list[float] = []
        self.left = 0.0

    def on_step(self, run: ph.training.Run, loss: Tensor) -> None:
        if run.step > 20:
            self.times.append(1e3 * (self.clock() - self.left))
            self.turns()
        if len(self.times) == self.rounds:
            run.stop("measured")
        self.left = self.clock()


def drive(bound: object, layers: int, x: Tensor, driver: Driver) -> None:
    with tempfile.TemporaryDirectory() as run_dir:
        ph.fit(
            *pair(layers, "fit"), x.repeat(60, 1), bound=bound, steps=driver.rounds + 100, batch_size=len(x),
            compile=True, run_dir=run_dir, callbacks=[driver],
        )  # fmt: skip


def measure(options: argparse.Namespace) -> Iterator[tuple[str, str, float, float]]:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    x = (torch.rand(options.batch, PIXELS) < 0.3).float()
    wanted = set(options.only) if options.only else None
    for case in options.cases:
        layers, particles = CASES[case]
        made = list(candidates(layers, particles, x, options.scanned, wanted))
        times: dict[str, list[float]] = {name: [] for name, *_ in made}
        for _, step, count, _ in made:
            for _ in range(max(3, 20 // count)):
                step()

        def turns(made: list = made, times: dict[str, list[float]] = times) -> None:
            for name, step, count, _ in made:
                start = clock()
                step()
                times[name].append(1e3 * (clock() - start) / count)

        if wanted is None or "fit" in wanted:
            driver = Driver(turns, options.rounds, clock)
            drive(ph.TraceELBO() if particles == 1 else ph.IWELBO(particles), layers, x, driver)
            made.append(("fit", lambda: None, 1, 0.0))
            times["fit"] = driver.times
        else:
            for _ in range(options.rounds):
                turns()
        for name, _, _, seconds in made:
            yield case, name, statistics.median(times[name]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:4], choices=list(CASES))
    parser.add_argument("--only", nargs="+", default=None, help="candidates to measure; all by default")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--scanned", type=int, default=10, help="steps in one call of 'many' and 'scan'")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    rows = []
    by_case: dict[str, dict[str, float]] = {}
    for case, name, milliseconds, seconds in measure(options):
        found = by_case.setdefault(case, {})
        found[name] = milliseconds
        ratios = "  ".join(
            f"{milliseconds / found[other]:5.2f} x {other}" for other in ("pyro", "hand") if other in found
        )
        compiling = f"  compiled in {seconds:.0f} s" if seconds else ""
        print(f"{case:7s} {name:9s} {milliseconds:8.3f} ms  {ratios}{compiling}", flush=True)
        rows.append((case, name, f"{milliseconds:.2f}", f"{seconds:.0f}"))
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "candidate", "milliseconds", "compile_seconds"])
            writer.writerows(rows)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
