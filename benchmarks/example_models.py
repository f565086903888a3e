"""Models as users write them, with data simulated from themselves, for ``amortize.py``.

Many are those of Pyro's examples and tutorials, written anew: eight schools, baseball, regression with random slopes, a
mixture, topics, gamma layers, factor analysis.  A model takes its covariates and data, so that it runs on new data of
any number of groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

__all__ = ["MODELS", "Case"]


class Case(NamedTuple):
    """A model with a simulator of n data.

    Attributes:
        model: a Pyro program.
        simulate: from the number of groups to the model's arguments.
        local: whether each group has latents of its own, so that new groups can be answered for.
    """

    model: Callable[..., None]
    simulate: Callable[[int], tuple[Tensor, ...]]
    local: bool = True


def number(value: float) -> Tensor:
    return torch.tensor(value)


def of_itself(model: Callable[..., None], covariates: Callable[[int], tuple[Tensor, ...]]) -> Callable[[int], tuple]:
    """Return a simulator: the model's draw of ``y``, its last argument, given covariates."""

    def simulate(count: int) -> tuple[Tensor, ...]:
        given = covariates(count)
        y = poutine.trace(model).get_trace(*given, None).nodes["y"]["value"]
        return (*given, y)

    return simulate


def schools(error: Tensor, y: Tensor | None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(number(5.0)))
    with pyro.plate("schools", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=y)


def baseball(at_bats: Tensor, y: Tensor | None) -> None:
    mean = pyro.sample("mean", dist.Uniform(number(0.0), 1.0))
    size = pyro.sample("size", dist.LogNormal(number(3.0), 1.0))
    with pyro.plate("players", len(at_bats)):
        p = pyro.sample("p", dist.Beta(mean * size, (1 - mean) * size))
        pyro.sample("y", dist.Binomial(at_bats, p), obs=y)


def poisson_regression(x: Tensor, y: Tensor | None) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(()), 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(number(0.5)))
    with pyro.plate("groups", x.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(number(1.0), spread))
        with pyro.plate("items", x.shape[1], dim=-1):
            pyro.sample("y", dist.Poisson((level + slope * x).clamp(max=8.0).exp()), obs=y)


def random_slopes(x: Tensor, y: Tensor | None) -> None:
    noise = pyro.sample("noise", dist.HalfNormal(number(1.0)))
    with pyro.plate("patients", x.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(number(2.0), 1.0))
        slope = pyro.sample("slope", dist.Normal(number(-0.5), 0.7))
        with pyro.plate("weeks", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(level + slope * x, noise + 0.05), obs=y)


def mixture(y: Tensor | None, count: int = 200) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-4.0, 0.0, 4.0]), 1.0).to_event(1))
    with pyro.plate("data", count if y is None else len(y)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(Vindex(loc)[..., k], 1.0), obs=y)


TOPICS = torch.softmax(2 * torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), -1)


def topics(y: Tensor | None, count: int = 200) -> None:
    with pyro.plate("documents", count if y is None else len(y)):
        share = pyro.sample("share", dist.Dirichlet(torch.full((4,), 0.7)))
        pyro.sample("y", dist.Multinomial(60, share @ TOPICS.to(share)), obs=y)


def gamma_layers(y: Tensor | None, count: int = 200) -> None:
    with pyro.plate("data", count if y is None else len(y)):
        top = pyro.sample("top", dist.Gamma(2 * torch.ones(2), 1.0).to_event(1))
        mean = top @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]) + 0.1
        low = pyro.sample("low", dist.Gamma(number(3.0), 3.0 / mean).to_event(1))
        rates = low @ torch.tensor([[2.0, 0.0, 1.0, 0.5], [0.0, 2.0, 1.0, 0.5], [1.0, 1.0, 0.0, 2.0]]) + 0.1
        pyro.sample("y", dist.Poisson(rates).to_event(1), obs=y)


LOADINGS = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def factors(y: Tensor | None, count: int = 200) -> None:
    with pyro.plate("data", count if y is None else len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ LOADINGS.to(z), 0.7).to_event(1), obs=y)


