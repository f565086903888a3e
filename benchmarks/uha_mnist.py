"""Annealing that is trained, on MNIST, beside the figures of uncorrected Hamiltonian annealing (UHA).

    python benchmarks/uha_mnist.py [--data DIR] [--k 1 8 16] [--epochs 20 5 6] [--rate 3e-4 3e-4 3e-4]
                                   [--first-epochs 300] [--activation silu] [--correction] [--bfloat16] [--runs DIR]
                                   [--resume] [--short] [--csv FILE] [--curve FILE]

The networks of the paper: one hidden layer of 450 ReLU in encoder and decoder, 64 latents; images are drawn anew from
their grey values whenever they are used, the test images once, by a seed of their own.  A VAE is trained by its ELBO
(``--first-epochs``, Adam at 1e-3 by a cosine).  From there all of it is trained on ``AnnealedBound(K)`` for one K after
the other, each from the networks of the one before (``--epochs`` of each, Adam at its ``--rate``,
by a cosine too; ``--correction`` for momenta that are corrected by the scores, which UHA has not).  Reported are the
bound on all test images, one draw each, and log p(x): that bound, what 1000 draws of the guide find above it on the
first 500 images, and annealing above that on the first ``--images``.  ``--curve FILE`` keeps the
bound on the first 1000 after every fifth epoch, with the processor hours until then.  ``--bfloat16`` multiplies
matrices in bfloat16 while training, where the processor can; everything is evaluated in float32.

Gradients through ReLU networks are biased (``RoughDensityWarning``), so that few epochs are best for them;
``--activation silu`` has the same layers with exact gradients.

A run is kept under ``--runs`` and goes on there with ``--resume``.

Reference: MCMC Variational Inference via Uncorrected Hamiltonian Annealing (Geffner and Domke, 2021), MNIST.
"""

from __future__ import annotations

import argparse
import contextlib
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
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
PUBLISHED = {  # K: bound by UHA and by importance weighting with K draws, log p(x) after training by each
    1: (-93.4, -93.4, -88.5, -88.5), 8: (-89.8, -90.5, -87.5, -87.6), 16: (-88.8, -89.9, -87.2, -87.5),
    32: (-88.1, -89.4, -87.0, -87.3), 64: (-87.6, -89.0, -86.9, -87.2),
}  # fmt: skip


def pair(activation: str = "relu") -> tuple[Any, Any]:
    """Model and guide at their start."""
    torch.manual_seed(0)
    net = partial(MLP, hidden=HIDDEN, activation=ACTIVATIONS[activation])
    model = ph.TopDown(z1=ph.StandardNormal(LATENT), x=ph.Bernoulli(net(LATENT, PIXELS)))
    return model, ph.BottomUp(z1=ph.Gaussian(net(PIXELS, 2 * LATENT)))


class Curve:
    """The bound on some test images after every fifth epoch, with the processor seconds of training until then."""

    def __init__(self, k: int, bound: Any, x: Tensor) -> None:
        self.k, self.bound, self.x = k, bound, x
        self.rows: list[dict[str, object]] = []
        self.seconds, self.since = 0.0, time.process_time()

    def count(self) -> float:
        now = time.process_time()
        self.seconds, self.since = self.seconds + now - self.since, now
        return self.seconds

    def on_epoch(self, run: ph.training.Run) -> None:
        if run.epoch % 5:
            return
        hours = self.count() / 3600
        with products(bfloat16=False), run.averages.applied():
            value = mean(self.bound, run.model, run.guide, self.x).mean()
        self.rows.append({"K": self.k, "epoch": run.epoch, "hours": f"{hours:.3f}", "bound": f"{value:.2f}"})
        print(f"  K = {self.k}, {run.epoch} epochs, {hours:.2f} hours: {value:.2f}", flush=True)
        self.since = time.process_time()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.count(), "rows": list(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.rows, self.since = state["seconds"], state["rows"], time.process_time()


def trained(
    pair: tuple[Any, Any], bound: Any, data: Tensor, rate: float, epochs: int, run: Path, resume: bool, *calls: Any
) -> Any:
    """Train on a bound, with averages of the weights; the run is kept, and goes on."""
    model, guide = pair
    return ph.fit(
        model, guide, data, bound=bound, epochs=epochs, batch_size=100, transform=binarize, seed=0, ema=0.999,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, epochs * math.ceil(len(data) / 100)
        ),
        run_dir=run, resume=resume and run.exists(), checkpoint_every=600, log_every=600, terms_every=10**9,
        callbacks=calls, compile=True, progress=False,
    )  # fmt: skip


@contextlib.contextmanager
def products(bfloat16: bool) -> Iterator[None]:
    """Multiply matrices of float32 in bfloat16, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if bfloat16 else "highest")
    yield
    torch.set_float32_matmul_precision(before)


def mean(bound: Any, model: Any, guide: Any, x: Tensor) -> Tensor:
    """The bound of each image, one draw for it."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.cat([bound.per_datum(model, guide, part) for part in x.split(100)])


