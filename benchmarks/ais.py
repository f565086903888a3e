"""Annealed importance sampling over many data at once against the same sampler in a loop, and the bracket it gives.

    python benchmarks/ais.py [--images 256] [--chains 4] [--betas 20] [--rounds 3] [--csv FILE]
    python benchmarks/ais.py --bracket [--images 100] [--chains 16] [--betas 200] [--csv FILE]

The model is a VAE of 8x8 digits (64-100-100, 8 latents), trained for a minute.  With ``--bracket`` the images are
simulated from it, so that their latents are exact posterior draws and both sides of the bracket are bounds in
expectation.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.data import binarize, digits
from pyro_hvae.evidence import anneal


def trained(seconds: float) -> tuple[object, object, Tensor]:
    """A VAE of binary digits after so many seconds of training, and the digits."""
    torch.manual_seed(0)
    x = binarize(digits().train, threshold=0.5)
    model, guide = ph.vae(64, 8, hidden=(100, 100))
    objective = ph.TraceELBO()(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3, fused=True)
    start = time.process_time()
    while time.process_time() - start < seconds:
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            (objective(x[rows]) / len(rows)).backward()
            optimizer.step()
    return model, guide, x


def speed(options: argparse.Namespace) -> list[dict[str, object]]:
    model, guide, x = trained(options.train)
    rows = []
    for count in (options.images // 16, options.images // 4, options.images):
        data = x[:count]
        whole, looped = [], []
        for round_ in range(options.rounds):
            start = time.perf_counter()
            anneal(model, guide, data, num_chains=options.chains, betas=options.betas)
            whole.append(time.perf_counter() - start)
            if round_ == 0 or count < options.images:  # the whole loop over all images once: it takes minutes
                start = time.perf_counter()
                for image in data.split(1):
                    anneal(model, guide, image, num_chains=options.chains, betas=options.betas)
                looped.append(time.perf_counter() - start)
        at_once, in_turn = statistics.median(whole), statistics.median(looped)
        rows.append(
            {
                "images": count,
                "chains": options.chains,
                "temperatures": options.betas,
                "at once s": round(at_once, 3),
                "loop s": round(in_turn, 2),
                "ratio": round(in_turn / at_once, 1),
            }
        )
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def bracket(options: argparse.Namespace) -> list[dict[str, object]]:
    model, guide, x = trained(options.train)
    latents, simulated = ph.Problem(model)(x[: options.images]).simulate()
    (images,) = simulated.args
    rows = []
    for betas in (options.betas // 4, options.betas):
        start = time.process_time()
        found = ph.evidence_sandwich(
            model, guide, images, posterior_samples=latents, num_chains=options.chains, betas=betas
        )
        cost = time.process_time() - start
        importance = ph.log_evidence(model, guide, images, num_samples=5000)
        rows.append(
            {
                "images": options.images,
                "chains": options.chains,
                "temperatures": betas,
                "lower": round(float(found.lower.mean()), 3),
                "upper": round(float(found.upper.mean()), 3),
                "mean width": round(float(found.width.mean()), 3),
                "largest width": round(float(found.width.max()), 3),
                "cpu s a datum": round(cost / options.images, 3),
                "IW 5000": round(float(importance.value.mean()), 3),
                "ELBO": round(float(ph.TraceELBO(100).per_datum(model, guide, images).mean()), 3),
            }
        )
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bracket", action="store_true")
    parser.add_argument("--images", type=int)
    parser.add_argument("--chains", type=int)
    parser.add_argument("--betas", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=float, default=60.0, help="seconds of processor time")
    parser.add_argument("--short", action="store_true", help="few images and temperatures, seconds of training")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    defaults = (100, 16, 200) if options.bracket else (256, 4, 20)
    if options.short:
        options.train, options.rounds, defaults = 3.0, 1, (16, 4, 8)
    for name, value in zip(("images", "chains", "betas"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    rows = bracket(options) if options.bracket else speed(options)
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
