"""Priors of one VAE on MNIST for the same processor time: Gaussian, VampPrior, diffusion.

    python benchmarks/latent_mnist.py [--data DIR] [--minutes 10] [--only PRIOR ...] [--runs DIR] [--short]
                                      [--csv FILE] [--picture FILE]

One encoder and decoder, 784-400-200-32 and back, one thread, batch 100, Adam at 1e-3 by a cosine, weights averaged.
Images are drawn anew from their grey values whenever they are used in training; the first 2000 test images are drawn
once, by a seed of their own.  All are trained and evaluated by their ELBO, in nats an image; that of the diffusion
prior by ``DiffusionELBO``, in continuous time.  Importance-weighted bounds, K = 1000, are given where the density of
the prior is known; that of a diffusion has a bound only.

- ``Gaussian``: N(0, I).
- ``VampPrior``: a mixture of the guide's own kernel at 100 learned pseudo-images, the first 100 of the data to start
  with.  The weight of the divergence grows to 1 in the first half of the time: without that, prior and guide agree
  before the decoder has seen a latent, and stay there (the bound is then that of independent pixels, -199).
- ``diffusion``: a denoising chain over z_0, of three residual layers of 256, predicting v, which is 0 for a standard
  normal z_0: the prior starts close to the Gaussian one.  Half of the time goes to the VAE with the Gaussian prior, the
  other half to the joint bound, with encoder and decoder from there; all of the time on the joint bound gives -97.6,
  since its gradients are noisier and its steps slower.

``--picture`` draws ten images of each prior (means of p(x | z)) under ten of the data.  Rows and images are kept under
``--runs``, so that priors may be run one by one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import show, write
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.data import binarize, idx_folder
from pyro_hvae.demo import Clock
from pyro_hvae.diffusion import DenoisingChain, Diffusion, LearnedSchedule, dpm_solver
from pyro_hvae.nn import MLP, DenoisingMLP

HERE = Path(__file__).resolve().parent
HIDDEN, LATENT, PIXELS = (400, 200), 32, 784
Pair = tuple[Any, Any, Any]


def gaussian(data: Tensor, clock: Clock) -> Pair:
    return *ph.vae(PIXELS, LATENT, hidden=HIDDEN), ph.LayerwiseELBO()


def vamp(data: Tensor, clock: Clock) -> Pair:
    model, guide = ph.vae(PIXELS, LATENT, hidden=HIDDEN, prior="vamp", num_components=100)
    with torch.no_grad():
        model.kernels["z1"].inputs.copy_(binarize(data[:100]))
    return model, guide, ph.Regularised(ph.TraceELBO(), kl_weight=clock.kl_weight)


def diffusion(data: Tensor, clock: Clock) -> Pair:
    decoder = ph.Bernoulli(MLP(LATENT, PIXELS, hidden=HIDDEN[::-1]))
    encoder = ph.Gaussian(MLP(PIXELS, 2 * LATENT, hidden=HIDDEN))
    first = Clock(clock.seconds / 2, rate=clock.rate)
    plain = ph.TopDown(z0=ph.StandardNormal(LATENT), x=decoder), ph.BottomUp(z0=encoder)
    fit(*plain, ph.LayerwiseELBO(), data, first)
    clock.seconds /= 2
    schedule = LearnedSchedule(-6.0, 5.0)
    chain = DenoisingChain(
        DenoisingMLP(LATENT, 256, 3), event_shape=(LATENT,), schedule=schedule, num_layers=None, parameterisation="v"
    )
    with torch.no_grad():
        chain.denoiser.output.bias.zero_()
        chain.denoiser.output.weight.mul_(0.01)
    model = ph.TopDown(z0=chain, x=decoder)
    return model, ph.BottomUp(z0=encoder, noise=Diffusion(schedule, num_layers=None)), DiffusionELBO()


PRIORS: dict[str, Callable[[Tensor, Clock], Pair]] = {"Gaussian": gaussian, "VampPrior": vamp, "diffusion": diffusion}


def fit(model: Any, guide: Any, bound: Any, data: Tensor, clock: Clock) -> int:
    """Train until the clock ends; return the steps made."""
    result = ph.fit(
        model, guide, data, bound=bound, steps=10**7, batch_size=100, transform=binarize, seed=0, ema=0.999,
        optimizer=partial(torch.optim.Adam, lr=clock.rate, fused=True), callbacks=[clock], progress=False,
    )  # fmt: skip
    return result.steps


def trained(name: str, data: Tensor, seconds: float) -> tuple[Any, Any, int]:
    """Model, guide and the steps of the last stage."""
    torch.manual_seed(0)
    clock = Clock(seconds, rate=1e-3)
    model, guide, bound = PRIORS[name](data, clock)
    steps = fit(model, guide, bound, data, clock)
    model.eval()
    return model, guide, steps


@torch.no_grad()
def scores(name: str, model: Any, guide: Any, x: Tensor, short: bool) -> tuple[Tensor, Tensor | None]:
    """ELBO of each image, and importance-weighted bound where there is one."""
    torch.manual_seed(1)
    if name == "diffusion":
        bound = DiffusionELBO(2 if short else 64)
        return torch.cat([bound.per_datum(model, guide, part) for part in x.split(100)]), None
    weighted = ph.IWELBO(10 if short else 1000, chunk_size=50)
    elbo = ph.TraceELBO(2 if short else 64)
    return tuple(torch.cat([b.per_datum(model, guide, part) for part in x.split(100)]) for b in (elbo, weighted))


@torch.no_grad()
def drawn(name: str, model: Any, count: int) -> Tensor:
    """Means of p(x | z) for draws of the prior."""
    torch.manual_seed(2)
    latents = {"z0": dpm_solver(model.nested, count, num_steps=100)} if name == "diffusion" else {}
    return ph.decode(model, latents, size=None if latents else count).mean


def picture(rows: dict[str, Tensor], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.85 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(figure.subplots(len(rows), 1), rows.items()):
        axis.imshow(images.reshape(-1, 28, 28).transpose(0, 1).reshape(28, -1), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "mnist")
    parser.add_argument("--minutes", type=float, default=10.0, help="processor time of each training")
    parser.add_argument("--only", choices=list(PRIORS), nargs="+", default=list(PRIORS))
    parser.add_argument("--runs", type=Path, default=Path("runs/latent_mnist"))
    parser.add_argument("--short", action="store_true", help="seconds of training, few draws")
    parser.add_argument("--csv", default=None)
    parser.add_argument("--picture", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    minutes, count = (0.05, 200) if options.short else (options.minutes, 2000)
    data = idx_folder(options.data)
    x = binarize(data.test[:count], generator=torch.Generator().manual_seed(0))
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        model, guide, steps = trained(name, data.train, 60 * minutes)
        elbo, weighted = scores(name, model, guide, x, options.short)
        row = {
            "prior": name,
            "minutes": f"{minutes:g}",
            "steps": steps,
            "ELBO": f"{elbo.mean():.2f}",
            "s.e.": f"{elbo.std() / math.sqrt(count):.2f}",
            "IWELBO, K = 1000": "–" if weighted is None else f"{weighted.mean():.2f}",
        }
        torch.save({"row": row, "images": drawn(name, model, 10)}, options.runs / f"{name}.pt")
        print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    kept = [torch.load(path) for path in (options.runs / f"{name}.pt" for name in PRIORS) if path.exists()]
    rows = [one["row"] for one in kept]
    print("\n" + show(rows))
    write(options.csv, rows)
    if options.picture:
        picture({"data": data.test[:10], **{one["row"]["prior"]: one["images"] for one in kept}}, options.picture)


if __name__ == "__main__":
    main()
