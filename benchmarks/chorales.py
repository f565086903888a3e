"""Deep Markov model and variational recurrent network on JSB chorales, beside the published bounds.

    python benchmarks/chorales.py --data FILE.npz [--model dmm|vrnn] [--bound elbo|iwelbo|smc] [--k 1] [--minutes 30]

FILE holds ``train``, ``valid`` and ``test``, (N, T, 11) bytes of 88 keys, and ``<part>_lengths``.  Batches are cut to
their longest chorale.  Every ``--every`` epochs the bound on the validation chorales is measured; the parameters of the
best are kept, and with these the test chorales are measured: nats a time step by the ELBO, by importance weighting and
by particles.  The deep Markov model has the sizes of Pyro's tutorial (latent 100, emission 100, transition 200, network
600), the recurrent network 32 of each.

A run is kept under ``--out`` and goes on there when the command is given again, with more minutes if asked; minutes are
processor time of training.

Published, test, nats a time step: deep Markov model 6.93 (Structured Inference Networks for Nonlinear State Space
Models, Krishnan, Shalit and Sontag, 2017), Pyro's tutorial 6.87; variational recurrent network 8.69 by ELBO, 8.01 by
importance weighting (5 particles), 7.51 and 7.40 by particles (5 and 8; Filtering Variational Objectives, Maddison et
al., 2017).
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.bounds import LayerwiseELBO, Regularised
from pyro_hvae.models import deep_markov, variational_rnn

KEYS = 88
PUBLISHED = {"dmm": "6.93 / 6.87 (tutorial)", "vrnn": "ELBO 8.69, IWAE 8.01, FIVO 7.51 (5), 7.40 (8)"}


def read(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return x (N, T, 88) and lengths (N,) by part."""
    with np.load(path) as file:
        parts = {}
        for part in ("train", "valid", "test"):
            keys = np.unpackbits(file[part], axis=-1)[..., :KEYS]
            parts[part] = torch.from_numpy(keys).float(), torch.from_numpy(file[f"{part}_lengths"].astype("int64"))
    return parts


class Chorales:
    """Minibatches of chorales of about one length, new ones each epoch and in a new order, each cut to its longest."""

    def __init__(self, x: Tensor, lengths: Tensor, batch: int) -> None:
        self.x, self.lengths, self.batch = x, lengths, batch
        self.data_size = len(x)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = (self.lengths + 8 * torch.randn(len(self.x))).argsort().split(self.batch)
        for index in torch.randperm(len(order)).tolist():
            rows = order[index]
            lengths = self.lengths[rows]
            yield {"x": self.x[rows, : int(lengths.max())], "lengths": lengths}


def per_step(bound: Any, model: Any, guide: Any, data: tuple[Tensor, Tensor], repeats: int = 1) -> float:
    """Return minus the bound in nats a time step, averaged over runs; under the same noise whenever it is called."""
    x, lengths = data
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(repeats):
            for rows in lengths.argsort().split(20):
                cut = x[rows, : int(lengths[rows].max())]
                total -= float(bound.per_datum(model, guide, cut, lengths=lengths[rows]).sum())
    return total / (repeats * int(lengths.sum()))


