"""How noisy a diffusion's sampled bound is, by schedule and by how times are drawn.

    python docs/figures/vdm_variance.py [--batches 1500] [--out docs/figures]

Writes vdm_variance.csv and vdm_variance.png.  Gaussian data in five dims with the exact denoiser, whose terms are known
in closed form (lines), continuous time, gamma from -10 to 4.  The learned schedule starts nearly linear and follows the
gradient that ``DiffusionELBO`` gives it.  Numbers are variances of the mean over a batch of 64, times 64.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import CosineSchedule, LearnedSchedule, LinearSchedule, Noising, Schedule
from pyro_hvae.models import vdm

EIGENVALUES = torch.tensor([4.0, 1.0, 0.3, 0.05, 0.01])
LOW, HIGH, BATCH = -10.0, 4.0, 64
SAMPLING = {"uniform": "o", "antithetic": "s", "importance": "^"}


class ExactDenoiser(nn.Module):
    """E[x | z] of the data."""

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        level = Noising(gamma.unsqueeze(-1))
        return level.alpha * EIGENVALUES / (level.alpha**2 * EIGENVALUES + level.sigma**2) * z


def moments(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of ||eps - epshat||^2."""
    snr = torch.exp(-gamma)[..., None]
    shares = snr * EIGENVALUES / (1 + snr * EIGENVALUES)
    return shares.sum(-1), shares.sum(-1) ** 2 + 2 * (shares**2).sum(-1)


def draw(size: int) -> Tensor:
    return EIGENVALUES.sqrt() * torch.randn(size, 5)


def learned(steps: int = 300) -> Schedule:
    schedule = LearnedSchedule(LOW, HIGH, learn_ends=False)
    model, guide = vdm(ExactDenoiser(), event_shape=5, num_layers=None, schedule=schedule, parameterisation="x0")
    objective = DiffusionELBO()(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(draw(256)).backward()
        optimizer.step()
        decay.step()
    return schedule


def measured(schedule: Schedule, sampling: str, batches: int) -> float:
    """Variance of a batch's mean, times its size."""
    model, guide = vdm(ExactDenoiser(), event_shape=5, num_layers=None, schedule=schedule, parameterisation="x0")
    bound = DiffusionELBO(sampling=sampling)
    if sampling == "importance":
        for _ in range(150):
            bound.differentiable_loss(model, guide, draw(BATCH))  # times are learned in training alone
    found = [bound.terms(model, guide, draw(BATCH))["denoising_matching"].mean() for _ in range(batches)]
    return BATCH * float(torch.stack(found).var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--batches", type=int, default=1500)
    options = parser.parse_args()
    torch.manual_seed(0)
    schedules = {"cosine": CosineSchedule(LOW, HIGH), "linear": LinearSchedule(LOW, HIGH), "learned": learned()}
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    gamma = torch.linspace(LOW, HIGH, 4001, dtype=torch.float64)
    mean, square = moments(gamma)
    root = 0.5 * torch.trapezoid(square.sqrt(), gamma)
    least = float(root**2 - (0.5 * torch.trapezoid(mean, gamma)) ** 2)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = []
    for place, (name, schedule) in enumerate(schedules.items()):
        with torch.no_grad():
            level, slope = schedule.double()(t), schedule.derivative(t)
        mean, square = moments(level)
        left.semilogy(t, 0.5 * slope * square.sqrt(), label=name)
        exact = float(torch.trapezoid(0.25 * slope**2 * square, t) - torch.trapezoid(0.5 * slope * mean, t) ** 2)
        right.plot(
            [place - 0.3, place + 0.3], [exact, exact], color="0.5", label="uniform, exact" if not place else None
        )
        schedule.float()
        found = {sampling: measured(schedule, sampling, options.batches) for sampling in SAMPLING}
        for offset, (sampling, marker) in zip((-0.15, 0.0, 0.15), SAMPLING.items(), strict=True):
            label = sampling if not place else None
            right.semilogy(
                place + offset, found[sampling], marker, color=f"C{3 + list(SAMPLING).index(sampling)}", label=label
            )
        rows.append([name, f"{exact:.2f}", *(f"{value:.2f}" for value in found.values())])
        print(f"{name:8s} exact {exact:9.2f}   " + "   ".join(f"{key} {value:9.2f}" for key, value in found.items()))
    print(f"least of all schedules, uniform times: {least:.2f}")
    left.axhline(float(root), ls=":", color="0.5", label="best")
    left.set(xlabel="time t", ylabel="root mean square of the term, nats")
    left.legend(frameon=False)
    right.axhline(least, ls=":", color="0.5")
    right.set(ylabel="variance of the estimate, nats² a datum")
    right.set_yticks([200, 500, 1000, 2000, 5000], ["200", "500", "1000", "2000", "5000"])
    right.set_xticks(range(len(schedules)), list(schedules))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "vdm_variance.png", dpi=120)
    with open(options.out / "vdm_variance.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["schedule", "uniform_exact", *SAMPLING])
        writer.writerows([*rows, ["least", f"{least:.2f}", "", "", ""]])


if __name__ == "__main__":
    main()
