r"""A linear-Gaussian state space written by hand as a pair of Pyro programs that list their sites (oracle 11).

.. math:: z_1\sim N(0, s_1^2),\quad z_t\sim N(a z_{t-1}, s^2),\quad x_t\sim N(c z_t, r^2)

The Kalman filter gives log p(x), the backward information filter p(x_{t+1:T} | z_t) = exp(-J z^2/2 + h z + k), and both
together the exact conditionals p(z_t | z_{t-1}, x_{t:T}).  All is differentiable in the parameters.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

ORACLE_X = (0.3, -1.2, 0.7, 2.0, -0.4)
ORACLE_EVIDENCE = -8.8038795


class Linear(PyroModule):
    """The model; x (N, T)."""

    def __init__(self, a: float = 0.9, variance: float = 0.25, c: float = 1.0, noise: float = 0.64) -> None:
        super().__init__("model")
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.log_s = nn.Parameter(torch.tensor(0.5 * math.log(variance), dtype=torch.float64))
        self.log_r = nn.Parameter(torch.tensor(0.5 * math.log(noise), dtype=torch.float64))
        self.c = c

    def transition(self, before: Tensor | None) -> dist.Normal:
        one = torch.ones((), dtype=torch.float64)
        return dist.Normal(0 * one, one) if before is None else dist.Normal(self.a * before, self.log_s.exp())

    def emission(self, z: Tensor) -> dist.Normal:
        return dist.Normal(self.c * z, self.log_r.exp())

    def forward(self, x: Tensor, visit=None):
        if visit is not None:
            return visit(self)
        z = None
        with pyro.plate("data", x.shape[0], dim=-1):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z{t}", self.transition(z))
                pyro.sample(f"x{t}", self.emission(z), obs=x[:, t])

    def stepwise(self, x: Tensor):
        nodes = []
        for t in range(x.shape[1]):
            before = (f"z{t - 1}",) if t else ()
            nodes.append(("factor", f"z{t}", (*before, f"z{t}"), self._prior))
            nodes.append(("factor", f"x{t}", (f"z{t}",), lambda z, t=t: self.emission(z).log_prob(x[:, t])))
        return nodes

    def _prior(self, *values: Tensor) -> Tensor:
        before, z = (None, *values)[-2:]
        return self.transition(before).log_prob(z)

    def kalman(self, x: Tensor) -> Tensor:
        """log p(x) (N,)."""
        s2, r2 = (2 * self.log_s).exp(), (2 * self.log_r).exp()
        mean, var, total = x.new_zeros(len(x)), x.new_ones(()), x.new_zeros(len(x))
        for t in range(x.shape[1]):
            if t:
                mean, var = self.a * mean, self.a**2 * var + s2
            spread = self.c**2 * var + r2
            total = total + dist.Normal(self.c * mean, spread.sqrt()).log_prob(x[:, t])
            gain = self.c * var / spread
            mean, var = mean + gain * (x[:, t] - self.c * mean), (1 - self.c * gain) * var
        return total

    def information(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(J, h, k) of log p(x_{t+1:T} | z_t) for each t."""
        s2, r2, a, c = (2 * self.log_s).exp(), (2 * self.log_r).exp(), self.a, self.c
        J, h, k = x.new_zeros(()), x.new_zeros(len(x)), x.new_zeros(len(x))
        found = [(J, h, k)]
        for t in range(x.shape[1] - 1, 0, -1):
            J, h = J + c**2 / r2, h + c * x[:, t] / r2
            k = k - 0.5 * x[:, t] ** 2 / r2 - 0.5 * (2 * math.pi * r2).log()
            total = 1 + J * s2
            k = k - 0.5 * total.log() + 0.5 * h**2 * s2 / total
            J, h = a**2 * J / total, a * h / total
            found.append((J, h, k))
        return found[::-1]

    def twist(self, step: int, z: Tensor, x: Tensor) -> Tensor:
        J, h, k = self.information(x)[step]
        return -0.5 * J * z**2 + h * z + k


class Bootstrap(PyroModule):
    """The guide that draws from the model's transitions; ``exact`` draws p(z_t | z_{t-1}, x_{t:T})."""

    def __init__(self, model: Linear, exact: bool = False, wide: float = 1.0) -> None:
        super().__init__("guide")
        self._held = (model,)
        self.exact = exact
        self.wide = wide

    def draw(self, t: int, before: Tensor | None, x: Tensor) -> dist.Normal:
        model = self._held[0]
        prior = model.transition(before)
        if not self.exact:
            return dist.Normal(prior.loc, prior.scale * self.wide)
        J, h, _ = model.information(x)[t]
        r2 = (2 * model.log_r).exp()
        precision = prior.scale**-2 + J + model.c**2 / r2
        mean = (prior.loc * prior.scale**-2 + h + model.c * x[:, t] / r2) / precision
        return dist.Normal(mean, precision.rsqrt())

    def forward(self, x: Tensor, visit=None):
        if visit is not None:
            return visit(self)
        z = None
        with pyro.plate("data", x.shape[0], dim=-1):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z{t}", self.draw(t, z, x))

    def stepwise(self, x: Tensor):
        return [
            ("draw", f"z{t}", (f"z{t - 1}",) if t else (), lambda *z, t=t: self.draw(t, z[0] if t else None, x))
            for t in range(x.shape[1])
        ]


def oracle(copies: int = 1) -> Tensor:
    """Oracle 11's sequence, (copies, 5)."""
    return torch.tensor(ORACLE_X, dtype=torch.float64).expand(copies, -1)
