"""A bound of your own in fifteen lines: the jackknife of the importance-weighted bound.

    python examples/custom_bound.py [--short] [--out DIR]

A bound is a function of a run of the pair, here of its K log-weights per datum. It is tried where log p(x) is known.
Writes custom_bound.png.

Reference: Debiasing Evidence Approximations (Nowozin, 2018).
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import pyro_hvae as ph
from pyro_hvae.bounds import MultiSampleBound

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few draws only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


class JackknifeBound(MultiSampleBound):
    """K IWELBO(K) - (K - 1) mean of the K values of IWELBO(K - 1)."""

    is_bound = False  # less biased, but no longer below log p(x) for certain

    def reduce(self, log_weights):
        count = log_weights.shape[0]
        whole = log_weights.logsumexp(0) - math.log(count)
        others = log_weights.unsqueeze(0).repeat(count, *[1] * log_weights.dim())
        index = torch.arange(count)
        others[index, index] = -math.inf
        without = others.logsumexp(1) - math.log(count - 1)
        return count * whole - (count - 1) * without.mean(0)


def linear(weight):
    return ph.LinearGaussian(1, 1, weight=torch.tensor([[weight]]), bias=False, scale=1.0)


model = ph.TopDown(z=ph.StandardNormal(1), x=linear(1.0))  # x ~ N(0, 2)
guide = ph.BottomUp(z=linear(0.2))  # the posterior is N(x / 2, 1 / 2)
x = torch.ones(500 if options.short else 20_000, 1)
truth = -0.5 * math.log(4 * math.pi) - 0.25

counts, bias, error = (2, 4, 8, 16, 32), {}, {}
for kind in (ph.IWELBO, JackknifeBound):
    values = [kind(count).per_datum(model, guide, x) - truth for count in counts]
    bias[kind.__name__] = [value.mean().item() for value in values]
    error[kind.__name__] = [value.std().item() / len(x) ** 0.5 for value in values]

print(" K     bias of IWELBO          of the jackknife      (nats, with standard errors)")
for row, count in enumerate(counts):
    shown = [f"{bias[name][row]:10.5f} +- {error[name][row]:.5f}" for name in bias]
    print(f"{count:2d} {shown[0]:>22s} {shown[1]:>22s}")

figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name in bias:
    axis.errorbar(counts, bias[name], [2 * e for e in error[name]], fmt="o-", ms=3, capsize=2, label=name)
axis.axhline(0, color="gray", lw=0.8)
axis.set(xscale="log", xticks=counts, xticklabels=counts, xlabel="draws K", ylabel="bias, nats")
axis.minorticks_off()
axis.legend(frameon=False)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "custom_bound.png", dpi=150)