def log_evidence(model: Any, guide: Any, x: Tensor, bound: Tensor, options: argparse.Namespace) -> str:
    """log p(x) of all images: their bound, what 1000 draws find above it on some, and annealing above that on a few."""
    draws, betas = (50, 20) if options.short else (1000, 500)
    some, few = x[:500], x[: options.images]
    torch.manual_seed(2)
    value = torch.cat([ph.log_evidence(model, guide, part, num_samples=draws).value for part in some.split(100)])
    parts = [anneal(model, guide, part, num_chains=4, betas=betas).log_weights for part in few.split(100)]
    annealed = torch.cat([weights.logsumexp(0) - math.log(4) for weights in parts])
    above = (value - bound[: len(some)]).mean()
    return f"{bound.mean() + above + (annealed - value[: len(few)]).mean():.2f}"


def scored(
    k: int, epochs: int, rate: float, pair: tuple[Any, Any], data: Tensor, x: Tensor, options: argparse.Namespace
) -> tuple[dict[str, object], list[dict[str, object]], Tensor]:
    """Train a pair on, in its place; return its figures, its curve, and the bound of each test image."""
    bound, run = ph.AnnealedBound(k, correction=options.correction), folder(k, options)
    curve = Curve(k, bound, x[:1000])
    with products(options.bfloat16):
        result = trained(pair, bound, data, rate, epochs, run, options.resume, curve)
    hours = curve.count() / 3600
    with result.averages.applied():
        value = mean(bound, *pair, x)
    ph.load(run, programs=pair, ema=True)  # the next K goes on from the averages
    return row(k, epochs, rate, value, hours, options), curve.rows, value


def folder(k: int, options: argparse.Namespace) -> Path:
    return options.runs / (f"k{k}-corrected" if options.correction else f"k{k}")


def row(
    k: int, epochs: int, rate: float, value: Tensor, hours: float, options: argparse.Namespace
) -> dict[str, object]:
    """Return the figures of a trained pair; log p(x) comes when all are trained."""
    uha, weighted, uha_log_p, weighted_log_p = PUBLISHED.get(k, ("",) * 4)
    return {
        "K": k,
        "activation": options.activation,
        "corrected": "yes" if options.correction else "no",
        "epochs": epochs,
        "rate": rate,
        "processor hours": f"{hours:.2f}",
        "test bound": f"{value.mean():.2f}",
        "s.e.": f"{value.std() / len(value) ** 0.5:.2f}",
        "UHA": uha,
        "IW": weighted,
        "log p(x)": "",
        "UHA log p(x)": uha_log_p,
        "IW log p(x)": weighted_log_p,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "mnist")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--epochs", type=int, nargs="+", default=[20, 5, 6], help="for each K")
    parser.add_argument("--rate", type=float, nargs="+", default=[3e-4] * 3, help="for each K")
    parser.add_argument("--first-epochs", type=int, default=300)
    parser.add_argument("--activation", default="relu", choices=list(ACTIVATIONS), help="the paper's is relu")
    parser.add_argument("--correction", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--images", type=int, default=50, help="test images that are annealed too")
    parser.add_argument("--runs", type=Path, default=Path("runs/uha_mnist"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--short", action="store_true", help="one epoch of few images")
    parser.add_argument("--csv", default=None)
    parser.add_argument("--curve", default=None)
    options = parser.parse_args()
    for name in ("epochs", "rate"):
        if len(getattr(options, name)) != len(options.k):
            parser.error(f"--{name} takes a number for each of {len(options.k)} K, got {getattr(options, name)}")
    torch.set_num_threads(1)
    split = idx_folder(options.data)
    data, x = split.train, binarize(split.test, generator=torch.Generator().manual_seed(0))
    if options.short:
        data, x, options.first_epochs, options.images = data[:500], x[:200], 1, 50
        options.epochs = [5] * len(options.k)
    model, guide = pair(options.activation)
    with products(options.bfloat16):
        start = options.runs / "elbo"
        trained((model, guide), ph.LayerwiseELBO(), data, 1e-3, options.first_epochs, start, options.resume)
    ph.load(start, programs=(model, guide), ema=True)
    value = mean(ph.TraceELBO(), model, guide, x)
    print(f"ELBO of the start: {value.mean():.2f} +- {value.std() / len(value) ** 0.5:.2f}", flush=True)
    rows: list[dict[str, Any]] = []
    curves, values = [], []
    for k, epochs, rate in zip(options.k, options.epochs, options.rate, strict=True):
        found, curve, value = scored(k, epochs, rate, (model, guide), data, x, options)
        rows.append(found)
        values.append(value)
        curves += curve
        print("  ".join(f"{name}: {value}" for name, value in found.items()), flush=True)
        write(options.csv, rows)
        write(options.curve if curves else None, curves)
    for found, value in zip(rows, values, strict=True):
        ph.load(folder(found["K"], options), programs=(model, guide), ema=True)
        found["log p(x)"] = log_evidence(model, guide, x, value, options)
        write(options.csv, rows)
    print("\n" + show(rows))


if __name__ == "__main__":
    main()
