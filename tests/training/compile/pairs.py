"""A pair of programs whose guide runs a given function of the batch, for tests of what a graph may hold."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_hvae.bounds import TraceELBO
from pyro_hvae.training.compile import CompiledStep


class Model(PyroModule):
    def __init__(self):
        super().__init__("model")
        self.net = nn.Linear(2, 6)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    """``change(guide, x)`` returns what is added to the location."""

    def __init__(self, change=lambda guide, x: 0.0, net=None):
        super().__init__("guide")
        self.net = nn.Linear(6, 2) if net is None else net
        self.change = change

    def forward(self, x):
        loc = self.net(x) + self.change(self, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def objective_of(change=lambda guide, x: 0.0, net=None):
    torch.manual_seed(1)
    pyro.clear_param_store()
    return TraceELBO()(Model(), Guide(change, net() if net is not None else None))


def steps_of(objective, *, compiled=True, optimizer=None, **options):
    """A step that runs flat graphs, or the same step run eagerly."""
    if optimizer is None:
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    step = CompiledStep(objective, optimizer, backend="eager", **options)
    if not compiled:
        step.fallback = "the eager step to compare with"
    return step
