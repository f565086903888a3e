"""A variational auto-encoder on handwritten digits: training curves, reconstructions and what a digit costs.

    python examples/vae.py [--short] [--out DIR]

Writes vae.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import pyro_hvae as ph
from pyro_hvae.data import binarize, digits
from pyro_hvae.nn import MLP, logit_of_mean

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)

data = digits()
held_out = binarize(data.test, threshold=0.5)

model = ph.TopDown(
    z=ph.StandardNormal(10),
    x=ph.Bernoulli(MLP(10, 64, (200, 200), output_bias=logit_of_mean(data.train))),
)
guide = ph.BottomUp(z=ph.Gaussian(MLP(64, 2 * 10, (200, 200))))

result = ph.fit(
    model,
    guide,
    data.train,
    bound=ph.LayerwiseELBO(),
    epochs=2 if options.short else 60,
    transform=binarize,
    validation=held_out,
    seed=0,
    log_every=15,
    progress=False,
)

print("epoch   held-out nats an image")
for record in result.history:
    if "validation_loss" in record and (options.short or record["epoch"] % 10 == 0):
        print(f"{record['epoch']:5d}   {record['validation_loss']:8.2f}")

terms = ph.LayerwiseELBO(num_particles=20).terms(model, guide, held_out)
cost = terms["kl_z"] - terms["reconstruction"]
print("\ndigit   code (nats)   pixels given the code (nats)")
for label in range(10):
    chosen = data.test_labels == label
    print(f"{label:5d}   {terms['kl_z'][chosen].mean():11.2f}   {-terms['reconstruction'][chosen].mean():28.2f}")

examples = torch.cat([held_out[cost.argsort()[:5]], held_out[cost.argsort()[-5:]]])
means = ph.reconstruct(model, guide, examples, num_draws=20)
drawn = ph.decode(model, {}, size=10).mean

figure, axes = plt.subplots(3, 10, figsize=(7, 2.4), layout="constrained")
for row, (title, images) in enumerate({"data": examples, "decoded": means, "dreamt": drawn}.items()):
    for axis, image in zip(axes[row], images):
        axis.imshow(image.detach().reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(title)
figure.suptitle("left: the cheapest held-out images, right: the dearest", fontsize=9)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "vae.png", dpi=150)
