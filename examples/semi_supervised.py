"""Semi-supervised learning: 50 labels among 1437 digits; the others are latent, and summed out exactly.

    python examples/semi_supervised.py [--short] [--out DIR]

In p(y) p(z) p(x | y, z) the digit y is never drawn: every bound of the library sums over it. A label, where there is
one, is an observation of y. The classifier is Bayes' rule in the model. Writes semi_supervised.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule

import pyro_hvae as ph
from pyro_hvae.data import binarize, digits
from pyro_hvae.nn import MLP

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
ANNOTATOR = 0.999 * torch.eye(10) + 0.0001  # one label in a thousand is wrong


class Model(PyroModule):
    def __init__(self):
        super().__init__("model")
        self.decoder = MLP(10 + 3, 64, (128,))

    def forward(self, x, label, known):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(10)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.poutine.mask(mask=known):
                pyro.sample("label", dist.Categorical(ANNOTATOR[y]), obs=label)
            digit = F.one_hot(y, 10).to(z)  # its ten values stand along a dim of their own, left of all others
            leading = torch.broadcast_shapes(digit.shape[:-1], z.shape[:-1])
            code = torch.cat([digit.expand(*leading, -1), z.expand(*leading, -1)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(code)).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__("guide")
        self.z = ph.Gaussian(MLP(64, 2 * 3, (128,)))

    def forward(self, x, label, known):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.z(x))


data, count = digits(), 50
often = torch.arange(count).repeat(27)  # so that half of a batch carries labels
test, labels = binarize(data.test, threshold=0.5), data.train_labels
known, seen = torch.arange(len(labels)) < count, torch.ones(len(test), dtype=torch.bool)
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axis, (name, n) in zip(axes, {"50 labels alone": count, "with 1387 images more": len(labels)}.items()):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pair, score = (Model(), Guide()), ph.IWELBO(5 if options.short else 50)
    fit = {"steps": 20 if options.short else 1500, "seed": 0, "progress": False}
    fit |= {"transform": lambda x, label, known: (binarize(x), label, known)}
    rows = torch.cat([often, torch.arange(count, n)])
    ph.fit(*pair, (data.train[rows], labels[rows], known[rows]), bound=ph.IWELBO(num_particles=5), **fit)

    joint = [score.per_datum(*pair, test, torch.full((len(test),), y), seen) for y in range(10)]  # log p(x, y)
    chance = torch.stack(joint, -1).softmax(-1)
    right = (chance.argmax(-1) == data.test_labels).double().mean()
    print(f"{name:25s} {right:.1%} of the test images named correctly")
    table = torch.stack([chance[data.test_labels == y].mean(0) for y in range(10)])
    axis.imshow(table.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set(title=name, xlabel="p(y | x), average", ylabel="label", xticks=range(10), yticks=range(10))
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "semi_supervised.png", dpi=150)
