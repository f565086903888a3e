"""Held-out likelihood of six kinds of model after equal processor time, and evidence at equal cost.

    python benchmarks/heldout.py [--data digits | idx:DIR] [--seconds 60] [--jobs 1] [--short] [--csv FILE]
    python benchmarks/heldout.py --evidence [--seconds 60] [--short] [--csv FILE]

Binary images (cut at half the grey range), one thread, batch 100, Adam at 2e-3 by a cosine, weights averaged. All six
give log p of the same pixels in nats: VAE and IWAE (K = 10) with one layer, a three-layer HVAE and ladder VAE, a
variational diffusion model whose likelihood has two grey levels, and a diffusion of categories by masks. The two
diffusions have the same U-Net and are in continuous time, and their figure is a bound (their importance-weighted bound
would need all of their infinitely many layers).

With ``--evidence``: log p(x) of one VAE by K importance draws and by annealed importance sampling, the settings paired
so that they cost about the same, with the trained guide and with a guide that stopped early. Images are simulated from
the VAE. Both are below log p(x) on average: higher is closer.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from tables import show, write
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.data import binarize, digits, idx_folder
from pyro_hvae.demo import Clock, bernoulli_baseline
from pyro_hvae.diffusion import BinnedGaussian, LearnedSchedule
from pyro_hvae.evidence import anneal
from pyro_hvae.nn import SignDenoiser, TokenUNet, UNet

Row = dict[str, object]
DIFFUSIONS = ("VDM", "absorbing")
MODELS = ("VAE", "IWAE", "HVAE", "ladder VAE", *DIFFUSIONS)
PUBLISHED = {  # MNIST in nats, binarised at every draw, thousands of epochs; other networks than these
    "VAE": "-86.76 (Burda et al., 2016)",
    "IWAE": "-85.54, K = 5 (Burda et al., 2016)",
    "HVAE": "-85.33, two layers (Burda et al., 2016)",
    "ladder VAE": "-81.74, five layers (Sønderby et al., 2016)",
}


def trained(name: str, x: Tensor, seconds: float) -> tuple[Any, Any, int]:
    """Model, guide and steps made."""
    torch.manual_seed(0)
    width, clock = x[0].numel(), Clock(seconds, rate=2e-3)
    wide = (400, 200) if width > 100 else (128,)
    bound: Any = ph.LayerwiseELBO()
    if name in DIFFUSIONS:
        model, guide, x = diffusion(name, x)
        bound = ph.DiffusionELBO()
    elif name in ("VAE", "IWAE"):
        model, guide = ph.vae(width, 32, hidden=wide)
        bound = ph.IWELBO(num_particles=10) if name == "IWAE" else bound
    else:
        make = ph.hvae if name == "HVAE" else ph.ladder_vae
        model, guide = make(width, (32, 16, 8), hidden=wide)
        free_bits = clock.free_bits if name == "ladder VAE" else 0.0
        bound = ph.Regularised(bound, kl_weight=clock.kl_weight, free_bits=free_bits)
    result = ph.fit(
        model, guide, x, bound=bound, steps=10**7, batch_size=100, seed=0, progress=False, callbacks=[clock],
        ema=0.999,
        optimizer=partial(torch.optim.Adam, lr=clock.rate, fused=True),
    )  # fmt: skip
    return model, guide, result.steps


def as_images(name: str, x: Tensor) -> Tensor:
    """Pixels as the two diffusions take them: signs, or categories."""
    side = math.isqrt(x[0].numel())
    images = x.reshape(-1, 1, side, side)
    return images if name == "absorbing" else 2 * images - 1


def diffusion(name: str, x: Tensor) -> tuple[Any, Any, Tensor]:
    """Pair in continuous time, a U-Net of 16 and 32 channels in both, and the data that it takes."""
    images = as_images(name, x)
    shape = images.shape[1:]
    if name == "absorbing":
        net = TokenUNet(2, channels=(16, 32))
        return *ph.discrete_diffusion(net, event_shape=shape, num_categories=2, num_layers=None), images
    schedule = LearnedSchedule(-4.0, 6.0)
    pair = ph.vdm(
        SignDenoiser(UNet(1, channels=(16, 32)), event_dim=3), event_shape=shape, num_layers=None, schedule=schedule,
        likelihood=BinnedGaussian(schedule, event_dim=3, levels=2), parameterisation="x0",
    )  # fmt: skip
    return *pair, images


def split(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images = digits() if options.data == "digits" else idx_folder(options.data.removeprefix("idx:"))
    train, test = (binarize(part.flatten(1), threshold=0.5) for part in (images.train, images.test))
    return train, test[:1000]


def scored(name: str, options: argparse.Namespace) -> Row:
    """Train one of the models and evaluate it."""
    torch.set_num_threads(1)
    train, test = split(options)
    draws = 100 if options.short else 1000
    model, guide, steps = trained(name, train, options.seconds)
    model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        if name in DIFFUSIONS:
            bound = ph.DiffusionELBO(10 if options.short else 100)
            parts = as_images(name, test).split(20)
            score = elbo = torch.cat([bound.per_datum(model, guide, part) for part in parts])
            by = "ELBO"
        else:
            elbo = ph.TraceELBO(100).per_datum(model, guide, test)
            score, by = ph.IWELBO(draws, chunk_size=50).per_datum(model, guide, test), f"IWELBO, K = {draws}"
    return {
        "model": name,
        "steps": steps,
        "ELBO": f"{elbo.mean():.2f}",
        "log p(x)": f"{score.mean():.2f}",
        "s.e.": f"{score.std() / len(score) ** 0.5:.2f}",
        "by": by,
        "published, MNIST": PUBLISHED.get(name, "–"),
    }


def heldout(options: argparse.Namespace) -> Iterator[Row]:
    pixels = bernoulli_baseline(*split(options))
    shown: Row = {"model": "independent pixels", "steps": "–", "ELBO": "–", "log p(x)": f"{pixels.mean():.2f}"}
    yield shown | {"s.e.": f"{pixels.std() / len(pixels) ** 0.5:.2f}", "by": "exact", "published, MNIST": "–"}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(scored, options=options), MODELS)


def evidence(options: argparse.Namespace) -> Iterator[Row]:
    train = binarize(digits().train, threshold=0.5)
    model, guide, _ = trained("VAE", train, options.seconds)
    # A guide that stopped early, of the same model: what evidence is for is a guide that can't be trusted.
    torch.manual_seed(2)
    poor = ph.vae(64, 32, hidden=(128,))[1]
    moved = list(poor.parameters())
    optimizer = torch.optim.Adam(moved, lr=2e-3)
    for rows in torch.randint(len(train), (10 if options.short else 40, 100)):
        optimizer.zero_grad()
        loss = ph.TraceELBO().differentiable_loss(model, poor, train[rows])
        for p, g in zip(moved, torch.autograd.grad(loss, moved)):
            p.grad = g
        optimizer.step()
    count = 8
    torch.manual_seed(3)
    (images,) = ph.Problem(model)(train[:count]).simulate().problem.args

    def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
        start = time.process_time()
        value = run().detach()
        return value, 1e3 * (time.process_time() - start) / count

    sizes = [(100, 4), (1000, 40)] if options.short else [(30_000, 10), (120_000, 40)]
    for which, chosen in {"trained": guide, "stopped early": poor}.items():
        for draws, betas in sizes:
            for method, run in {
                f"IWELBO, K = {draws}": lambda draws=draws, chosen=chosen: ph.IWELBO(draws, chunk_size=500).per_datum(
                    model, chosen, images
                ),
                f"AIS, 4 chains, {betas} temperatures": lambda betas=betas, chosen=chosen: (
                    anneal(model, chosen, images, num_chains=4, betas=betas).log_weights.logsumexp(0) - math.log(4)
                ),
            }.items():
                torch.manual_seed(4)
                value, cost = timed(run)
                yield {
                    "guide": which,
                    "method": method,
                    "CPU ms an image": f"{cost:.1f}",
                    "log p(x), mean": f"{value.mean():.3f}",
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="'digits', or 'idx:DIR' in MNIST's format")
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time to train each model")
    parser.add_argument("--jobs", type=int, default=1, help="models at once; each has its own processor time")
    parser.add_argument("--evidence", action="store_true")
    parser.add_argument("--short", action="store_true", help="two seconds of training, few draws")
    parser.add_argument("--csv", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.short:
        options.seconds = 2.0
    rows = []
    for row in evidence(options) if options.evidence else heldout(options):
        rows.append(row)
        print("  ".join(f"{name}: {value}" for name, value in row.items() if value != ""), flush=True)
    print("\n" + show(rows))
    write(options.csv, rows)


if __name__ == "__main__":
    main()
