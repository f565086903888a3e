"""A posterior with two modes, and the products closest to it by either direction of the divergence.

    python docs/figures/two_modes.py [--out docs/figures]

Writes two_modes.png and two_modes.csv.  A page can draw the same with ``two_modes.picture(two_modes.fit())``.  The
posterior is a mixture of two tilted Gaussians in the plane.  The forward product has its marginals' moments and covers
both modes; the reverse one settles in a mode, which one depends on the start.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_hvae as ph
from pyro_hvae.factorized import Comparison

MEANS = torch.tensor([[-1.6, -1.6], [1.6, 1.6]])
COVARIANCE = torch.tensor([[1.0, 0.7], [0.7, 1.0]])
SHARES = torch.tensor([0.4, 0.6])
TITLES = {
    "forward": "KL(p‖q): both modes",
    "reverse, from the left": "KL(q‖p): one local optimum",
    "reverse, from the right": "KL(q‖p): the other one",
}


def posterior() -> dist.MixtureSameFamily:
    return dist.MixtureSameFamily(dist.Categorical(SHARES), dist.MultivariateNormal(MEANS, COVARIANCE))


def model() -> Tensor:
    return pyro.sample("z", posterior())


def fit(seed: int = 0) -> Comparison:
    """Fit the three products and compare them."""
    pyro.set_rng_seed(seed)
    guides = {
        "forward": ph.forward_kl(model, num_samples=20_000),
        "reverse, from the left": ph.reverse_kl(model, start={"z": torch.tensor([-1.6, -1.6])}, num_steps=500),
        "reverse, from the right": ph.reverse_kl(model, start={"z": torch.tensor([1.6, 1.6])}, num_steps=500),
    }
    return ph.compare_guides(model, guides=guides, num_samples=4000)


def picture(found: Comparison) -> object:
    """A matplotlib figure: the posterior's contours in grey, each product's in colour."""
    from matplotlib.figure import Figure

    axis = torch.linspace(-6.0, 6.0, 201)
    first, second = torch.meshgrid(axis, axis, indexing="xy")
    points = torch.stack([first, second], -1)
    truth = posterior().log_prob(points).exp()
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for row, (panel, (name, guide)) in enumerate(zip(panels, found.guides.items(), strict=True)):
        density = guide.distribution("z").log_prob(points).exp()
        shares = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8])
        panel.contourf(first, second, truth, levels=[*(shares * truth.max()), truth.max()], cmap="Greys", alpha=0.7)
        panel.contour(first, second, density, levels=shares * density.max(), colors=f"C{min(row, 1)}", linewidths=1.3)
        panel.set_title(TITLES[name], fontsize=10)
        panel.text(
            0.97,
            0.03,
            f"KL(p‖q) {float(found.forward[row]):.2f}\nKL(q‖p) {float(found.reverse[row]):.2f}",
            transform=panel.transAxes,
            ha="right",
            va="bottom",
            fontsize=9,
        )
        panel.set(aspect="equal", xlabel="$z_1$", xlim=(-6, 6), ylim=(-6, 6), xticks=(-4, 0, 4), yticks=(-4, 0, 4))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("$z_2$")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    options = parser.parse_args()
    found = fit()
    print(found)
    options.out.mkdir(parents=True, exist_ok=True)
    picture(found).savefig(options.out / "two_modes.png", dpi=120)
    with open(options.out / "two_modes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["guide", "forward_kl", "reverse_kl", "khat"])
        for row, name in enumerate(found.names):
            writer.writerow([name, *(f"{float(c[row]):.3f}" for c in (found.forward, found.reverse, found.khat))])


if __name__ == "__main__":
    main()
