"""Two views of one thing: an image and its label share a latent, and either view may be absent.

    python examples/multimodal.py [--short] [--out DIR]

The guide of p(z) p(image | z) p(label | z) is a product of experts: q(z | views) is p(z) times a Gaussian for each view
that is present (Wu and Goodman, 2018), so that one pair answers for images, labels, and both. Writes multimodal.png.
"""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import pyro_hvae as ph
from pyro_hvae import plots
from pyro_hvae.data import binarize, digits
from pyro_hvae.nn import MLP

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="fewer steps")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)
WIDTH = 8  # of the latent


class Model(PyroModule):
    def __init__(self):
        super().__init__("model")
        self.image, self.label = MLP(WIDTH, 64, (128,)), MLP(WIDTH, 10, (64,))

    def forward(self, image, label, seen):
        with pyro.plate("data", len(seen)):
            z = pyro.sample("z", dist.Normal(torch.zeros(WIDTH), 1.0).to_event(1))
            with pyro.poutine.mask(mask=seen[:, 0]):
                pyro.sample("image", dist.Bernoulli(logits=self.image(z)).to_event(1), obs=image)
            with pyro.poutine.mask(mask=seen[:, 1]):
                pyro.sample("label", dist.Categorical(logits=self.label(z)), obs=label)


class Guide(PyroModule):
    def __init__(self):
        super().__init__("guide")
        self.image, self.label = MLP(64, 2 * WIDTH, (128,)), MLP(10, 2 * WIDTH, (64,))

    def forward(self, image, label, seen):
        experts = self.image(image), self.label(torch.eye(10)[label])
        precision, shift = torch.ones(len(seen), WIDTH), 0.0  # of the prior
        for expert, present in zip(experts, seen.T):
            loc, log_precision = expert.chunk(2, -1)
            weight = log_precision.exp() * present[:, None]
            precision, shift = precision + weight, shift + weight * loc
        with pyro.plate("data", len(seen)):
            return pyro.sample("z", dist.Normal(shift / precision, precision**-0.5).to_event(1))


data = digits()
x, test = binarize(data.train, threshold=0.5), binarize(data.test, threshold=0.5)
labels, truth = data.train_labels, data.test_labels
seen = {name: torch.tensor(["image" in name, "label" in name]) for name in ("image and label", "image", "label")}
rows = x.repeat(3, 1), labels.repeat(3), torch.cat([kind.expand(len(x), 2) for kind in seen.values()])
model, guide = Model(), Guide()
steps = 600 if options.short else 3000
ph.fit(model, guide, rows, bound=ph.IWELBO(num_particles=5), steps=steps, lr=2e-3, seed=0, progress=False)
for name, kind in seen.items():
    found = ph.log_evidence(model, guide, test, truth, kind.expand(len(test), 2), num_samples=200)
    above = f"k-hat above {found.good:.2f} for {(found.khat > found.good).sum()} of {len(test)}"
    print(f"log p({name}): {found.value.mean():7.2f} nats, {above}")
with torch.no_grad():
    draws = [guide(test, truth, seen["image"].expand(len(test), 2)) for _ in range(100)]
    chance = torch.stack([model.label(z).softmax(-1) for z in draws]).mean(0)
    print(f"held-out labels told from the image alone: {(chance.argmax(-1) == truth).double().mean():.1%}")
    z = guide(torch.zeros(40, 64), torch.arange(10).repeat(4), seen["label"].expand(40, 2))
    figure = plots.samples(model.image(z).sigmoid(), (8, 8), columns=10)  # from labels alone, a column each
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "multimodal.png", dpi=150)
