"""Discrete diffusion on text: Python's own manual, letter by letter, with a small transformer that fills in the masks.

    python examples/masked_text.py [--short] [--out DIR]

Writes masked_text.png.
"""

import argparse
import math
import re
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch

import pyro_hvae as ph
from pyro_hvae.diffusion import ancestral, unmask
from pyro_hvae.nn import TokenTransformer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
steps = 20 if options.short else 3000
torch.manual_seed(0)

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
LENGTH = 32
manual = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower())
letters = torch.tensor([ALPHABET.index(letter) for letter in manual])
train, test = letters[:-20_000].unfold(0, LENGTH, 8), letters[-20_000:].unfold(0, LENGTH, LENGTH)


def text(rows):
    """Rows of integers as lines, with masks as underscores."""
    return ["".join((ALPHABET + "_")[letter] for letter in row) for row in rows.tolist()]


width, layers = (16, 1) if options.short else (128, 3)
network = TokenTransformer(LENGTH, len(ALPHABET), width, num_layers=layers)
parts = {"event_shape": LENGTH, "num_categories": len(ALPHABET)}
model, guide = ph.discrete_diffusion(network, num_layers=None, **parts)  # trained in continuous time
result = ph.fit(
    model, guide, train, bound=ph.DiffusionELBO(), steps=steps, batch_size=128, ema=0.995, log_every=steps // 10,
    progress=False, schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps),
)  # fmt: skip
bits = 1 / (LENGTH * math.log(2))
with result.averages.applied(), torch.no_grad():
    bound = ph.DiffusionELBO(1 if options.short else 50).per_datum(model, guide, test)
    error = bound.std() / len(bound) ** 0.5
    print(f"held-out text          {-bound.mean() * bits:.3f} ± {error * bits:.3f} bits a letter")
    counts = torch.bincount(letters[:-20_000], minlength=len(ALPHABET)).double()
    frequencies = (counts / counts.sum()).log()[test].sum(-1)
    print(f"letters independently  {-frequencies.mean() * bits:.3f}")
    orders, order_guide = ph.discrete_diffusion(network, num_layers=LENGTH, corruption="any_order", **parts)
    few = test[:2] if options.short else test[:50]
    for particles in (1, 4 if options.short else 32):
        value = ph.IWELBO(particles).per_datum(orders, order_guide, few).mean()
        print(f"IWELBO({particles}) over orders  {-value * bits:.3f}")

    print("\nthe program, 200 steps    one letter a step, the most confident first")
    size = 4
    for line in zip(text(ancestral(model, size, num_steps=200)), text(unmask(model, size, order="confident"))):
        print("   ".join(line))
    x, mask = test[:4], torch.rand(4, LENGTH) < 0.6
    print("\ngiven                              filled in                          was")
    shown = torch.where(mask, x, len(ALPHABET))
    for line in zip(text(shown), text(unmask(model, x=x, mask=mask)), text(x)):
        print("   ".join(line))

plt.figure(figsize=(5, 3), layout="constrained")
plt.plot(*zip(*[(record["step"], record["loss"] * bits) for record in result.history]), "o-")
plt.gca().set(xlabel="step", ylabel="bits a letter, training")
options.out.mkdir(parents=True, exist_ok=True)
plt.savefig(options.out / "masked_text.png", dpi=150)