class Watch:
    """Measure the validation bound, keep the best parameters, and stop after so much processor time."""

    def __init__(self, options: argparse.Namespace, valid: tuple[Tensor, Tensor]) -> None:
        self.options, self.valid = options, valid
        self.bound = ph.TraceELBO(4) if options.bound == "elbo" else ph.SMCBound(8)
        self.seconds, self.best, self.best_epoch, self.state = 0.0, float("inf"), 0, {}
        self.clock = time.process_time()

    def on_start(self, run: Any) -> None:
        self.clock = time.process_time()
        if run.stopped == "minutes" and self.seconds <= 60 * self.options.minutes:
            run.stopped = None  # a finished run goes on where it is given more minutes

    def on_epoch(self, run: Any) -> None:
        self.seconds += time.process_time() - self.clock
        if run.epoch % self.options.every == 0:
            with run.averages.applied():
                value = per_step(self.bound, run.model, run.guide, self.valid)
                print(f"epoch {run.epoch:5d}  {self.seconds / 60:6.1f} min  valid {value:.3f}", flush=True)
                if value < self.best:
                    self.best, self.best_epoch = value, run.epoch
                    programs = {"model": run.model, "guide": run.guide}
                    self.state = {name: copy.deepcopy(program.state_dict()) for name, program in programs.items()}
        if self.seconds > 60 * self.options.minutes:
            run.stop("minutes")
        self.clock = time.process_time()

    def state_dict(self) -> dict[str, Any]:
        names = ("seconds", "best", "best_epoch", "state")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def objective(options: argparse.Namespace, steps_an_epoch: int) -> Any:
    """Return the bound to train on; the ELBO's divergence warms up from 0.2."""
    if options.bound == "elbo":
        ramp = max(1, options.warm_up * steps_an_epoch)
        return Regularised(LayerwiseELBO(options.k), kl_weight=lambda step: (0.2 + 0.8 * step / ramp).clamp(max=1.0))
    return ph.IWELBO(options.k) if options.bound == "iwelbo" else ph.SMCBound(options.k)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the .npz file")
    parser.add_argument("--model", default="dmm", choices=["dmm", "vrnn"])
    parser.add_argument("--bound", default="elbo", choices=["elbo", "iwelbo", "smc"])
    parser.add_argument("--k", type=int, default=1, help="particles in training")
    parser.add_argument("--minutes", type=float, default=30.0, help="processor time of training")
    parser.add_argument("--warm-up", type=int, default=200, help="epochs of warm-up of the ELBO")
    parser.add_argument("--rate", type=float, default=1e-3, help="of the first step; it halves in --half epochs")
    parser.add_argument("--half", type=float, default=800.0)
    parser.add_argument("--decay", type=float, default=0.01, help="weight of |parameters|^2 / 2, nats a chorale")
    parser.add_argument("--ema", type=float, default=0.995, help="of the averages that are validated and tested")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="epochs between validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=100, help="of the importance-weighted test bound")
    parser.add_argument("--out", type=Path, default=Path("runs/chorales"))
    parser.add_argument("--csv", type=Path, default=None, help="table to append to")
    options = parser.parse_args()

    parts = read(options.data)
    torch.manual_seed(options.seed)
    model, guide = deep_markov(KEYS, 100) if options.model == "dmm" else variational_rnn(KEYS, 32, hidden=32)
    batches = Chorales(*parts["train"], options.batch)
    watch = Watch(options, parts["valid"])
    half = options.half * len(batches)  # in steps
    ph.fit(
        model,
        guide,
        batches,
        bound=objective(options, len(batches)),
        optimizer=lambda parameters: torch.optim.Adam(
            parameters, lr=options.rate, betas=(0.96, 0.999), weight_decay=options.decay, fused=True
        ),
        schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step / half)),
        ema=options.ema,
        clip_norm=50.0,
        epochs=1_000_000,
        seed=options.seed,
        run_dir=options.out / f"{options.model}-{options.bound}{options.k}-s{options.seed}",
        checkpoint_every=20 * len(batches),
        resume=True,
        terms_every=1_000_000,
        callbacks=[watch],
        progress=False,
    )
    for name, program in (("model", model), ("guide", guide)):
        if watch.state:
            program.load_state_dict(watch.state[name])
    test = parts["test"]
    row = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": options.model, "bound": options.bound, "k": options.k, "minutes": round(watch.seconds / 60, 1),
        "epoch": watch.best_epoch, "valid": round(watch.best, 3),
        "test_elbo": round(per_step(ph.TraceELBO(10), model, guide, test), 3),
        "test_iw": round(per_step(ph.IWELBO(options.particles), model, guide, test), 3),
        "test_smc8": round(per_step(ph.SMCBound(8), model, guide, test, 4), 3),
        "test_smc": round(per_step(ph.SMCBound(options.particles), model, guide, test), 3),
        "published": PUBLISHED[options.model], "threads": torch.get_num_threads(), "torch": torch.__version__,
        "pyro_hvae": ph.__version__, "command": " ".join(["python benchmarks/chorales.py", *sys.argv[1:]]),
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.csv is not None:
        fresh = not options.csv.exists()
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
