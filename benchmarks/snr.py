"""Signal-to-noise ratio of the guide's gradient over K, for the pathwise, STL and DReG estimators.

    python benchmarks/snr.py [--out docs/figures]

z ~ N(0, 1), x | z ~ N(z, 1), one datum x = 1.5; the guide N(a x, exp(s)^2) with a = .35, log-scale s = -.2 (the
posterior has a = .5, s = -.35).  The ratio is |mean| / standard deviation of the gradient in a over independent
estimates, which stand as data of one plate, so that one backward pass gives them all.  Pathwise and DReG estimate the
same mean, and that of DReG is known far better: it is the signal of both, since the pathwise mean of any affordable
number of estimates is noise at large K.  STL has a mean of its own, which is not the bound's gradient for K > 1.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch

import pyro_hvae as ph

matplotlib.use("Agg")
PARTICLES = [1, 4, 16, 64, 256, 1024]
GRADIENTS = {"pathwise": "o-", "stl": "s--", "dreg": "^-."}
LABELS = {"stl": "stl (another mean)"}


def estimates(gradient: str, num_particles: int, repeats: int) -> torch.Tensor:
    slope = torch.full((repeats,), 0.35, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", repeats):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", repeats):
            a = pyro.param("a", slope)
            pyro.sample("z", dist.Normal(a * x, x.new_tensor(-0.2).exp()))

    pyro.clear_param_store()
    x = torch.full((repeats,), 1.5, dtype=torch.float64)
    ph.IWELBO(num_particles, gradient).loss_and_grads(model, guide, x)
    return pyro.get_param_store()._params["a"].grad


def moments(gradient: str, num_particles: int, repeats: int) -> tuple[float, float]:
    """|Mean| and standard deviation, in batches of 4000, which bound the memory."""
    found = torch.cat([estimates(gradient, num_particles, 4000) for _ in range(max(1, repeats // 4000))])
    return float(found.mean().abs()), float(found.std())


def ratios(num_particles: int, repeats: int) -> list[float]:
    """Signal-to-noise ratio of each estimator."""
    found = {name: moments(name, num_particles, repeats) for name in GRADIENTS}
    signal = {name: found["stl" if name == "stl" else "dreg"][0] for name in GRADIENTS}
    return [signal[name] / noise for name, (_, noise) in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--repeats", type=int, default=4_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows = [ratios(k, options.repeats) for k in PARTICLES]
    table = dict(zip(GRADIENTS, map(list, zip(*rows, strict=True)), strict=True))
    with open(options.out / "snr.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["K", *table])
        writer.writerows(zip(PARTICLES, *table.values(), strict=True))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, style in GRADIENTS.items():
        axis.loglog(PARTICLES, table[name], style, label=LABELS.get(name, name), base=2)
    guide = [table["pathwise"][0] * k**-0.5 for k in PARTICLES]
    axis.loglog(PARTICLES, guide, ":", color="0.5", label="K^(-1/2)", base=2)
    axis.set_xlabel("particles K")
    axis.set_ylabel("signal-to-noise ratio of one estimate")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out / "snr.png", dpi=120)
    for k, *values in zip(PARTICLES, *table.values(), strict=True):
        print(f"K={k:5d}  " + "  ".join(f"{name} {value:.3f}" for name, value in zip(table, values, strict=True)))


if __name__ == "__main__":
    main()
