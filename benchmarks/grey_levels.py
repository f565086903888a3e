"""Diffusions of grey images on one scale: bits per dimension of held-out digits after equal processor time.

    python benchmarks/grey_levels.py [--seconds 120] [--short] [--csv FILE]

scikit-learn's digits, 8 x 8 pixels of 17 levels; all give a bound of log P of the same levels.  Continuous time, a
U-Net of 16 and 32 channels, one thread, batch 100, Adam at 2e-3 by a cosine, weights averaged.

- ``Gaussian``: a density of x, whose data get uniform noise of one level's width, in training and evaluation:
  log P(x) >= E_u log p(x + u) + d log(width) (Theis, van den Oord and Bethge, 2016).
- ``binned``: the same noise, and the 17 levels as the likelihood of z_1 (``BinnedGaussian``).
- ``masks``, ``ordinal``: noise on the levels themselves, as categories and as steps to neighbours.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import torch
from tables import show, write
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.data import digits
from pyro_hvae.demo import Clock
from pyro_hvae.diffusion import BinnedGaussian, LearnedSchedule
from pyro_hvae.nn import TokenUNet, UNet

LEVELS, SHAPE, CHANNELS = 17, (1, 8, 8), (16, 32)
WIDTH = 2 / (LEVELS - 1)
KINDS = ("Gaussian", "binned", "masks", "ordinal")


def signed(levels: Tensor) -> Tensor:
    """Integers to [-1, 1]."""
    return WIDTH * levels - 1


def dequantised(levels: Tensor) -> Tensor:
    """Integers to [-1, 1], with noise of one level's width."""
    return signed(levels) + (torch.rand_like(levels) - 0.5) * WIDTH


def pair(kind: str) -> tuple[Any, Any]:
    if kind in ("masks", "ordinal"):
        net, corruption = TokenUNet(LEVELS, channels=CHANNELS), "absorbing" if kind == "masks" else kind
        return ph.discrete_diffusion(
            net, event_shape=SHAPE, num_categories=LEVELS, num_layers=None, corruption=corruption
        )
    schedule = LearnedSchedule(-7.0, 5.0)
    likelihood = BinnedGaussian(schedule, event_dim=3, levels=LEVELS) if kind == "binned" else None
    return ph.vdm(
        UNet(1, CHANNELS), event_shape=SHAPE, num_layers=None, schedule=schedule, likelihood=likelihood,
        parameterisation="v",
    )  # fmt: skip


def scored(kind: str, train: Tensor, test: Tensor, options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    model, guide = pair(kind)
    seen = {"Gaussian": dequantised, "binned": signed}.get(kind, lambda levels: levels)
    clock = Clock(options.seconds, rate=2e-3)
    result = ph.fit(
        model, guide, train, bound=ph.DiffusionELBO(), steps=10**7, batch_size=100, transform=seen, seed=0, ema=0.999,
        optimizer=partial(torch.optim.Adam, lr=clock.rate, fused=True), callbacks=[clock], progress=False,
    )  # fmt: skip
    model.eval()
    torch.manual_seed(1)
    repeats, draws = (1, 5) if options.short else (10, 20)  # new noise of the levels at each repeat
    with torch.no_grad():
        bound = ph.DiffusionELBO(draws)
        values = [
            torch.cat([bound.per_datum(model, guide, seen(part)) for part in test.split(40)]) for _ in range(repeats)
        ]
    nats = torch.stack(values).mean(0) + (64 * math.log(WIDTH) if kind == "Gaussian" else 0.0)
    return {
        "diffusion": kind,
        "steps": result.steps,
        "nats": f"{nats.mean():.2f}",
        "s.e.": f"{nats.std() / len(nats) ** 0.5:.2f}",
        "bits/dim": f"{-nats.mean() / (64 * math.log(2)):.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of processor time to train each")
    parser.add_argument("--short", action="store_true", help="two seconds of training, few draws")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.short:
        options.seconds = 2.0
    images = digits(flat=False)
    train, test = ((part * (LEVELS - 1)).round() for part in (images.train, images.test))
    rows = []
    for kind in KINDS:
        rows.append(scored(kind, train, test, options))
        print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    print("\n" + show(rows))
    write(options.csv, rows)


if __name__ == "__main__":
    main()
