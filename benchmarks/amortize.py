"""Guides made from models against Pyro's AutoNormal: the bound that each reaches, and the time that new data take.

    python benchmarks/amortize.py [--models NAME ...] [--steps 1500] [--groups 200] [--csv docs/results/amortize.csv]

Both guides are trained by the same bound, steps, optimiser and schedule on the same data, simulated from the model.
ELBOs are nats a group, of 500 draws.  New data are 1000 groups: the guide of networks answers by one call, and
AutoNormal is trained on them; a column of its own has the time of 100 draws, which both have to take.  Seconds are of
the processor.
"""

import argparse
import csv
import time
from pathlib import Path

import pyro
import torch
from example_models import MODELS
from pyro.infer.autoguide import AutoNormal
from torch.optim.lr_scheduler import LambdaLR

import pyro_hvae as ph

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--groups", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--csv", type=Path)
options = parser.parse_args()
torch.set_num_threads(1)


def train(model, guide, data):
    start = time.process_time()
    ph.fit(
        model,
        guide,
        data,
        bound=ph.TraceELBO(num_particles=4),
        steps=options.steps,
        batch_size=None,
        progress=False,
        terms_every=10**6,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        schedule=lambda optimizer: LambdaLR(optimizer, lambda step: max(0.02, 1 - step / options.steps)),
    )
    return time.process_time() - start


def elbo(model, guide, data):
    """Nats of the whole data, with latents that all data share, and its standard error."""
    draws = torch.tensor([-float(ph.TraceELBO(num_particles=50).loss(model, guide, *data)) for _ in range(10)])
    return float(draws.mean()), float(draws.std() / len(draws) ** 0.5)


def hidden_from(model):
    """The model without the sites that it sums out, of which AutoNormal is to know nothing."""
    return pyro.poutine.block(model, hide_fn=lambda site: site["infer"].get("enumerate") == "parallel")


rows = []
for name in options.models:
    case = MODELS[name]
    pyro.clear_param_store()
    torch.manual_seed(options.seed)
    data, new = case.simulate(options.groups), case.simulate(1000)
    amortized = ph.amortize(case.model, *data)
    own = AutoNormal(hidden_from(case.model), init_scale=0.1)
    own(*data)
    row = {"model": name, "groups": options.groups, "steps": options.steps}
    for label, guide in (("amortized", amortized), ("autonormal", own)):
        row[f"{label} seconds"] = round(train(case.model, guide, data), 1)
        value, error = elbo(case.model, guide, data)
        row[f"{label} elbo"], row[f"{label} error"] = round(value / options.groups, 4), round(error / options.groups, 4)
    if case.local:
        with torch.no_grad():
            start = time.process_time()
            amortized(*new)
            row["new amortized"] = round(time.process_time() - start, 4)
            start = time.process_time()
            ph.Problem(case.model, amortized)(*new).run(100)
            row["100 draws"] = round(time.process_time() - start, 3)
        pyro.clear_param_store()
        again = AutoNormal(hidden_from(case.model), init_scale=0.1)
        again(*new)
        row["new autonormal"] = round(train(case.model, again, new), 2)
        row["times faster"] = round(row["new autonormal"] / row["new amortized"])
    row["difference"] = round(row["amortized elbo"] - row["autonormal elbo"], 4)
    rows.append(row)
    print(row, flush=True)

if options.csv is not None:
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
