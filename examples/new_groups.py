"""A guide from the model alone: batting averages of players that it has never seen.

    python examples/new_groups.py [--short] [--out DIR]

Each player has a talent, and was at bat a few times or often.  The guide is made from the model, trained on 300
players, and then asked about 40 new ones, whose exact posteriors are known.  Writes new_groups.png.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_hvae as ph

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)


def model(at_bats, hits):
    with pyro.plate("players", len(hits)):
        talent = pyro.sample("talent", dist.Beta(8.0, 22.0))
        pyro.sample("hits", dist.Binomial(at_bats, talent), obs=hits)


def season(players):
    at_bats = torch.randint(5, 200, (players,)).float()
    return at_bats, dist.Binomial(at_bats, dist.Beta(8.0, 22.0).sample((players,))).sample()


known = season(300)
guide = ph.amortize(model, *known, hidden=(32, 32))
print(guide.inverse)
steps = 30 if options.short else 2000
ph.fit(model, guide, known, bound=ph.TraceELBO(num_particles=4, gradient="stl"), steps=steps, batch_size=None,
       optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01), progress=False,
       schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: max(0.02, 1 - step / steps)))  # fmt: skip

at_bats, hits = season(40)
start = time.perf_counter()
talent = ph.Problem(model, guide)(at_bats, hits).run(4000).guide_trace.nodes["talent"]["value"].detach()
print(f"4000 draws for each of {len(hits)} new players in {time.perf_counter() - start:.2f} s")
exact = dist.Beta(8 + hits, 22 + at_bats - hits)
mean, spread = talent.mean(0), talent.std(0)
print(f"largest error of a mean, in standard deviations: {((mean - exact.mean) / exact.stddev).abs().max():.3f}")
print(f"largest error of a standard deviation: {(spread / exact.stddev - 1).abs().max():.1%}")

fig, axes = plt.subplots(1, 2, figsize=(8, 4), constrained_layout=True)
for axis, found, truth, what in zip(
    axes, (mean, spread), (exact.mean, exact.stddev), ("mean", "standard deviation"), strict=True
):
    axis.scatter(truth, found, c=at_bats, s=18)
    axis.axline((float(truth.mean()), float(truth.mean())), slope=1, color="grey", linewidth=0.8)
    axis.set(xlabel=f"exact {what}", ylabel=f"{what} from the guide")
options.out.mkdir(parents=True, exist_ok=True)
fig.savefig(options.out / "new_groups.png", dpi=120)
