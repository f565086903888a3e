"""One layer, three layers, and a ladder of three on the same digits: what does depth buy, and which layers are used?

    python examples/hierarchies.py [--short] [--out DIR]

Writes hierarchies.png.
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
data = digits()
held_out = binarize(data.test, threshold=0.5)

pairs = {}
for name, make in {
    "VAE": lambda: ph.vae(64, 12, hidden=(128,)),
    "HVAE": lambda: ph.hvae(64, (12, 8, 4), hidden=(128,)),
    "ladder": lambda: ph.ladder_vae(64, (12, 8, 4), hidden=(128,)),
}.items():
    torch.manual_seed(0)
    model, guide = make()
    ph.fit(
        model,
        guide,
        data.train,
        # the divergences fade in over the first 150 steps, so that the upper layers have time to become useful
        bound=ph.Regularised(ph.LayerwiseELBO(), kl_weight=lambda step: min(1.0, step / 150)),
        epochs=2 if options.short else 60,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        transform=binarize,
        seed=0,
        progress=False,
    )
    pairs[name] = model, guide

print(f"{'':8s} {'ELBO':>8s} {'IW-500':>8s}   nats a layer, from z1 up ('kl' a true divergence, 'rate' an average)")
layers = {}
for name, (model, guide) in pairs.items():
    terms = {key: value.mean() for key, value in ph.LayerwiseELBO(20).terms(model, guide, held_out).items()}
    layers[name] = {key: terms[key] for key in sorted(terms, key=lambda key: key[-1]) if key != "reconstruction"}
    elbo = terms["reconstruction"] - sum(layers[name].values())
    tight = ph.IWELBO(50 if options.short else 500).per_datum(model, guide, held_out).mean()
    shown = "  ".join(f"{key} {value:.2f}" for key, value in layers[name].items())
    print(f"{name:8s} {elbo:8.2f} {tight:8.2f}   {shown}")

figure, axes = plt.subplots(3, 11, figsize=(8, 2.4), layout="constrained", width_ratios=[3.0] + [1.0] * 10)
for row, (name, (model, _)) in zip(axes, pairs.items()):
    row[0].barh(list(layers[name]), [float(value) for value in layers[name].values()], color="gray")
    row[0].set_title(name, fontsize=8)
    row[0].tick_params(labelsize=6)
    for axis, image in zip(row[1:], ph.decode(model, {}, size=10).mean):
        axis.imshow(image.detach().reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_axis_off()
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "hierarchies.png", dpi=150)
