"""Conjugate programs for examples.  The first model and its guide have p(z | x) and p(x) in closed form:

.. math:: z \\sim N(0, 1), \\quad x \\mid z \\sim N(z, 1), \\quad z \\mid x \\sim N(x/2, 1/2), \\quad x \\sim N(0, 2).
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["guide", "model", "two_causes"]


def model(x: Tensor) -> None:
    """Model of data x (N,): one latent z for each datum, in the plate ``"data"``."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(slope: float = 0.5, scale: float = 0.5**0.5) -> Callable[[Tensor], None]:
    """Return the guide q(z | x) = N(slope x, scale); by default the posterior.

    Example:
        >>> from pyro_hvae import TraceELBO
        >>> TraceELBO().per_datum(model, guide(), torch.tensor([0.0, 2.0]))  # log N(x; 0, 2)
        tensor([-1.2655, -2.2655])
    """

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    return program


def two_causes(x: Tensor) -> None:
    """Model of a number x ~ N(a + b, 1) with a, b ~ N(0, 1); the posterior correlation of a and b is -1/2."""
    a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
