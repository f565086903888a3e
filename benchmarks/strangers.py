"""Eleven models of posteriordb as Pyro programs, in the order of their reference draws; see ``posteriordb.py``.

Vectors are events, so that a value has the draws' dim in front.  Sites are named as in the reference; what the
reference has beside them is deterministic.  Flat priors are improper, and densities that are no product of simple
distributions are factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["MODELS"]


def flat(name: str, support: Any = constraints.real, size: int | None = None) -> Tensor:
    event = () if size is None else (size,)
    return pyro.sample(name, dist.ImproperUniform(support, (), event))


def normal(size: int, sd: float) -> Any:
    return dist.Normal(torch.zeros(size), sd).to_event(1)


def observed(mean: Tensor, sd: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Normal(mean, sd[..., None]).to_event(1), obs=y)


def together(*parts: Tensor, dim: int = -1) -> Tensor:
    """Stack values of which some may have the draws' dim and others not."""
    return torch.stack(torch.broadcast_tensors(*parts), dim)


def linear(beta: Tensor, covariates: Tensor) -> Tensor:
    return (beta[..., None, :] * covariates).sum(-1)


def autoregression(data: Mapping[str, Any]) -> Callable[[], None]:
    order, y = data["K"], torch.tensor(data["y"])
    lags = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Normal(torch.zeros(()), 10.0))
        beta = pyro.sample("beta", normal(order, 10.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(torch.tensor(2.5)))
        observed(alpha[..., None] + linear(beta, lags), sigma, y[order:])

    return model


def moving_average(data: Mapping[str, Any]) -> Callable[[], None]:
    y = torch.tensor(data["y"])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 10.0))
        phi, theta = (pyro.sample(name, dist.Normal(torch.zeros(()), 2.0)) for name in ("phi", "theta"))
        sigma = pyro.sample("sigma", dist.HalfCauchy(torch.tensor(2.5)))
        errors = [y[0] - mu - phi * mu]
        for before, now in itertools.pairwise(y.unbind()):
            errors.append(now - (mu + phi * before + theta * errors[-1]))
        pyro.factor("likelihood", dist.Normal(0.0, sigma[..., None]).log_prob(together(*errors)).sum(-1))

    return model


def schools(data: Mapping[str, Any]) -> Callable[[], None]:
    y, error = torch.tensor(data["y"]).to(torch.get_default_dtype()), torch.tensor(data["sigma"])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        raw = pyro.sample("theta_trans", normal(len(y), 1.0))
        theta = pyro.deterministic("theta", mu[..., None] + tau[..., None] * raw, event_dim=1)
        pyro.sample("y", dist.Normal(theta, error).to_event(1), obs=y)

    return model


def garch(data: Mapping[str, Any]) -> Callable[[], None]:
    y, first = torch.tensor(data["y"]), data["sigma1"]

    def model() -> None:
        mu, alpha0 = flat("mu"), flat("alpha0", constraints.positive)
        alpha1 = pyro.sample("alpha1", dist.Uniform(torch.zeros(()), 1.0))
        share = pyro.sample("share", dist.Uniform(torch.zeros(()), 1.0))
        beta1 = pyro.deterministic("beta1", share * (1 - alpha1))
        variances = [torch.full_like(mu, first**2)]
        for before in y[:-1]:
            variances.append(alpha0 + alpha1 * (before - mu) ** 2 + beta1 * variances[-1])
        sd = together(*variances).sqrt()
        pyro.factor("likelihood", dist.Normal(mu[..., None], sd).log_prob(y).sum(-1) + torch.log1p(-alpha1))

    return model


def kernel(x: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
    distance = (x[:, None] - x) ** 2
    return alpha[..., None, None] ** 2 * (-distance / (2 * rho[..., None, None] ** 2)).exp()


def length_and_size() -> tuple[Tensor, Tensor]:
    rho = pyro.sample("rho", dist.Gamma(torch.tensor(25.0), 4.0))
    return rho, pyro.sample("alpha", dist.HalfNormal(torch.tensor(2.0)))


def counts(data: Mapping[str, Any]) -> Callable[[], None]:
    x, k = torch.tensor(data["x"]), torch.tensor(data["k"]).to(torch.get_default_dtype())

    def model() -> None:
        rho, alpha = length_and_size()
        raw = pyro.sample("f_tilde", normal(len(x), 1.0))
        factor = torch.linalg.cholesky(kernel(x, rho, alpha) + 1e-10 * torch.eye(len(x)))
        f = pyro.deterministic("f", (factor @ raw[..., None])[..., 0], event_dim=1)
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)

    return model


