"""A state-space model in plain Pyro, with bounds that are checked against the Kalman filter.

    python examples/state_space.py [--short] [--out DIR]

A level follows a random walk and is observed with noise. The model is an ordinary Pyro program, the guides are Pyro's
autoguides; nothing of this library's chains is used. Writes state_space.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_hvae as ph

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
pyro.set_rng_seed(1)

STEP, NOISE, LENGTH = 0.3, 0.7, 40
y = (STEP * torch.randn(LENGTH)).cumsum(0) + NOISE * torch.randn(LENGTH)


def model(y):
    # Times depend on one another, so none of this stands in a plate: steps and observations are one event each.
    steps = pyro.sample("steps", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    level = STEP * steps.cumsum(-1)
    pyro.sample("y", dist.Normal(level, NOISE).to_event(1), obs=y)


def kalman(y):
    """log p(y), and the smoothed levels with their standard deviations, from the joint Gaussian."""
    at = torch.arange(1, LENGTH + 1, dtype=y.dtype)
    walk = STEP**2 * torch.minimum(at[:, None], at[None, :])
    total = walk + NOISE**2 * torch.eye(LENGTH)
    gain = torch.linalg.solve(total, walk).mT
    spread = (walk - gain @ walk).diagonal().sqrt()
    return dist.MultivariateNormal(torch.zeros(LENGTH), total).log_prob(y), gain @ y, spread


evidence, smoothed, spread = kalman(y)
print(f"{'':24s} {'ELBO':>8s} {'IW-1000':>8s}   largest error of a standard deviation")
print(f"{'Kalman, exact':24s} {evidence:8.2f}")
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for axis, family in zip(axes, (AutoNormal, AutoMultivariateNormal)):
    pyro.clear_param_store()
    guide = family(model, init_scale=0.9)
    ph.fit(
        model,
        guide,
        y,
        bound=ph.TraceELBO(num_particles=8),
        batch_size=None,
        steps=20 if options.short else 1200,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1200),
        progress=False,
    )
    tree = ph.to_datatree(model, guide, y, num_draws=4000)
    draws = STEP * torch.as_tensor(tree["posterior"]["steps"].values[0]).cumsum(-1)
    mean, deviation = draws.mean(0), draws.std(0)
    elbo = ph.TraceELBO(1000).per_datum(model, guide, y)
    tight = ph.IWELBO(1000).per_datum(model, guide, y)
    worst = (deviation / spread - 1)[(deviation / spread - 1).abs().argmax()]
    print(f"{family.__name__:24s} {elbo:8.2f} {tight:8.2f}   {worst:+.0%}")
    axis.plot(y, ".", color="gray", ms=4)
    axis.fill_between(range(LENGTH), smoothed - 2 * spread, smoothed + 2 * spread, color="lightgray", label="exact")
    axis.plot(mean - 2 * deviation, "--", color="tab:blue", lw=1, label="guide")
    axis.plot(mean + 2 * deviation, "--", color="tab:blue", lw=1)
    axis.set(title=family.__name__, xlabel="time")
    axis.legend(frameon=False, fontsize=8)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "state_space.png", dpi=150)
