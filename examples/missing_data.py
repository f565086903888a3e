"""Missing data: train on images with a third of the pixels gone, fill them in, and see whether the error bars hold.

    python examples/missing_data.py [--short] [--out DIR]

Writes missing_data.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import pyro_hvae as ph
from pyro_hvae.data import binarize, digits

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)

data = digits()
train, test = binarize(data.train, threshold=0.5), binarize(data.test, threshold=0.5)
seen_train, seen_test = torch.rand_like(train) > 1 / 3, torch.rand_like(test) > 1 / 3
# what was not seen may be anything at all, NaN included
train = torch.where(seen_train, train, torch.full_like(train, float("nan")))

model, guide = ph.vae(64, 10, hidden=(128,))
ph.fit(
    model,
    guide,
    {"x": train, "mask": seen_train},  # keywords of both programs
    bound=ph.LayerwiseELBO(),
    epochs=2 if options.short else 80,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    seed=0,
    progress=False,
)

fills = ph.impute(model, guide, test, seen_test, num_draws=20 if options.short else 200)
chance = fills.mean(0)  # how often a missing pixel was filled with ink
missing = ~seen_test
guessed = (chance[missing] > 0.5).float()
print(f"missing pixels filled correctly: {(guessed == test[missing]).float().mean():.1%}")
average = (torch.nanmean(train, 0).expand_as(test)[missing] > 0.5).float()
print(f"by the pixel's mean over the training images: {(average == test[missing]).float().mean():.1%}")

print("\nforecast: chance of ink      how often there was ink      pixels")
for low in torch.arange(0, 1, 0.2):
    chosen = missing & (chance >= low) & (chance < low + 0.2 + 1e-6)
    if chosen.any():
        print(f"{chance[chosen].mean():24.2f} {test[chosen].mean():28.2f} {int(chosen.sum()):11d}")

figure, axes = plt.subplots(4, 10, figsize=(7, 3.1), layout="constrained")
shown = torch.where(seen_test, test, torch.full_like(test, float("nan")))
rows = {"truth": test, "seen": shown, "one fill": fills[0], "chance": chance}
for row, (title, images) in zip(axes, rows.items()):
    for axis, image in zip(row, images):
        axis.imshow(image.detach().reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], facecolor="tab:orange")
    row[0].set_ylabel(title)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "missing_data.png", dpi=150)
