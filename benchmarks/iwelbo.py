"""One IWELBO step with K = 50 at batch 100 against a hand-written torch loop, in turns, medians.

    python benchmarks/iwelbo.py [--particles 50] [--steps 40]
    python benchmarks/iwelbo.py --memory

With ``--memory``: how far the process grows for ``per_datum`` at K = 5000 and batch 100, for several chunk sizes, each
in a process of its own.

The model is the one-layer VAE of Burda, Grosse and Salakhutdinov (2016): 784-200-200, 50 latents.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import pyro_hvae as ph


def growth(chunk_size: int) -> float:
    """How many MB the peak of this process grows by."""
    model, guide = ph.vae(784, 50)
    x = (torch.rand(100, 784) < 0.3).float()
    bound = ph.IWELBO(5000, chunk_size=chunk_size)
    ph.TraceELBO().per_datum(model, guide, x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bound.per_datum(model, guide, x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.memory:
        for chunk_size in (64, 256, 1024):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(f"K=5000, chunk_size={chunk_size}: {pool.apply(growth, (chunk_size,)):.0f} MB", flush=True)
        return
    x = (torch.rand(100, 784) < 0.3).float()
    objective = ph.IWELBO(options.particles)(*ph.vae(784, 50))
    objective(x)
    model, guide = ph.vae(784, 50)
    encoder, decoder = guide.kernels["z1"], model.kernels["x"].net

    def by_hand() -> Tensor:
        loc, raw = encoder.net(x).chunk(2, -1)
        scale = F.softplus(raw + encoder._shift) + encoder.min_scale
        noise = torch.randn(options.particles, *loc.shape)
        z = loc + scale * noise
        log_q = -(0.5 * noise**2 + scale.log()).sum(-1)
        log_p = -0.5 * (z**2).sum(-1)
        logits = decoder(z)
        log_p = log_p - F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return -((log_p - log_q).logsumexp(0) - math.log(options.particles)).sum()

    steps = {}
    for name, loss, parameters in (
        ("ours", lambda: objective(x), list(objective.parameters())),
        ("hand", by_hand, [*model.parameters(), *guide.parameters()]),
    ):
        optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

        def step(loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.steps + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(
        f"IWELBO K={options.particles}, batch 100: ours {medians['ours']:.1f} ms, by hand {medians['hand']:.1f} ms, "
        f"ratio {medians['ours'] / medians['hand']:.3f}"
    )


if __name__ == "__main__":
    main()
