"""Anomaly detection by evidence: which images would this model not have drawn?

    python examples/anomaly.py [--short] [--out DIR]

A model of the digits 0 to 8 is asked for log p(x) of all ten. Evidence is compared with two cheaper scores by the area
under the curve, and its standard errors say for which images it can be believed. Writes anomaly.png.
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
STRANGER = 6
torch.manual_seed(0)

data = digits()
familiar = data.train[data.train_labels != STRANGER]
test = binarize(data.test, threshold=0.5)
strange = data.test_labels == STRANGER
noise = test[~strange][:40].clone()
noise = torch.where(torch.rand_like(noise) < 0.15, 1 - noise, noise)  # familiar digits, some pixels flipped

model, guide = ph.hvae(64, (12, 4), hidden=(128,))
ph.fit(
    model,
    guide,
    familiar,
    bound=ph.IWELBO(num_particles=5),
    epochs=2 if options.short else 60,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    transform=binarize,
    seed=0,
    progress=False,
)


def scores(x):
    evidence = ph.log_evidence(model, guide, x, num_samples=50 if options.short else 1000)
    return {
        "reconstruction": ph.LayerwiseELBO(20).terms(model, guide, x)["reconstruction"],
        "ELBO": ph.LayerwiseELBO(20).per_datum(model, guide, x),
        "log p(x)": evidence.value,
    }, evidence


def area(low, high):
    """Chance that a random anomaly scores below a random familiar image."""
    return (low[:, None] < high[None, :]).double().mean().item()


(known, evidence), (unknown, _), (flipped, _) = scores(test[~strange]), scores(test[strange]), scores(noise)
print(f"{'score':15s}  a {STRANGER}, never seen   15% of pixels flipped   (area under the curve)")
for name in known:
    print(f"{name:15s} {area(unknown[name], known[name]):17.3f} {area(flipped[name], known[name]):23.3f}")
print(f"\nstandard error of log p(x): median {evidence.stderr.median():.3f}, largest {evidence.stderr.max():.3f} nats")
print(f"images with a Pareto k-hat above 0.7: {(evidence.khat > 0.7).double().mean():.1%}")

figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, values in {"familiar": known, "flipped pixels": flipped, f"digit {STRANGER}": unknown}.items():
    axis.hist(values["log p(x)"], range(-64, -8, 2), density=True, histtype="step", lw=1.5, label=name)
axis.set(xlabel="log p(x), nats", ylabel="density")
axis.legend(frameon=False)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "anomaly.png", dpi=150)
