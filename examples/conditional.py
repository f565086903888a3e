"""Conditional generation: digits on demand, by a label that every kernel sees as its context.

    python examples/conditional.py [--short] [--out DIR]

A model of p(x | label) is also a classifier: by Bayes' rule p(label | x) is proportional to p(x | label) p(label), with
log p(x | label) estimated for each of the ten labels. Writes conditional.png.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import pyro_hvae as ph
from pyro_hvae import plots
from pyro_hvae.data import binarize, digits

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)

data = digits()
labels = F.one_hot(data.train_labels, 10).float()
model, guide = ph.vae(64, 8, hidden=(128,), context_dim=10)
ph.fit(
    model,
    guide,
    {"x": data.train, "context": labels},
    bound=ph.IWELBO(num_particles=5),
    epochs=2 if options.short else 60,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    transform=lambda x, context: {"x": binarize(x), "context": context},
    seed=0,
    progress=False,
)

test = binarize(data.test, threshold=0.5)
if options.short:
    test = test[:50]
truth = data.test_labels[: len(test)]
draws = 25 if options.short else 200
scores, errors = [], []
for label in torch.eye(10):
    found = ph.log_evidence(model, guide, test, context=label.expand(len(test), 10), num_samples=draws)
    scores.append(found.value)
    errors.append(found.stderr)
scores, errors = torch.stack(scores, -1), torch.stack(errors, -1)
chance = scores.softmax(-1)  # all labels alike before the image is seen
surest, guess = chance.max(-1)
print(f"held-out digits named correctly: {(guess == truth).double().mean():.1%}")
print(f"standard error of log p(x | label): median {errors.median():.3f} nats")
print("\nchance given to the guess      how often it was right      images")
for low, high in ((0.0, 0.5), (0.5, 0.9), (0.9, 0.99), (0.99, 1.1)):
    chosen = (surest >= low) & (surest < high)
    if chosen.any():
        right = (guess == truth)[chosen].double().mean()
        print(f"{surest[chosen].mean():25.3f} {right:27.3f} {int(chosen.sum()):11d}")

rows = 5
asked = torch.eye(10).repeat(rows, 1)
images = ph.decode(model, {}, size=len(asked), context=asked).mean
real = torch.stack([data.train[data.train_labels == digit][:rows] for digit in range(10)], 1).flatten(0, 1)
figure = plots.samples(images, (8, 8), data=real, title="Conditional VAE: one column for each label asked for")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "conditional.png", dpi=150)
