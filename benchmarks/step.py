"""Milliseconds a training step, side by side in one process.

    python benchmarks/step.py [--layers 1 2 5] [--steps 100] [--compiled] [--csv FILE]

A VAE or hierarchical VAE on 784 binary pixels, batch 100, hidden layers 200-200; latents 50 (L=1), 100-50 (L=2) or
64-32-16-8-4 (L=5), bottom-up guide.  Measured in turns, medians over ``--steps`` rounds after 20 of warm-up:

- ``pyro``: ``pyro.infer.SVI.step`` with ``Trace_ELBO`` at Pyro's defaults (its validation on);
- ``svi``: the same with ``pyro_hvae.TraceELBO``;
- ``module``: ``TraceELBO()(model, guide)`` with one fused Adam;
- ``hand``: the same mathematics written out in torch, with one fused Adam;
- ``compiled``: ``pyro_hvae.compile_step`` of the module (with ``--compiled``).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_hvae as ph

LATENTS = {1: [50], 2: [100, 50], 5: [64, 32, 16, 8, 4]}
PIXELS = 784


def pair(layers: int, tag: str) -> tuple[nn.Module, nn.Module]:
    """Model and guide, with names of their own in the parameter store."""
    model, guide = ph.hvae(PIXELS, LATENTS[layers], hidden=(200, 200))
    model._pyro_name, guide._pyro_name = f"model_{tag}", f"guide_{tag}"
    for program in (model, guide):
        for name, child in program._modules.items():
            if hasattr(child, "_pyro_set_supermodule"):
                child._pyro_set_supermodule(f"{program._pyro_name}.{name}", program._pyro_context)
    return model, guide


def by_hand(layers: int) -> Callable[[Tensor], Tensor]:
    """The loss of the same model and guide without Pyro; parameters in ``.parameters``."""
    model, guide = pair(layers, "hand")
    widths = LATENTS[layers]
    upward = [guide.kernels[f"z{t + 1}"] for t in range(layers)]
    downward = [model.kernels[f"z{t + 1}"] for t in range(layers - 1)]
    decoder = model.kernels["x"].net

    def gaussian(kernel: nn.Module, parent: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = kernel.net(parent).chunk(2, -1)
        return loc, F.softplus(raw + kernel._shift) + kernel.min_scale

    def loss(x: Tensor) -> Tensor:
        below, log_q, log_p, draws = x, 0.0, 0.0, []
        for kernel in upward:
            loc, scale = gaussian(kernel, below)
            noise = torch.randn_like(loc)
            below = loc + scale * noise
            draws.append(below)
            log_q = log_q - (0.5 * noise**2 + scale.log()).sum(-1)
        log_p = log_p - 0.5 * (draws[-1] ** 2).sum(-1)
        for t, kernel in enumerate(downward):
            loc, scale = gaussian(kernel, draws[t + 1])
            log_p = log_p - (0.5 * ((draws[t] - loc) / scale) ** 2 + scale.log()).sum(-1)
        log_p = log_p - F.binary_cross_entropy_with_logits(decoder(draws[0]), x, reduction="none").sum(-1)
        return (log_q - log_p).sum()

    assert len(widths) == layers
    loss.parameters = [*model.parameters(), *guide.parameters()]  # type: ignore[attr-defined]
    return loss


def torch_step(loss: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Callable[[Tensor], object]:
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        optimizer.step()
        return value

    return step


def svi_step(bound: object, layers: int, tag: str) -> Callable[[Tensor], object]:
    model, guide = pair(layers, tag)
    return pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), bound).step


def candidates(layers: int, x: Tensor, compiled: bool) -> dict[str, Callable[[Tensor], object]]:
    pyro.clear_param_store()
    objective = ph.TraceELBO()(*pair(layers, "module"))
    objective(x)
    written = by_hand(layers)
    steps = {
        "pyro": svi_step(pyro.infer.Trace_ELBO(), layers, "pyro"),
        "svi": svi_step(ph.TraceELBO(), layers, "svi"),
        "module": torch_step(objective, list(objective.parameters())),
        "hand": torch_step(written, written.parameters),  # type: ignore[attr-defined]
    }
    if compiled:
        from pyro_hvae.compile import compile_step

        other = ph.TraceELBO()(*pair(layers, "compiled"))
        other(x)
        optimizer = torch.optim.Adam(other.parameters(), lr=1e-3, fused=True)
        steps["compiled"] = compile_step(other, optimizer, x)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 5], choices=sorted(LATENTS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = (torch.rand(options.batch, PIXELS) < 0.3).float()
    rows = []
    for layers in options.layers:
        steps = candidates(layers, x, options.compiled)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            for _ in range(20):
                step(x)
        for _ in range(options.steps):
            for name, step in steps.items():
                start = time.perf_counter()
                step(x)
                times[name].append(1e3 * (time.perf_counter() - start))
        medians = {name: statistics.median(found) for name, found in times.items()}
        for name, value in medians.items():
            rows.append((layers, name, value, value / medians["hand"], medians["pyro"] / value))
            print(
                f"L={layers} {name:9s} {value:7.2f} ms   {value / medians['hand']:5.2f} x hand   "
                f"{medians['pyro'] / value:5.2f} x faster than pyro",
                flush=True,
            )
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["layers", "method", "milliseconds", "times_hand", "faster_than_pyro"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
