"""Resident memory of long runs, each in a process of its own: ``python -m tests.training.memory KIND STEPS``.

Batches have other numbers of rows and another Python float at each step.  Prints the resident memory in MB after a
warm-up, and after the run.
"""

import gc
import itertools
import random
import sys
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_hvae.bounds import IWELBO
from pyro_hvae.training import compile_step, fit
from pyro_hvae.training.compile import CompileWarning

WARM_UP = 600


class Model(PyroModule):
    """z ~ N(0, beta), x | z ~ N(net(z), 1), with an annealed Python float beta."""

    def __init__(self):
        super().__init__("model")
        self.net = nn.Linear(2, 3)

    def forward(self, x, beta, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0 + beta).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__("guide")
        self.net = nn.Linear(3, 2)

    def forward(self, x, beta, data_size=None):
        with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(self.net(x), 0.5 + beta).to_event(1))


def resident():
    """Resident memory in MB, without what is waiting to be collected."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


class Batches:
    """Batches of random sizes, with a float that changes."""

    def __init__(self, steps):
        self.steps, self.data_size = steps, 5000

    def __iter__(self):
        draw = random.Random(0)
        for step in range(self.steps):
            yield {"x": torch.randn(draw.randrange(1, 400), 3), "beta": 0.1 + step / 1e5}


class Meter:
    def __init__(self):
        self.found = []

    def on_step(self, run, loss):
        if run.step == WARM_UP:
            self.found.append(resident())


def by_fit(steps):
    meter = Meter()
    records = {"check_every": 100, "log_every": 50, "progress": False, "callbacks": [meter]}
    fit(Model(), Guide(), Batches(WARM_UP + steps), bound=IWELBO(3), steps=WARM_UP + steps, **records)
    return meter.found[0], resident()


def by_compile_step(steps):
    objective = IWELBO(3)(Model(), Guide())
    found = []
    batches = iter(Batches(WARM_UP + steps))
    first = next(batches)
    objective(**first)
    step = compile_step(objective, torch.optim.Adam(objective.parameters()), first, backend="eager")
    for batch in itertools.islice(batches, WARM_UP):
        step(**batch)
    found.append(resident())
    for batch in batches:
        step(**batch)
    assert step.graphs <= 32
    return found[0], resident()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, steps = sys.argv[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)
        print(*{"fit": by_fit, "compile_step": by_compile_step}[kind](int(steps)))
