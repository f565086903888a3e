"""A diffusion and a hierarchical VAE on MNIST for the same processor time: the bound in nats on the same images.

    python benchmarks/diffusion_mnist.py [--data DIR] [--minutes 20] [--only vdm|hvae] [--resume] [--csv FILE] [--short]

Images are drawn anew from their grey values, x ~ Bernoulli(g), whenever they are used in training; the test images are
drawn once, by a seed of their own.  Both programs define a probability of the same 784 binary pixels (the diffusion
sees them as -1 and 1), so that their bounds are one quantity.  Each is trained by ``fit`` until the process has used
``--minutes`` of processor time on it, with the learning rate going down to zero by then, and checkpoints under
``--runs`` that ``--resume`` goes on from.  Looking at the test images is not counted.

- ``vdm``: continuous time, learned schedule, a U-Net on 2 x 2 patches that predicts the image, trained by
  ``DiffusionELBO``; the evaluation is in continuous time and at T = 1000 and 100, ``--times`` layers an image.
- ``hvae``: two latent layers, bottom-up guide, trained by ``LayerwiseELBO``; the evaluation is ``TraceELBO`` with
  ``--times`` draws an image, and ``IWELBO`` with 64.

``--images`` looks at fewer test images.  The time of a run that was interrupted is what it had used by then.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.data import binarize, idx_folder
from pyro_hvae.diffusion import BinnedGaussian, LearnedSchedule, dpm_solver
from pyro_hvae.models import vdm
from pyro_hvae.nn import SignDenoiser, UNet

HERE = Path(__file__).resolve().parent
SIZE = (1, 28, 28)


def to_signs(x: Tensor) -> Tensor:
    """Grey values to pixels -1 and 1, at random."""
    return 2 * binarize(x) - 1


class Patches(nn.Module):
    """A U-Net whose pixels are the 2 x 2 patches of an image."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.fold, self.unfold = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.net = UNet(4, channels)

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        lead = z.shape[:-3]
        flat, level = z.reshape(-1, *SIZE), gamma.expand(lead).reshape(-1)
        return self.unfold(self.net(self.fold(flat), level)).reshape(z.shape)


class Clock:
    """A callback: stops training after so much processor time, and lowers the learning rate as it runs out."""

    def __init__(self, seconds: float, rate: float, warm_up: int = 200) -> None:
        self.seconds, self.rate, self.warm_up = seconds, rate, warm_up
        self.used = self.start = 0.0

    def on_start(self, run: Any) -> None:
        self.start = time.process_time() - self.used
        if self.used < self.seconds:
            run.stopped = None  # a run that had ended goes on with a longer time

    def on_step(self, run: Any, loss: Any) -> None:
        self.used = time.process_time() - self.start
        left = max(0.0, 1.0 - self.used / self.seconds)
        for group in run.optimizer.param_groups:
            group["lr"] = self.rate * min(left, (run.step + 1) / self.warm_up)
        if not left:
            run.stop("processor time")

    def state_dict(self) -> dict[str, float]:
        return {"used": self.used}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.used = state["used"]


def diffusion(channels: tuple[int, ...], num_layers: int | None) -> tuple[nn.Module, nn.Module]:
    schedule = LearnedSchedule(-4.0, 7.0)
    return vdm(
        SignDenoiser(Patches(channels), event_dim=3),
        event_shape=SIZE,
        num_layers=num_layers,
        schedule=schedule,
        likelihood=BinnedGaussian(schedule, event_dim=3, levels=2),
        parameterisation="x0",
    )


def train(
    name: str, model: nn.Module, guide: nn.Module, data: Tensor, bound: Any, transform: Any, options: Any
) -> Clock:
    clock = Clock(60 * options.minutes, options.rate)
    result = ph.fit(
        model,
        guide,
        data,
        bound=bound,
        steps=10**9,
        batch_size=options.batch_size,
        transform=transform,
        seed=0,
        clip_norm=100.0,
        run_dir=options.runs / name,
        resume=options.resume,
        checkpoint_every=500,
        terms_every=10**9,
        callbacks=[clock],
        progress=options.progress,
        log_every=100,
    )
    print(f"{name}: {result.steps} steps, {clock.used / 60:.1f} minutes of processor time", flush=True)
    return clock


def measured(bound: Any, model: nn.Module, guide: nn.Module, x: Tensor, rows: int) -> Tensor:
    """The bound for each image."""
    with torch.no_grad():
        return torch.cat([bound.per_datum(model, guide, part) for part in x.split(rows)])


