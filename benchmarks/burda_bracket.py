"""The evidence of pairs that benchmarks/burda.py has trained, from both sides.

    python benchmarks/burda_bracket.py RUN [RUN ...] --data DIR [--images 100] [--chains 16] [--betas 1000] [--csv FILE]

For the first test images, binarised once, log p(x) by importance sampling with k = 5000, and by annealing from the
guide to the posterior and back; with real images the upper side is an estimate.  Then the same for as many images that
are simulated from the model, whose latents are exact draws of their posterior: there both sides are bounds, each with
1.96 standard errors over the chains.  Means over images in nats; runs with a moving average of the parameters are
evaluated with that.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch
from burda import pair
from tables import show, write
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.data import binarize, idx_folder


def brackets(name: str, model: Any, guide: Any, x: Tensor, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows for the images and for simulated ones."""
    latents, simulated = ph.Problem(model, guide)(x).simulate()
    rows = []
    for kind, images, draws in (("test", x, None), ("simulated", simulated.args[0], latents)):
        start = time.process_time()
        parts = [
            ph.log_evidence(model, guide, part, num_samples=5000, chunk_size=25).value for part in images.split(50)
        ]
        found = ph.evidence_sandwich(
            model, guide, images, posterior_samples=draws, num_chains=options.chains, betas=options.betas
        )
        rows.append({
            "run": name, "images": f"{len(images)} {kind}", "importance": f"{torch.cat(parts).mean():.2f}",
            "lower": f"{found.lower.mean():.2f}", "upper": f"{found.upper.mean():.2f}",
            "largest width": f"{found.width.max():.2f}",
            "upper is": "a bound" if found.upper_is_bound else "an estimate",
            "seconds": f"{time.process_time() - start:.0f}",
        })  # fmt: skip
        print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--betas", type=int, default=1000)
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    split = idx_folder(options.data)
    torch.manual_seed(0)
    x = binarize(split.test[: options.images])
    rows = []
    for run in options.runs:
        layers, k = map(int, re.findall(r"\d+", run.name)[:2])
        model, guide = pair(layers, split.train.mean(0))
        ph.load(run, programs=(model, guide), ema="recipe" in run.name)
        rows += brackets(f"L={layers}, k={k}", model, guide, x, options)
        write(options.csv, rows)
    print("\n" + show(rows))


if __name__ == "__main__":
    main()
