"""Annealing that is trained, on MNIST, beside the figures of uncorrected Hamiltonian annealing (UHA).

    python benchmarks/uha_mnist.py [--data DIR] [--k 1 8 16] [--epochs 100] [--rate 1e-4] [--first-epochs 400]
                                   [--correction] [--bfloat16] [--runs DIR] [--resume] [--short] [--csv FILE]

The networks of the paper: one hidden layer of 450 ReLU in encoder and decoder, 64 latents; images are drawn anew from
their grey values whenever they are used, the test images once, by a seed of their own.  A VAE is trained by its ELBO
(``--first-epochs``, Adam at 1e-3 by a cosine).  From there, for each K, all of it is trained on ``AnnealedBound(K)``
(``--epochs``, Adam at ``--rate``, by a cosine too; ``--correction`` for momenta that are corrected by the scores, which
UHA has not); K = 1 is one Hamiltonian step, and stands beside the ELBO.  Reported are the bound on all test images, one
draw each, and log p(x) of the first ``--images`` by annealing.  ``--bfloat16`` multiplies matrices in bfloat16 while
training, where the processor can; everything is evaluated in float32.

A run is kept under ``--runs`` and goes on there with ``--resume``.

Reference: MCMC Variational Inference via Uncorrected Hamiltonian Annealing (Geffner and Domke, 2021), MNIST.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import show, write
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.data import binarize, idx_folder
from pyro_hvae.evidence import anneal
from pyro_hvae.nn import MLP

HERE = Path(__file__).resolve().parent
PIXELS, LATENT, HIDDEN = 784, 64, (450,)
PUBLISHED = {1: (-93.4, -88.5), 8: (-89.8, -87.5), 16: (-88.8, -87.2), 32: (-88.1, -87.0), 64: (-87.6, -86.9)}


def pair() -> tuple[Any, Any]:
    """Model and guide at their start."""
    torch.manual_seed(0)
    relu = partial(MLP, hidden=HIDDEN, activation=nn.ReLU)
    model = ph.TopDown(z1=ph.StandardNormal(LATENT), x=ph.Bernoulli(relu(LATENT, PIXELS)))
    return model, ph.BottomUp(z1=ph.Gaussian(relu(PIXELS, 2 * LATENT)))


def trained(model: Any, guide: Any, bound: Any, data: Tensor, rate: float, epochs: int, run: Path, resume: bool) -> Any:
    return ph.fit(
        model, guide, data, bound=bound, epochs=epochs, batch_size=100, transform=binarize, seed=0, ema=0.999,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, epochs * math.ceil(len(data) / 100)
        ),
        run_dir=run, resume=resume and run.exists(), checkpoint_every=600, log_every=600, terms_every=10**9,
        compile=True, progress=False,
    )  # fmt: skip


@contextlib.contextmanager
def products(bfloat16: bool) -> Iterator[None]:
    """Multiply matrices of float32 in bfloat16."""
    torch.set_float32_matmul_precision("medium" if bfloat16 else "highest")
    yield
    torch.set_float32_matmul_precision("highest")


def mean(bound: Any, model: Any, guide: Any, x: Tensor) -> Tensor:
    """The bound of each image, one draw for it."""
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.cat([bound.per_datum(model, guide, part) for part in x.split(100)])


def log_evidence(model: Any, guide: Any, x: Tensor, betas: int) -> Tensor:
    """log p(x) of each image by annealing from the guide, four chains."""
    torch.manual_seed(2)
    parts = [anneal(model, guide, part, num_chains=4, betas=betas).log_weights for part in x.split(100)]
    return torch.cat([weights.logsumexp(0) - math.log(4) for weights in parts])


def scored(k: int, start: tuple[Any, Any], data: Tensor, x: Tensor, options: argparse.Namespace) -> dict[str, object]:
    model, guide = copy.deepcopy(start)
    began = time.process_time()
    bound = ph.AnnealedBound(k, correction=options.correction)
    name = f"k{k}-corrected" if options.correction else f"k{k}"
    with products(options.bfloat16):
        result = trained(model, guide, bound, data, options.rate, options.epochs, options.runs / name, options.resume)
    with result.averages.applied():
        return row(k, bound, model, guide, x, began, options)


def row(k: int, bound: Any, model: Any, guide: Any, x: Tensor, began: float, options: Any) -> dict[str, object]:
    """Return the figures of a trained pair."""
    hours = (time.process_time() - began) / 3600
    value = mean(bound, model, guide, x)
    evidence = log_evidence(model, guide, x[: options.images], 20 if options.short else 500)
    elbo, log_p = PUBLISHED.get(k, ("", ""))
    return {
        "K": k,
        "corrected": "yes" if options.correction else "no",
        "epochs": options.epochs,
        "rate": options.rate,
        "processor hours": f"{hours:.2f}",
        "test bound": f"{value.mean():.2f}",
        "s.e.": f"{value.std() / len(value) ** 0.5:.2f}",
        "UHA's bound": elbo,
        "log p(x)": f"{evidence.mean():.2f}",
        "UHA's log p(x)": log_p,
        "images": options.images,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "mnist")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--first-epochs", type=int, default=400)
    parser.add_argument("--correction", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--images", type=int, default=500, help="test images whose log p(x) is estimated")
    parser.add_argument("--runs", type=Path, default=Path("runs/uha_mnist"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--short", action="store_true", help="one epoch of few images")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    split = idx_folder(options.data)
    data, x = split.train, binarize(split.test, generator=torch.Generator().manual_seed(0))
    if options.short:
        data, x, options.epochs, options.first_epochs, options.images = data[:500], x[:200], 1, 1, 50
    model, guide = pair()
    elbo = ph.LayerwiseELBO()
    with products(options.bfloat16):
        trained(model, guide, elbo, data, 1e-3, options.first_epochs, options.runs / "elbo", options.resume)
    ph.load(options.runs / "elbo", programs=(model, guide), ema=True)
    value = mean(ph.TraceELBO(), model, guide, x)
    print(f"ELBO of the start: {value.mean():.2f} +- {value.std() / len(value) ** 0.5:.2f}", flush=True)
    rows = []
    for k in options.k:
        rows.append(scored(k, (model, guide), data, x, options))
        print("  ".join(f"{name}: {value}" for name, value in rows[-1].items()), flush=True)
    print("\n" + show(rows))
    write(options.csv, rows)


if __name__ == "__main__":
    main()