def bounds_of_vdm(x: Tensor, data: Tensor, options: Any) -> list[tuple[str, Tensor, float]]:
    torch.manual_seed(1)
    model, guide = diffusion(options.channels, None)
    clock = train("vdm", model, guide, data, DiffusionELBO(), to_signs, options)
    model.eval()
    found = []
    for num_layers in (None, 1000, 100):
        same = diffusion(options.channels, num_layers)
        same[0].load_state_dict(model.state_dict())
        same[0].eval()
        torch.manual_seed(2)
        value = measured(DiffusionELBO(options.times), *same, 2 * x - 1, 200)
        label = "DiffusionELBO, continuous" if num_layers is None else f"DiffusionELBO, T={num_layers}"
        found.append((f"vdm: {label}", value, clock.used))
    terms = DiffusionELBO(options.times).terms(model, guide, (2 * x - 1)[:200])
    print("vdm, terms in nats: " + ", ".join(f"{key} {float(value.mean()):.2f}" for key, value in terms.items()))
    ends = model.schedule(torch.tensor([0.0, 1.0])).tolist()
    print(f"vdm, learned ends of gamma: {ends[0]:.2f} and {ends[1]:.2f}")
    picture(dpm_solver(model, 40, num_steps=5 if options.short else 60), options.runs / "vdm.png")
    return found


def bounds_of_hvae(x: Tensor, data: Tensor, options: Any) -> list[tuple[str, Tensor, float]]:
    torch.manual_seed(1)
    model, guide = ph.hvae(784, (64, 32), hidden=[(512, 512), (256, 256)])
    clock = train("hvae", model, guide, data.flatten(1), ph.LayerwiseELBO(), binarize, options)
    torch.manual_seed(2)
    found = []
    for label, bound in (
        ("TraceELBO", ph.TraceELBO(num_particles=options.times)),
        ("IWELBO(64)", ph.IWELBO(num_particles=64)),
    ):
        found.append((f"hvae: {label}", measured(bound, model, guide, x.flatten(1), 100), clock.used))
    with torch.no_grad():
        picture(2 * ph.decode(model, {}, size=40).mean - 1, options.runs / "hvae.png")
    return found


def picture(images: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.5), layout="constrained")
    figure.subplots().imshow(
        images.reshape(4, 10, 28, 28).transpose(1, 2).reshape(4 * 28, 10 * 28), cmap="gray_r", vmin=-1, vmax=1
    )
    figure.axes[0].set_axis_off()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "mnist")
    parser.add_argument("--minutes", type=float, default=20.0, help="processor time of each training")
    parser.add_argument("--only", choices=["vdm", "hvae"])
    parser.add_argument("--runs", type=Path, default=Path("runs/diffusion_mnist"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--times", type=int, default=8, help="layers, or draws, an image")
    parser.add_argument("--images", type=int, default=10_000, help="test images that are looked at, the first ones")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    options.channels = tuple(options.channels)
    if options.short:
        options.minutes, options.times, options.channels = 0.05, 1, (8,)
    data = idx_folder(options.data, flat=False)
    x = binarize(data.test, generator=torch.Generator().manual_seed(0))
    x = x[: 50 if options.short else options.images]
    options.runs.mkdir(parents=True, exist_ok=True)
    programs: dict[str, Callable[..., list[tuple[str, Tensor, float]]]] = {
        "vdm": bounds_of_vdm,
        "hvae": bounds_of_hvae,
    }
    rows = []
    for name, bounds in programs.items():
        if options.only in (None, name):
            rows += bounds(x, data.train, options)
    print(f"\n{len(x)} test images, binarised once; nats an image")
    table = []
    for label, value, seconds in rows:
        mean, error = float(value.mean()), float(value.std()) / math.sqrt(len(value))
        bits = -mean / (784 * math.log(2))
        print(f"{label:32s} {mean:9.3f} +- {error:.3f}   {bits:.4f} bits/dim   after {seconds / 60:.1f} min")
        table.append([label, f"{mean:.4f}", f"{error:.4f}", f"{bits:.5f}", f"{seconds / 60:.2f}", len(x)])
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["bound", "nats", "stderr", "bits_per_dim", "cpu_minutes", "images"])
            writer.writerows(table)


if __name__ == "__main__":
    main()
