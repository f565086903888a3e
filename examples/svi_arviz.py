"""A plain pyro.infer.SVI script that ends in ArviZ: a regression with outliers.

    python examples/svi_arviz.py [--short] [--out DIR]

Only two lines are this library's: the loss, and the tree of draws. Writes svi_arviz.nc and svi_arviz.png.
"""

import argparse
from pathlib import Path

import arviz_stats
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import xarray
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_hvae as ph
from pyro_hvae.diagnostics import loo

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
pyro.set_rng_seed(0)

dose = torch.linspace(-1, 1, 40)
response = 1.0 + 2.0 * dose + 0.3 * torch.randn(40)
response[[5, 20, 33]] += torch.tensor([3.0, -2.5, 3.5])


def model(dose, response=None, tails="heavy"):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    mean = intercept + slope * dose
    with pyro.plate("subject", len(dose)):
        noise = dist.StudentT(2.0, mean, scale) if tails == "heavy" else dist.Normal(mean, scale)
        pyro.sample("response", noise, obs=response)


figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
axis.plot(dose, response, ".", color="black")
scores = {}
for tails, style in (("heavy", "-"), ("light", "--")):
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=ph.TraceELBO(num_particles=8))
    for _ in range(20 if options.short else 1500):
        svi.step(dose, response, tails=tails)

    tree = ph.to_datatree(model, guide, dose, response, tails=tails, num_draws=2000)
    print(f"\n{tails} tails")
    print(arviz_stats.summary(tree, kind="stats"))
    scores[tails] = loo(tree)
    draws = tree["posterior"].to_dataset()
    lines = draws["intercept"] + draws["slope"] * xarray.DataArray(dose.numpy(), dims="subject")
    low, middle, high = lines.quantile([0.05, 0.5, 0.95], dim=("chain", "draw"))
    axis.plot(dose, middle, style, label=f"{tails} tails")
    axis.fill_between(dose, low, high, alpha=0.2)

print(f"\nexpected log predictive density: heavy {scores['heavy'].elpd:.1f}, light {scores['light'].elpd:.1f}")
axis.set(xlabel="dose", ylabel="response")
axis.legend(frameon=False)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "svi_arviz.png", dpi=150)
tree.to_netcdf(options.out / "svi_arviz.nc", engine="h5netcdf")
