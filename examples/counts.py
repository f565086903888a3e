"""Over-dispersed counts with covariates: visits of birds to 12 feeders, as a latent-variable model with context.

    python examples/counts.py [--short] [--out DIR]

One latent number says how busy a day was; temperature and rain enter as context. Poisson and negative binomial
likelihoods are compared by evidence on held-out days. Writes counts.png.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import pyro_hvae as ph

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)

# A simulated year and a half: more birds on cold dry days, on some days for reasons of their own, and in flocks.
days, feeders = 600, 12
weather = torch.stack([torch.randn(days), (torch.rand(days) < 0.3).float()], -1)
busy = torch.randn(days, 1)
taste = torch.linspace(-0.8, 0.8, feeders)
log_rate = 1.0 - 0.5 * weather[:, :1] - 0.8 * weather[:, 1:] + 0.6 * busy * (1 + taste) + taste
flocks = torch.distributions.Gamma(2.0, 2.0).sample((days, feeders))
visits = torch.poisson(log_rate.exp() * flocks)
train, test = slice(0, 450), slice(450, days)

draws = 200 if options.short else 2000
results = {}
for likelihood in ("poisson", "negative_binomial"):
    torch.manual_seed(0)
    model, guide = ph.vae(feeders, 1, hidden=(32,), likelihood=likelihood, context_dim=2)
    ph.fit(
        model,
        guide,
        {"x": visits[train], "context": weather[train]},
        bound=ph.IWELBO(num_particles=5),
        epochs=5 if options.short else 200,
        batch_size=50,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        seed=0,
        progress=False,
    )
    found = ph.log_evidence(model, guide, visits[test], context=weather[test], num_samples=draws)
    results[likelihood] = model, found

print("likelihood            log p(a held-out day)   standard error of the estimate, median")
for name, (_, found) in results.items():
    print(f"{name:20s} {found.value.mean():18.2f} {found.stderr.median():20.3f}")

model, _ = results["negative_binomial"]
cold_dry, warm_wet = torch.tensor([-1.0, 0.0]).repeat(4000, 1), torch.tensor([1.0, 1.0]).repeat(4000, 1)
print("\nvisits a day, all feeders:  mean   90% of days within")
for name, context in {"cold and dry": cold_dry, "warm and wet": warm_wet}.items():
    total = model(context=context).detach().sum(-1)  # sampling is the program, without data
    low, high = total.quantile(torch.tensor([0.05, 0.95]))
    print(f"{name:26s} {total.mean():6.1f}   {low:.0f} to {high:.0f}")

figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
edges = range(0, 41, 2)
axis.hist(visits[test].flatten(), edges, density=True, color="lightgray", label="held-out days")
for (name, (model, _)), style in zip(results.items(), ("--", "-")):
    drawn = model(context=weather[test].repeat(20, 1)).detach().flatten()
    axis.hist(drawn, edges, density=True, histtype="step", ls=style, label=name.replace("_", " "))
axis.set(xlabel="visits to one feeder", ylabel="share of days", yscale="log")
axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1.0))
figure.suptitle("Conditional VAEs of counts: held-out days and draws")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "counts.png", dpi=150)
