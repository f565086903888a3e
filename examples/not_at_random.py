"""Not missing at random: high incomes are missing because they are high. A model that says so fills them in.

    python examples/not_at_random.py [--short] [--out DIR]

In p(z) p(x | z) p(seen | x) missing values are latent, and the chance to be seen depends on the value by a slope that
is learned (not-MIWAE: Ipsen, Mattei and Frellsen, 2021); without p(seen | x) entries are taken to be missing at random.
The table is simulated, so that the truth is known. Writes not_at_random.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import pyro_hvae as ph
from pyro_hvae.diagnostics import resample
from pyro_hvae.nn import MLP

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="fewer steps")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)

people, columns = 1000, 5  # income and savings, and three columns that are always seen; all follow one trait
truth = torch.randn(people, 1) * torch.tensor([1.0, 0.9, 0.8, -0.8, 0.6]) + 0.5 * torch.randn(people, columns)
seen = (torch.rand(people, columns) < torch.sigmoid(1.0 - 3.0 * truth)) | (torch.arange(columns) > 1)
x = torch.where(seen, truth, 0.0)


class Model(PyroModule):
    def __init__(self, says_why):
        super().__init__("model")
        self.mean, self.log_scale = torch.nn.Linear(1, columns), torch.nn.Parameter(torch.zeros(columns))
        self.why = torch.nn.Parameter(torch.zeros(2, columns)) if says_why else None  # intercepts and slopes

    def forward(self, x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            value = dist.Normal(self.mean(z), torch.exp(self.log_scale))
            missing = pyro.sample("missing", value.mask(~seen).to_event(1))  # masked entries count for nothing
            pyro.sample("x", value.mask(seen).to_event(1), obs=x)
            if self.why is not None:
                logits = self.why[0] + self.why[1] * torch.where(seen, x, missing)
                pyro.sample("seen", dist.Bernoulli(logits=logits).to_event(1), obs=seen.float())


class Guide(PyroModule):
    def __init__(self):
        super().__init__("guide")
        self.z = ph.Gaussian(MLP(2 * columns, 2, (32,)))
        self.missing = ph.Gaussian(MLP(2 * columns + 1, 2 * columns, (32,)))

    def forward(self, x, seen):
        with pyro.plate("data", len(x)):
            known = torch.cat([x, seen.float()], -1)
            z = pyro.sample("z", self.z(known))
            value = self.missing(torch.cat([z, known.expand(*z.shape[:-1], -1)], -1)).base_dist
            pyro.sample("missing", value.mask(~seen).to_event(1))

figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharey=True, layout="constrained")
gone = ~seen[:, 0]
print(f"mean income {truth[:, 0].mean():.2f}, of those that are seen {truth[~gone, 0].mean():.2f}")
for axis, (name, says_why) in zip(axes, {"missing at random": False, "not at random": True}.items()):
    pair, steps = (Model(says_why), Guide()), 400 if options.short else 3000
    ph.fit(*pair, (x, seen), bound=ph.IWELBO(num_particles=10), steps=steps, lr=5e-3, seed=0, progress=False)
    draws = resample(ph.to_datatree(*pair, x, seen, num_draws=500))["posterior"]["missing"].mean(("chain", "draw"))
    income = torch.where(seen, x, torch.as_tensor(draws.values))[:, 0]
    error = (income - truth[:, 0])[gone].square().mean().sqrt()
    print(f"{name:18s} error of a missing income {error:.2f}, mean income {income.mean():.2f}")
    axis.plot(truth[gone, 0], income[gone], ".", markersize=3)
    axis.axline((0, 0), slope=1, color="gray")
    axis.set(title=name, xlabel="missing income", ylabel="filled in")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "not_at_random.png", dpi=150)