def smooth(data: Mapping[str, Any]) -> Callable[[], None]:
    x, y = torch.tensor(data["x"]), torch.tensor(data["y"])

    def model() -> None:
        rho, alpha = length_and_size()
        sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0)))
        covariance = kernel(x, rho, alpha) + sigma[..., None, None] * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)

    return model


def hidden_markov(data: Mapping[str, Any]) -> Callable[[], None]:
    y = torch.tensor(data["y"])

    def model() -> None:
        rows = [pyro.sample(name, dist.Dirichlet(torch.ones(2))) for name in ("theta1", "theta2")]
        low, gap = flat("low", constraints.positive), flat("gap", constraints.positive)
        mu = pyro.deterministic("mu", together(low, low + gap), event_dim=1)
        transition = together(*rows, dim=-2).log()
        emission = dist.Normal(mu[..., None, :], 1.0).log_prob(y[:, None])
        forward = emission[..., 0, :]
        for t in range(1, len(y)):
            forward = (forward[..., None] + transition).logsumexp(-2) + emission[..., t, :]
        prior = dist.Normal(torch.tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1)
        pyro.factor("likelihood", forward.logsumexp(-1) + prior)

    return model


def warming(data: Mapping[str, Any]) -> Callable[[], None]:
    x, y = torch.tensor(data["x"]).to(torch.get_default_dtype()), torch.tensor(data["y"])

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Normal(torch.tensor(float(data["pmualpha"])), data["psalpha"]))
        beta = pyro.sample("beta", dist.Normal(torch.tensor(float(data["pmubeta"])), data["psbeta"]))
        observed(alpha[..., None] + beta[..., None] * x, flat("sigma", constraints.positive), y)

    return model


def mixture(data: Mapping[str, Any]) -> Callable[[], None]:
    y = torch.tensor(data["y"])

    def model() -> None:
        low, gap = flat("low"), flat("gap", constraints.positive)
        mu = pyro.deterministic("mu", together(low, low + gap), event_dim=1)
        sigma = pyro.sample("sigma", dist.HalfNormal(2 * torch.ones(2)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(torch.tensor(5.0), 5.0))
        share = together(theta, 1 - theta).log()
        component = dist.Normal(mu[..., None, :], sigma[..., None, :])
        parts = share[..., None, :] + component.log_prob(y[:, None])
        prior = dist.Normal(0.0, 2.0).log_prob(mu).sum(-1)
        pyro.factor("likelihood", parts.logsumexp(-1).sum(-1) + prior)

    return model


def survey(data: Mapping[str, Any]) -> Callable[[], None]:
    def column(name: str) -> Tensor:
        return torch.tensor(data[name]).to(torch.get_default_dtype())

    age, y = column("age_discrete"), column("partyid7")
    groups = [(age == group).to(y.dtype) for group in (2, 3, 4)]
    rest = [column(name) for name in ("educ1", "gender", "income")]
    covariates = torch.stack([torch.ones_like(y), column("real_ideo"), column("race_adj"), *groups, *rest], -1)

    def model() -> None:
        beta, sigma = flat("beta", constraints.real_vector, 9), flat("sigma", constraints.positive)
        observed(linear(beta, covariates), sigma, y)

    return model


def regression(data: Mapping[str, Any]) -> Callable[[], None]:
    covariates, y = torch.tensor(data["X"]), torch.tensor(data["y"])

    def model() -> None:
        beta = pyro.sample("beta", normal(data["D"], 10.0))
        observed(linear(beta, covariates), pyro.sample("sigma", dist.HalfNormal(torch.tensor(10.0))), y)

    return model


MODELS: dict[str, Callable[[Mapping[str, Any]], Callable[[], None]]] = {
    "arK-arK": autoregression,
    "arma-arma11": moving_average,
    "eight_schools-eight_schools_noncentered": schools,
    "garch-garch11": garch,
    "gp_pois_regr-gp_pois_regr": counts,
    "gp_pois_regr-gp_regr": smooth,
    "hmm_example-hmm_example": hidden_markov,
    "kilpisjarvi_mod-kilpisjarvi": warming,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "nes2000-nes": survey,
    "sblrc-blr": regression,
}