def survey(x: Tensor, y: Tensor | None) -> None:
    """States, groups within states, answers within groups."""
    level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("states", x.shape[0], dim=-3):
        state = pyro.sample("state", dist.Normal(level, 0.7))
        with pyro.plate("groups", x.shape[1], dim=-2):
            group = pyro.sample("group", dist.Normal(state, 0.5))
            with pyro.plate("people", x.shape[2], dim=-1):
                pyro.sample("y", dist.Bernoulli(logits=group + 0.5 * x), obs=y)


DIFFICULTY = torch.linspace(-2, 2, 12)


def items(y: Tensor | None, count: int = 200) -> None:
    """Answers of persons to items of known difficulty."""
    with pyro.plate("persons", count if y is None else len(y)):
        ability = pyro.sample("ability", dist.Normal(torch.zeros(()), 1.0))
        logits = 1.5 * (ability[..., None] - DIFFICULTY)
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def robust(x: Tensor, y: Tensor | None) -> None:
    """Student t errors as a mixture of scales."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(()), 2.0))
    with pyro.plate("data", len(x)):
        precision = pyro.sample("precision", dist.Gamma(number(2.0), 2.0))
        pyro.sample("y", dist.Normal(slope * x, precision.rsqrt()), obs=y)


def overdispersed(exposure: Tensor, y: Tensor | None) -> None:
    shape = pyro.sample("shape", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("counties", len(exposure)):
        rate = pyro.sample("rate", dist.Gamma(shape, shape / 2.0))
        pyro.sample("y", dist.Poisson(rate * exposure), obs=y)


def frailty(x: Tensor, y: Tensor | None) -> None:
    effect = pyro.sample("effect", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("clinics", x.shape[0], dim=-2):
        frail = pyro.sample("frail", dist.Gamma(number(2.0), 2.0))
        with pyro.plate("patients", x.shape[1], dim=-1):
            pyro.sample("y", dist.Exponential(frail * (effect * x).exp()), obs=y)


def variances(y: Tensor | None, count: int = 200) -> None:
    with pyro.plate("groups", count if y is None else len(y), dim=-2):
        variance = pyro.sample("variance", dist.InverseGamma(number(4.0), 3.0))
        mean = pyro.sample("mean", dist.Normal(number(1.0), (variance / 0.5).sqrt()))
        with pyro.plate("items", 8 if y is None else y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(mean, variance.sqrt()), obs=y)


def regression(x: Tensor, y: Tensor | None) -> None:
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(x.shape[-1])).to_event(1))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[-1]), scale).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(number(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((beta * x).sum(-1), noise + 1e-3), obs=y)


def grid(items: int) -> Callable[[int], tuple[Tensor]]:
    return lambda count: (torch.randn(count, items),)


def alone(model: Callable[..., None]) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda count: (poutine.trace(model).get_trace(None, count).nodes["y"]["value"],)


MODELS = {
    "eight schools": Case(schools, of_itself(schools, lambda n: (8 + 10 * torch.rand(n),))),
    "baseball": Case(baseball, of_itself(baseball, lambda n: (torch.randint(10, 60, (n,)) + number(0.0),))),
    "Poisson regression": Case(poisson_regression, of_itself(poisson_regression, grid(6))),
    "random slopes": Case(random_slopes, of_itself(random_slopes, grid(9))),
    "mixture": Case(mixture, alone(mixture)),
    "topics": Case(topics, alone(topics)),
    "gamma layers": Case(gamma_layers, alone(gamma_layers)),
    "factor analysis": Case(factors, alone(factors)),
    "survey": Case(survey, of_itself(survey, lambda n: (torch.randn(n, 4, 5),))),
    "item response": Case(items, alone(items)),
    "robust regression": Case(robust, of_itself(robust, lambda n: (torch.randn(n),))),
    "overdispersed counts": Case(overdispersed, of_itself(overdispersed, lambda n: (0.5 + 3 * torch.rand(n),))),
    "frailty": Case(frailty, of_itself(frailty, grid(5))),
    "means and variances": Case(variances, alone(variances)),
    "sparse regression": Case(regression, of_itself(regression, lambda n: (torch.randn(n, 4),)), local=False),
}
