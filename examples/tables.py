"""A table with holes: fill in a fifth of the entries of the wine table, with intervals, and see whether they hold.

    python examples/tables.py [--short] [--out DIR]

Writes tables.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_wine

import pyro_hvae as ph

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)

wine = load_wine(as_frame=True)
truth = wine.data.assign(cultivar=pd.Categorical.from_codes(wine.target, list("ABC")))
frame = truth.mask(np.random.default_rng(0).random(truth.shape) < 0.2)  # removed at random, labels included

model, guide = ph.table_vae(frame, 3, hidden=(64,), min_scale=0.3)
ph.fit(
    model, guide, frame, bound=ph.IWELBO(num_particles=10), steps=20 if options.short else 300, progress=False, seed=0
)
imputed = ph.impute(model, guide, frame, num_draws=100, num_particles=200)
intervals = imputed.intervals(0.9)

print("column                         error   of the mean   inside of 90 %   entries   (errors in standard deviations)")
for name in wine.data:
    column = intervals.xs(name, level="column")
    known, sd = truth.loc[column.index, name], truth[name].std()
    error = ((column.value.astype(float) - known) ** 2).mean() ** 0.5 / sd
    plain = ((frame[name].mean() - known) ** 2).mean() ** 0.5 / sd
    inside = ((column.lower <= known) & (known <= column.upper)).mean()
    print(f"{name:28s} {error:7.2f} {plain:13.2f} {inside:16.0%} {len(column):9d}")
label = intervals.xs("cultivar", level="column")
right = (label.value == truth.loc[label.index, "cultivar"]).mean()
print(f"cultivar: {right:.0%} of {len(label)} labels filled correctly")

figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for axis, name in zip(axes, ["alcohol", "flavanoids", "proline"]):
    column = intervals.xs(name, level="column")
    known, value = truth.loc[column.index, name], column.value.astype(float)
    bars = [np.maximum(0, value - column.lower), np.maximum(0, column.upper - value)]
    axis.errorbar(known, value, yerr=bars, fmt="o", markersize=3, linewidth=0.8, alpha=0.7)
    ends = [truth[name].min(), truth[name].max()]
    axis.plot(ends, ends, color="gray", linewidth=0.8)
    axis.set(title=name, xlabel="removed value", ylabel="imputed, with 90 % interval")
figure.suptitle("VAE of the wine table: entries removed at random, and imputed")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "tables.png", dpi=150)
