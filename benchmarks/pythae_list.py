"""pythae's models and the same ones here on MNIST, after equal processor time.

    python benchmarks/pythae_list.py [--data DIR] [--seconds 600] [--models vae vamp iwae miwae] [--rate 1e-3]
                                     [--images 1000] [--short] [--csv FILE]

pythae is no dependency of this project: install it in an environment of its own, beside this package.  Networks
784-512-16 and back with ReLU, pythae's defaults, on both sides; images are drawn anew from their grey values for each
batch of 100; one fused Adam, whose rate falls to zero as a cosine over the processor time that each cell has, compiling
included (one thread).  pythae trains by its own losses in a plain loop, this package by compiled steps.  ``iwae`` has
10 draws, ``miwae`` 4 bounds of 4 draws, ``vamp`` 100 pseudo-inputs, which start from data here.

Both are measured in the same way: minus log p(x) of the first test images, binarised once, by 5000 draws (nats).
pythae's networks are moved into a pair of this package for that.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pythae.models import IWAE, MIWAE, VAE, VAMP, IWAEConfig, MIWAEConfig, VAEConfig, VAMPConfig
from pythae_vae import ours
from tables import show, write
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.data import binarize, idx_folder
from pyro_hvae.kernels import VampPrior
from pyro_hvae.training.compile import compile_step

HERE = Path(__file__).resolve().parent
LATENT, DRAWS, BOUNDS, COMPONENTS, BATCH = 16, 10, 4, 100, 100
OPTIONS: dict[str, Any] = {"input_dim": (1, 28, 28), "latent_dim": LATENT, "reconstruction_loss": "bce"}
Train = Callable[[Tensor], object]


def theirs(name: str) -> nn.Module:
    """pythae's model."""
    if name == "vae":
        return VAE(VAEConfig(**OPTIONS))
    if name == "vamp":
        return VAMP(VAMPConfig(**OPTIONS, number_components=COMPONENTS, linear_scheduling_steps=0))
    if name == "iwae":
        return IWAE(IWAEConfig(**OPTIONS, number_samples=DRAWS))
    return MIWAE(MIWAEConfig(**OPTIONS, number_gradient_estimates=BOUNDS, number_samples=BOUNDS))


def as_pair(name: str, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """pythae's networks as model and guide."""
    top, guide = ours(model)
    if name == "vamp":
        with torch.no_grad():
            inputs = model.pseudo_inputs(model.idle_input).reshape(COMPONENTS, 784)
        top = ph.TopDown(z=VampPrior(guide.z, inputs), x=top.x)
    return top, guide


def pair(name: str, data: Tensor) -> tuple[nn.Module, nn.Module]:
    """What one would write here."""
    model, guide = ph.vae(784, LATENT, hidden=(512,), activation="relu")
    if name == "vamp":
        model = ph.TopDown(z1=VampPrior(guide.z1, data[:COMPONENTS]), x=model.x)
    return model, guide


def trained(step: Train, optimizer: torch.optim.Optimizer, data: Tensor, rate: float, until: float) -> int:
    """Make steps until the process has used so many seconds; return how many."""
    start, steps = time.process_time(), 0
    while True:
        for rows in torch.randperm(len(data)).split(BATCH):
            used = (time.process_time() - start) / max(1e-9, until - start)
            if used >= 1:
                return steps
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * used))
            step(binarize(data[rows]))
            steps += 1


def their_run(name: str, data: Tensor, options: argparse.Namespace) -> tuple[Any, int]:
    torch.manual_seed(0)
    until = time.process_time() + options.seconds
    model = theirs(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate, fused=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model({"data": x.reshape(-1, 1, 28, 28)}).loss.backward()
        optimizer.step()

    steps = trained(step, optimizer, data, options.rate, until)
    return as_pair(name, model.eval()), steps


def our_run(name: str, data: Tensor, options: argparse.Namespace) -> tuple[Any, int]:
    torch.manual_seed(0)
    until = time.process_time() + options.seconds
    model, guide = pair(name, data)
    bound = {"iwae": ph.IWELBO(DRAWS), "miwae": ph.IWELBO(BOUNDS)}.get(name, ph.TraceELBO())
    objective = bound(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=options.rate, fused=True)
    copies = BOUNDS if name == "miwae" else 1
    make = compile_step(objective, optimizer, binarize(data[:BATCH]).repeat(copies, 1))
    steps = trained(lambda x: make(x.repeat(copies, 1)), optimizer, data, options.rate, until)
    return (model.eval(), guide.eval()), steps


def nats(found: tuple[nn.Module, nn.Module], images: Tensor, draws: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = binarize(images)
        parts = [ph.log_evidence(*found, part, num_samples=draws, chunk_size=25).value for part in x.split(100)]
    return -torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "mnist")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--models", nargs="+", default=["vae", "vamp", "iwae", "miwae"])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--short", action="store_true", help="seconds of training, few images and draws")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    if options.short:
        options.seconds, options.images = 20.0, 50
    torch.set_num_threads(1)
    split = idx_folder(options.data)
    rows = []
    for name in options.models:
        row: dict[str, object] = {"model": name, "seconds": options.seconds}
        for who, run in (("pythae", their_run), ("this library", our_run)):
            found, steps = run(name, split.train, options)
            value = nats(found, split.test[: options.images], 200 if options.short else 5000)
            row |= {f"{who}: steps": steps, f"{who}: nats": f"{value.mean():.2f}"}
            row["s.e. over images"] = f"{value.std() / len(value) ** 0.5:.2f}"
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        write(options.csv, rows)
    print("\n" + show(rows))


if __name__ == "__main__":
    main()
