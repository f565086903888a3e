"""Importance weighted auto-encoders on MNIST, by the protocol of their authors, beside the published numbers.

    python benchmarks/burda.py --data DIR [--layers 1] [--k 1] [--bound iwelbo] [--stages 8] [--batch 20]
    python benchmarks/burda.py --data DIR --recipe EPOCHS [--rate 2e-3] [--hold EPOCHS] [--start RUN] [--bfloat16]
                               [--layers 1] [--k 1] [--batch 100] [--pair NAME]

Images are binarised at random whenever they are used.  L=1: 784-200-200-50; L=2: 784-200-200-100-100-100-50, decoders
reversed, tanh, Xavier's weights, output biases at the logits of the mean image (clipped to [.001, .999]).  Adam with
eps 1e-4; stage i = 0, ..., 7 has 3^i epochs at rate 1e-3 * 10^(-i/7), 3280 epochs in all.  After each stage: negative
log-likelihood of 1000 test images with 1000 draws; at the end of ``--images`` of them with 5000.  A standard
deviation is exp(r) of a network's r, bent so that it stays within [1e-3, 1e3].

With ``--recipe`` the same networks, data and evaluation have a schedule of our own: so many epochs at a rate that falls
to zero as a cosine, after ``--hold`` of them, and a moving average of the parameters (decay .999), which is what is
measured, after 1, 3, 10, 30, ... epochs and at the end.  ``--start`` goes on from the last parameters of another run,
so that cells with more draws share the epochs with few: hold the rate of the first.  ``cpu_seconds`` is the processor
time of training over all threads, with that of the run it started from.  ``--bfloat16`` multiplies matrices in
bfloat16 while training, where the processor can; everything is evaluated in float32.

``--pair`` is another pair with the latents of L=2, 100 and 50, for the question how far one comes with them: ``wide``
(hidden layers of 500-500 and 250-250, SiLU), ``flow`` (the same with a flow as the prior of the upper latent), ``vamp``
(with a mixture of 500 posteriors there) and ``ladder`` (with a guide that runs top-down).

A run is kept under ``--out`` and goes on there bit for bit when the command is given again, with more stages if asked.

Reference: Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016), Table 1; the columns are theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import math
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
SPENT = "spent.json"
BOUNDS = {
    "elbo": TraceELBO,
    "iwelbo": IWELBO,
    "dreg": lambda k: IWELBO(k, gradient="dreg"),
}


WIDE = {"hidden": [[500, 500], [250, 250]], "activation": "silu"}
PAIRS = {
    "wide": lambda: ph.hvae(784, [100, 50], **WIDE),
    "flow": lambda: ph.hvae(784, [100, 50], prior="flow", **WIDE),
    "vamp": lambda: ph.hvae(784, [100, 50], prior="vamp", num_components=500, **WIDE),
    "ladder": lambda: ph.ladder_vae(784, [100, 50], **WIDE),
}


def pair(layers: int, mean: Tensor, name: str = "") -> tuple[ph.TopDown, ph.BottomUp]:
    """Model and guide at their start: those of the authors, or one of ``PAIRS``."""
    if name:
        model, guide = PAIRS[name]()
    elif layers == 1:
        model, guide = ph.vae(784, 50, scale="exp")
    else:
        model, guide = ph.hvae(784, [100, 50], hidden=[[200, 200], [100, 100]], scale="exp")
    last = [module for module in model.kernels["x"].modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(torch.logit(mean.clamp(0.001, 0.999)))
    return model, guide


def negative_log_likelihood(model: object, guide: object, images: Tensor, draws: int) -> tuple[float, float]:
    """Mean over images binarised once, and its standard error over images; nats."""
    values, products = [], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = binarize(images)
        for part in x.split(100):
            values.append(ph.log_evidence(model, guide, part, num_samples=draws, chunk_size=25).value)
    torch.set_float32_matmul_precision(products)
    value = torch.cat(values)
    return -float(value.mean()), float(value.std()) / len(value) ** 0.5


class Schedule:
    """Epochs, the rate of each step relative to the first, and the epochs after which the test images are looked at."""

    def __init__(self, options: argparse.Namespace, images: int) -> None:
        self.steps_an_epoch = -(-images // options.batch)
        self.cosine = options.recipe is not None
        stages = [(3 ** (stage + 1) - 1) // 2 for stage in range(options.stages)]
        self.epochs, self.hold = (options.recipe if self.cosine else stages[-1]), options.hold
        self.ends = self._early() if self.cosine else stages

    def _early(self) -> list[int]:
        return [e for power in range(5) for e in (10**power, 3 * 10**power) if e < self.epochs] + [self.epochs]

    def rate(self, step: int) -> float:
        if self.cosine:
            falling = max(1, (self.epochs - self.hold) * self.steps_an_epoch)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0, step - self.hold * self.steps_an_epoch) / falling)))
        return 10.0 ** (-sum(step // self.steps_an_epoch >= end for end in self.ends[:-1]) / 7)


class Looks:
    """Looks at the test images after some epochs; counts wall and processor seconds of training without that."""

    def __init__(self, options: argparse.Namespace, ends: list[int], images: Tensor) -> None:
        self.options, self.ends, self.images = options, ends, images
        self.seconds, self.cpu_seconds, self.history = 0.0, 0.0, ""
        if options.start is not None:
            spent = json.loads((options.start / SPENT).read_text(encoding="utf-8"))
            self.seconds, self.cpu_seconds = spent["seconds"], spent["cpu_seconds"]
            self.history = f"{spent['history']}k={spent['k']}: {spent['epochs']}, "
        self.since = time.perf_counter(), time.process_time()

    def write(self, run: Path) -> None:
        """Leave what was spent for the runs that start from this one."""
        spent = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "history": self.history}
        spent |= {"k": self.options.k, "epochs": self.options.recipe}
        (run / SPENT).write_text(json.dumps(spent), encoding="utf-8")

    def count(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds += now[0] - self.since[0]
        self.cpu_seconds += now[1] - self.since[1]
        self.since = now

    def on_epoch(self, run: ph.training.Run) -> None:
        if run.epoch not in self.ends:
            return
        self.count()
        with run.averages.applied() if run.averages else contextlib.nullcontext():
            row(self, run.model, run.guide, run.epoch, self.images[:1000], 1000)
        self.since = time.perf_counter(), time.process_time()

    def state_dict(self) -> dict[str, float]:
        self.count()
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        self.since = time.perf_counter(), time.process_time()


def row(looks: Looks, model: object, guide: object, epochs: int, images: Tensor, draws: int) -> None:
    """Measure, print and append to the table."""
    options, start = looks.options, time.perf_counter()
    nll, error = negative_log_likelihood(model, guide, images, draws)
    with torch.random.fork_rng():
        units = active_units(model, guide, binarize(images[:1000]), num_draws=20)
    published = PUBLISHED.get((options.layers, options.k), (float("nan"),) * 2)[options.bound != "elbo"]
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "layers": options.layers, "pair": options.pair, "k": options.k, "bound": options.bound, "batch": options.batch,
        "seed": options.seed, "recipe": options.recipe or "", "rate": options.rate,
        "before": looks.history.rstrip(", "), "epochs": epochs,
        "train_seconds": round(looks.seconds), "cpu_seconds": round(looks.cpu_seconds),
        "images": len(images), "draws": draws, "nll": round(nll, 3), "stderr": round(error, 3),
        "active": "+".join(str(units[name]) for name in sorted(units)), "published": published,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "pyro": pyro.__version__,
        "pyro_hvae": ph.__version__, "command": " ".join(["python benchmarks/burda.py", *sys.argv[1:]]),
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in list(found.items())[1:19]), flush=True)
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
    parser.add_argument("--recipe", type=int, default=None, metavar="EPOCHS", help="our schedule, with so many epochs")
    parser.add_argument("--rate", type=float, default=1e-3, help="rate at the start")
    parser.add_argument("--hold", type=int, default=0, metavar="EPOCHS", help="before the rate of a recipe falls")
    parser.add_argument("--start", type=Path, default=None, metavar="RUN", help="folder of the run to go on from")
    parser.add_argument("--bfloat16", action="store_true", help="multiply matrices in bfloat16 while training")
    parser.add_argument("--pair", default="", choices=list(PAIRS), help="another pair than the authors'")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--images", type=int, default=1000, help="test images looked at when training is over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/burda"))
    parser.add_argument("--csv", type=Path, default=None, help="table to append to")
    options = parser.parse_args()
    if options.recipe is not None and options.recipe < 1:
        parser.error(f"--recipe takes a number of epochs of at least 1, got {options.recipe}")
    if options.pair:
        options.layers = 2
    if options.start is not None and not (options.recipe and (options.start / SPENT).exists()):
        parser.error(f"--start takes the folder of a --recipe run that has ended, got {options.start}")

    train, test = (getattr(idx_folder(options.data), part) for part in ("train", "test"))
    torch.manual_seed(options.seed)
    model, guide = pair(options.layers, train.mean(0), options.pair)
    if options.start is not None:
        ph.load(options.start, programs=(model, guide))
    torch.set_float32_matmul_precision("medium" if options.bfloat16 else "highest")
    schedule = Schedule(options, len(train))
    looks = Looks(options, schedule.ends, test)
    name = f"{options.pair or f'L{options.layers}'}-k{options.k}-{options.bound}-b{options.batch}-s{options.seed}"
    if options.recipe:
        name += f"-recipe{options.recipe}-r{options.rate:g}" + (f"-h{options.hold}" if options.hold else "")
    if options.start is not None:
        name += f"-from-{options.start.name}"
    result = ph.fit(
        model,
        guide,
        train,
        bound=BOUNDS[options.bound](options.k),
        optimizer=lambda parameters: torch.optim.Adam(
            parameters, lr=options.rate, eps=1e-8 if options.recipe else 1e-4, fused=True
        ),
        schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate),
        epochs=schedule.epochs,
        ema=0.999 if options.recipe else None,
        batch_size=options.batch,
        transform=binarize,
        seed=options.seed,
        compile=True,
        run_dir=options.out / name,
        resume=True,
        log_every=schedule.steps_an_epoch,
        terms_every=20 * schedule.steps_an_epoch,
        callbacks=[looks],
        progress=os.isatty(2),
    )
    looks.count()
    if options.recipe:
        looks.write(options.out / name)
    with result.averages.applied() if result.averages else contextlib.nullcontext():
        row(looks, model, guide, schedule.epochs, test[: options.images], 5000)


if __name__ == "__main__":
    main()
