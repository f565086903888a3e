"""Seconds to compile a training step: the first process on a machine, and the next.

    python benchmarks/compile_times.py [--layers 1 2 5] [--rounds 1]

Each measurement is a process of its own that makes the step of ``step.py`` (784 pixels, hidden layers 200-200) with
``compile_step``.  The first of each round has an empty folder for Inductor's cache, the second finds what the first
left there.  Printed are the seconds of ``compile_step``, of the imports of torch, Pyro and this package before it, and
of the imports of Inductor inside it; by the clock and, in brackets, of the processors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings

LATENTS = {1: [50], 2: [100, 50], 5: [64, 32, 16, 8, 4]}
PIXELS, HIDDEN, BATCH = 784, (200, 200), 100
PARTS = ("packages", "inductor", "compile_step")


def processor_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(layers: int) -> dict[str, tuple[float, float]]:
    """Seconds by the clock and of the processors, by part, in this process."""
    marks = [(time.perf_counter(), processor_time())]

    def mark() -> None:
        marks.append((time.perf_counter(), processor_time()))

    import torch

    import pyro_hvae as ph
    from pyro_hvae.training import compile_step

    mark()
    import torch._inductor.compile_fx
    import torch.fx.experimental.symbolic_shapes

    import pyro_hvae.training.compile.passes

    mark()
    torch.manual_seed(0)
    objective = ph.TraceELBO()(*ph.hvae(PIXELS, LATENTS[layers], hidden=HIDDEN))
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3, fused=True)
    x = (torch.rand(BATCH, PIXELS) < 0.3).float()
    mark()
    step = compile_step(objective, optimizer, x)
    mark()
    step(x)
    spans = [tuple(b - a for a, b in zip(first, second, strict=True)) for first, second in itertools.pairwise(marks)]
    return dict(zip(PARTS, (spans[0], spans[1], spans[3]), strict=True))


def in_a_process(layers: int, cache: str) -> dict[str, tuple[float, float]]:
    command = [sys.executable, __file__, "--one", str(layers)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 5], choices=list(LATENTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", type=int, default=None, metavar="LAYERS", help="measure in this process")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one)))
        return
    for _ in range(options.rounds):
        for layers in options.layers:
            with tempfile.TemporaryDirectory() as cache:
                for which in ("first", "second"):
                    found = in_a_process(layers, cache)
                    shown = "  ".join(f"{name} {clock:.1f} s ({used:.1f})" for name, (clock, used) in found.items())
                    print(f"L={layers} {which:6s} {shown}", flush=True)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
