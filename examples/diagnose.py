"""Fit, diagnose, fix what the report says, diagnose again: eight schools, and a hierarchy of digits.

    python examples/diagnose.py [--short] [--out DIR]

Writes diagnose.txt and diagnose.png.
"""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_hvae as ph
from pyro_hvae import plots
from pyro_hvae.data import binarize, digits
from pyro_hvae.diagnostics import khats

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--short", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)
pyro.set_rng_seed(0)
steps = 100 if options.short else 3000
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y: torch.Tensor, centred: bool) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        if centred:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


lines = []
for centred in (True, False):
    pyro.clear_param_store()
    guide = AutoNormal(schools)
    svi = pyro.infer.SVI(schools, guide, pyro.optim.Adam({"lr": 0.02}), ph.TraceELBO(8))
    for _ in range(steps):
        svi.step(y, centred)
    lines += [
        f"eight schools, {'centred' if centred else 'non-centred'}",
        str(ph.diagnose(schools, guide, y, centred)),
        "",
    ]

x = binarize(digits().train, threshold=0.5)
held_out = binarize(digits().test, threshold=0.5)[:100]
model, guide = ph.hvae(64, (12, 6, 4), hidden=(64,))
ph.fit(model, guide, x, bound=ph.LayerwiseELBO(), steps=steps, batch_size=100, progress=False)
lines += ["digits, after training", str(ph.diagnose(model, guide, held_out, calibration=True)), ""]

objective = ph.WakePhase(10)(model, guide)  # the guide alone, towards covering the posterior
optimizer = torch.optim.Adam(guide.parameters(), lr=1e-3)
for _ in range(steps // 3):
    rows = torch.randint(len(x), (100,))
    optimizer.zero_grad()
    (objective(x[rows]) / 100).backward()
    optimizer.step()
lines += ["digits, after a wake phase of the guide", str(ph.diagnose(model, guide, held_out, calibration=True))]

text = "\n".join(lines)
print(text)
(options.out / "diagnose.txt").write_text(text + "\n")
plots.khat_scatter(khats(model, guide, held_out, num_draws=500)).savefig(options.out / "diagnose.png", dpi=150)
