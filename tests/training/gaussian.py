"""A pair whose maximum likelihood and posteriors are known, and how the tests train it."""

import functools

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

quiet = {"progress": False}
sgd = functools.partial(torch.optim.SGD, lr=0.1)


class Model(PyroModule):
    """z ~ N(m, 1), x|z ~ N(z, 1): log p(x) = log N(x; m, 2)."""

    def __init__(self):
        super().__init__("model")
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, x, data_size=None):
        size = len(x) if data_size is None else data_size
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(PyroModule):
    """q(z|x) = N(a x + b, s)."""

    def __init__(self):
        super().__init__("guide")
        self.net = nn.Linear(1, 1)
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, x, data_size=None):
        size = len(x) if data_size is None else data_size
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(self.net(x[:, None])[:, 0], self.scale))
