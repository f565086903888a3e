"""A pair of chains that many tests use, and its data."""

import torch
from torch import nn

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.kernels import Bernoulli, Gaussian, StandardNormal


def pair(**names):
    """A two-layer model and guide over five binary variables."""
    model = TopDown(
        z2=StandardNormal(2),
        z1=Gaussian(nn.Linear(2, 6)),
        x=Bernoulli(nn.Linear(3, 5)),
        name=names.get("model", "model"),
    )
    guide = BottomUp(z1=Gaussian(nn.Linear(5, 6)), z2=Gaussian(nn.Linear(3, 4)), name=names.get("guide", "guide"))
    return model, guide


def data(size=7):
    return torch.bernoulli(torch.full((size, 5), 0.4))


def sites(trace):
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
