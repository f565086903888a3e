"""Importance weighted auto-encoders on MNIST, by the protocol of their authors, beside the published numbers.

    python benchmarks/burda.py --data DIR [--layers 1] [--k 1] [--bound iwelbo] [--stages 8] [--batch 20]

Images are binarised at random whenever they are used.  L=1: 784-200-200-50; L=2: 784-200-200-100-100-100-50, decoders
reversed, tanh, Xavier's weights, output biases at the logits of the mean image (clipped to [.001, .999]).  Adam with
eps 1e-4; stage i = 0, ..., 7 has 3^i epochs at rate 1e-3 * 10^(-i/7), 3280 epochs in all.  After each stage: negative
log-likelihood of 1000 test images with 1000 draws; at the end of ``--images`` of them with 5000.  A standard
deviation is exp(r) of a network's r, bent so that it stays within [1e-3, 1e3].

A run is kept under ``--out`` and goes on there bit for bit when the command is given again, with more stages if asked.

Reference: Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016), Table 1; the columns are theirs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import sys
import time
from pathlib import Path

import pyro
import torch
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.bounds import IWELBO, TraceELBO
from pyro_hvae.data import binarize, idx_folder
from pyro_hvae.diagnostics import active_units

PUBLISHED = {  # (layers, k): nats of the "VAE" (ELBO with k draws) and of the "IWAE"
    (1, 1): (86.76, 86.76), (1, 5): (86.47, 85.54), (1, 50): (86.35, 84.78),
    (2, 1): (85.33, 85.33), (2, 5): (85.01, 83.89), (2, 50): (84.78, 82.90),
}  # fmt: skip
BOUNDS = {
    "elbo": TraceELBO,
    "iwelbo": IWELBO,
    "dreg": lambda k: IWELBO(k, gradient="dreg"),
}


def pair(layers: int, mean: Tensor) -> tuple[ph.TopDown, ph.BottomUp]:
    """Model and guide at their start."""
    if layers == 1:
        model, guide = ph.vae(784, 50, scale="exp")
    else:
        model, guide = ph.hvae(784, [100, 50], hidden=[[200, 200], [100, 100]], scale="exp")
    last = [module for module in model.kernels["x"].modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(torch.logit(mean.clamp(0.001, 0.999)))
    return model, guide


def negative_log_likelihood(model: object, guide: object, images: Tensor, draws: int) -> tuple[float, float]:
    """Mean over images binarised once, and its standard error over images; nats."""
    values = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = binarize(images)
        for part in x.split(100):
            values.append(ph.log_evidence(model, guide, part, num_samples=draws, chunk_size=25).value)
    value = torch.cat(values)
    return -float(value.mean()), float(value.std()) / len(value) ** 0.5


class Stages:
    """Looks at the test images whenever a stage ends, and counts the seconds of training without that."""

    def __init__(self, options: argparse.Namespace, images: Tensor) -> None:
        self.options, self.images = options, images
        self.ends = {(3 ** (stage + 1) - 1) // 2: stage for stage in range(options.stages)}
        self.seconds = self.looking = 0.0

    def on_record(self, run: object, record: dict[str, float]) -> None:
        self.seconds += record.get("seconds", 0.0) - self.looking
        self.looking = 0.0

    def on_epoch(self, run: object) -> None:
        if run.epoch in self.ends:
            start = time.perf_counter()
            stage = self.ends[run.epoch]
            row(self.options, run.model, run.guide, stage, run.epoch, self.images[:1000], 1000, self.seconds)
            self.looking = time.perf_counter() - start

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = state["seconds"]


def row(
    options: argparse.Namespace, model: object, guide: object, stage: int, epochs: int, images: Tensor, draws: int,
    seconds: float,
) -> None:  # fmt: skip
    """Measure, print and append to the table."""
    start = time.perf_counter()
    nll, error = negative_log_likelihood(model, guide, images, draws)
    with torch.random.fork_rng():
        units = active_units(model, guide, binarize(images[:1000]), num_draws=20)
    published = PUBLISHED.get((options.layers, options.k), (float("nan"),) * 2)[options.bound != "elbo"]
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "layers": options.layers, "k": options.k, "bound": options.bound, "batch": options.batch,
        "seed": options.seed, "stage": stage, "epochs": epochs, "train_seconds": round(seconds),
        "images": len(images), "draws": draws, "nll": round(nll, 3), "stderr": round(error, 3),
        "active": "+".join(str(units[name]) for name in sorted(units)), "published_8_stages": published,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "pyro": pyro.__version__,
        "pyro_hvae": ph.__version__, "command": " ".join(["python benchmarks/burda.py", *sys.argv[1:]]),
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in list(found.items())[1:15]), flush=True)
    print(f"  evaluated in {time.perf_counter() - start:.0f} s", flush=True)
    if options.csv is not None:
        fresh = not options.csv.exists()
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found))
            if fresh:
                writer.writeheader()
            writer.writerow(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--layers", type=int, default=1, choices=[1, 2])
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--bound", default="iwelbo", choices=list(BOUNDS))
    parser.add_argument("--stages", type=int, default=8, choices=range(1, 9), metavar="1..8")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--images", type=int, default=1000, help="test images looked at when training is over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/burda"))
    parser.add_argument("--csv", type=Path, default=None, help="table to append to")
    options = parser.parse_args()

    train, test = (getattr(idx_folder(options.data), part) for part in ("train", "test"))
    torch.manual_seed(options.seed)
    model, guide = pair(options.layers, train.mean(0))
    epochs = (3**options.stages - 1) // 2
    ends = [(3 ** (stage + 1) - 1) // 2 for stage in range(8)]
    steps_an_epoch = -(-len(train) // options.batch)

    def rate(step: int) -> float:
        stage = sum(step // steps_an_epoch >= end for end in ends[:-1])
        return 10.0 ** (-stage / 7)

    stages = Stages(options, test)
    ph.fit(
        model,
        guide,
        train,
        bound=BOUNDS[options.bound](options.k),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3, eps=1e-4, fused=True),
        schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, rate),
        epochs=epochs,
        batch_size=options.batch,
        transform=binarize,
        seed=options.seed,
        compile=True,
        run_dir=options.out / f"L{options.layers}-k{options.k}-{options.bound}-b{options.batch}-s{options.seed}",
        resume=True,
        log_every=steps_an_epoch,
        terms_every=20 * steps_an_epoch,
        callbacks=[stages],
        progress=os.isatty(2),
    )
    row(options, model, guide, options.stages - 1, epochs, test[: options.images], 5000, stages.seconds)


if __name__ == "__main__":
    main()
