"""Gradients and closed forms that hold under conditions, on programs that do not meet the conditions."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from tests.kinds.outcomes import outcome, right_or_refused

T = torch.tensor


def standard():
    return dist.Normal(torch.zeros(()), 1.0)


# --- the support of a guide's site depends on its parameters


class SupportGuide(pyro.nn.PyroModule):
    def __init__(self, family, values, plate=0):
        super().__init__()
        self.family, self.plate = family, plate
        self.values = nn.Parameter(T(values))

    def forward(self):
        if self.plate:
            with pyro.plate("data", self.plate):
                pyro.sample("z", self.family(*self.values))
        else:
            pyro.sample("z", self.family(*self.values))


class WideModel(pyro.nn.PyroModule):
    def __init__(self, plate=0):
        super().__init__()
        self.plate = plate

    def forward(self):
        if self.plate:
            with pyro.plate("data", self.plate):
                pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))
        else:
            pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))


def shifted_exponential(low):
    return dist.TransformedDistribution(dist.Exponential(1.0), [transforms.AffineTransform(low, 1.0)])


def shifted_gamma(low):
    return dist.TransformedDistribution(dist.Gamma(T(1.0), T(2.0)), [transforms.AffineTransform(low, T(1.0))])


SUPPORTS = {  # family, parameters, quantile function of a uniform
    "both ends": (lambda c, s: dist.Uniform(c - s, c + s), [0.3, 0.8], lambda u, c, s: c - s + 2 * s * u),
    "in a plate of one": (lambda a: dist.Uniform(-1.0, a), [1.4], lambda u, a: -1 + (a + 1) * u),
    "pareto": (lambda a: dist.Pareto(a, T(4.0)), [0.8], lambda u, a: a * (1 - u) ** -0.25),
    "affine beta": (lambda a: dist.AffineBeta(T(1.0), T(1.0), T(-0.5), a), [1.7], lambda u, a: -0.5 + a * u),
    "shifted exponential": (shifted_exponential, [0.4], lambda u, a: a - torch.log1p(-u)),
    "shifted gamma": (shifted_gamma, [0.4], lambda u, a: a - torch.log1p(-u) / 2),
    "generalised pareto": (
        lambda a: dist.GeneralizedPareto(a, T(1.0), T(0.05)),
        [0.2],
        lambda u, a: a + ((1 - u) ** -0.05 - 1) / 0.05,
    ),
}


def support_truth(family, values, quantile, num_particles=1):
    """Gradient of minus IWELBO(K) for K = 1, 2, by the midpoint rule over the uniforms."""
    leaf = [T(value).requires_grad_() for value in values]
    u = (torch.arange(4000 if num_particles == 1 else 600) + 0.5) / (4000 if num_particles == 1 else 600)
    z = quantile(u, *leaf)
    log_weight = dist.Normal(0.0, 2.0).log_prob(z) - family(*leaf).log_prob(z)
    if num_particles == 2:
        log_weight = torch.logaddexp(log_weight[:, None], log_weight) - math.log(2)
    return torch.stack(torch.autograd.grad(-log_weight.mean(), leaf))


def gradient(bound, model, guide, repeats=1):
    """Mean gradient of the loss for all parameters of the guide."""
    return torch.autograd.grad(
        sum(bound.differentiable_loss(model, guide) for _ in range(repeats)) / repeats, guide.values
    )[0]


@pytest.mark.parametrize("name", SUPPORTS)
def test_sticking_the_landing_where_the_support_moves(name):
    family, values, quantile = SUPPORTS[name]
    plate = 1 if name == "in a plate of one" else 0
    right_or_refused(
        lambda: gradient(ph.TraceELBO(40_000, "stl"), WideModel(plate), SupportGuide(family, values, plate)),
        support_truth(family, values, quantile),
        0.05,
        names=[r"\bz\b"],
    )


@pytest.mark.parametrize("name", SUPPORTS)
def test_doubly_reparameterised_gradient_where_the_support_moves(name):
    family, values, quantile = SUPPORTS[name]
    copies = 20_000  # independent estimates, as data of one plate
    bound = ph.IWELBO(2, "dreg")
    right_or_refused(
        lambda: gradient(bound, WideModel(copies), SupportGuide(family, values, copies)) / copies,
        support_truth(family, values, quantile, 2),
        0.05,
        names=[r"\bz\b"],
    )


def test_a_support_that_moves_with_a_draw_alone_is_right():
    """z1 ~ N(a, 1), z2 ~ U(z1 - 1, z1 + 1): no end depends on a parameter given z1; a guard."""

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(T([0.7]))

        def forward(self):
            z1 = pyro.sample("z1", dist.Normal(self.values[0], 1.0))
            pyro.sample("z", dist.Uniform(z1 - 1.0, z1 + 1.0))

    def model():
        pyro.sample("z1", standard())
        pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))

    # minus ELBO = E z1^2 / 2 + E z2^2 / 8 + const, and E z2^2 = a^2 + 1 + 1/3
    right_or_refused(
        lambda: gradient(ph.TraceELBO(40_000, "stl"), model, Guide()), T([0.7 + 0.7 / 4]), 0.03, names=[r"\bz\b"]
    )


# --- a parent that is passed by value: z2 depends on z1 in the model, z1 on z2 in the guide


def by_boolean_index(z):
    found = torch.full((2,), -2.0)
    found[(z > 0).long()] = 3.0
    return found[1] - found[0]


def by_int_index(z):
    b = torch.zeros(9)
    b[int(z.clamp(-4, 4).round()) + 4] = 1.0
    return b @ torch.linspace(-4, 4, 9)


WAYS = {  # the location of z2, a function of the value of z1
    "if": lambda z: T(2.5) if z > 0.5 else T(-2.5),
    "item": lambda z: T(2 * z.item()),
    "float": lambda z: T(2.5 * float(z) - 1),
    "int": lambda z: T(2.0 * int(z * 2)),
    "bool": lambda z: T(3.0 * bool((z + 1).relu())),
    "tolist": lambda z: T(2 * z.tolist()),
    "numpy": lambda z: torch.as_tensor(3 * np.tanh(z.detach().numpy())),
    "int index": by_int_index,
    "boolean index": by_boolean_index,
    "where, detached": lambda z: torch.where(z.detach() > 0, 3.0, -3.0),
    "data": lambda z: 2 * z.data,
    "new tensor": lambda z: torch.full((), float(z)) * 2,
    "formatted": lambda z: T(2 * float(f"{float(z):.3f}")),
}


def value_truth(location):
    """ELBO of the pair below by quadrature, over quantiles of both of the guide's draws."""
    u = (torch.arange(160) + 0.5) / 160
    e = dist.Normal(0.0, 1.0).icdf(u)
    z2 = (0.2 + 1.3 * e)[:, None]
    z1 = 0.8 * z2 + 0.7 * e
    loc = torch.stack([torch.as_tensor(location(z)).to(z1.dtype) for z in z1.flatten()]).reshape(z1.shape)
    log_p = dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(loc, 1.0).log_prob(z2)
    log_p = log_p + dist.Normal(z1, 1.0).log_prob(T(0.5))
    log_q = dist.Normal(0.2, 1.3).log_prob(z2) + dist.Normal(0.8 * z2, 0.7).log_prob(z1)
    return (log_p - log_q).mean()


@pytest.mark.parametrize("way", WAYS)
def test_layerwise_elbo_where_a_parent_is_passed_by_value(way):
    location = WAYS[way]

    def model():
        z1 = pyro.sample("z1", standard())
        pyro.sample("z2", dist.Normal(location(z1), 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=T(0.5))

    def guide():
        z2 = pyro.sample("z2", dist.Normal(T(0.2), 1.3))
        pyro.sample("z1", dist.Normal(0.8 * z2, 0.7))

    right = value_truth(location)

    def estimate():
        values = T([-ph.LayerwiseELBO().loss(model, guide) for _ in range(500)])
        assert (values.mean() - right).abs() < 5 * values.std() / len(values) ** 0.5 + 0.02, (values.mean(), right)
        return right

    right_or_refused(estimate, right, 0.0, names=["'z1'", "'z2'"])


def test_layerwise_elbo_by_value_in_a_batch_of_one():
    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", standard())
            pyro.sample("z2", dist.Normal(3.0 if z1 > 0 else -3.0, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.full((), 0.2), 1.3))
            pyro.sample("z1", dist.Normal(0.8 * z2, 0.7))

    right = value_truth(lambda z: T(3.0 if z > 0 else -3.0))

    def estimate():
        values = torch.cat([ph.LayerwiseELBO().per_datum(model, guide, T([0.5])) for _ in range(500)])
        assert (values.mean() - right).abs() < 5 * values.std() / len(values) ** 0.5 + 0.02, (values.mean(), right)
        return right

    right_or_refused(estimate, right, 0.0, names=["'z1'", "'z2'"])


def test_no_closed_form_is_named_where_a_parent_is_passed_by_value():
    """The term of z2 is no divergence, whatever it is worth, as z1 descends from z2 in the guide."""

    def model():
        z1 = pyro.sample("z1", standard())
        pyro.sample("z2", dist.Normal(T(2 * z1.tolist()), 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=T(0.5))

    def guide():
        z2 = pyro.sample("z2", dist.Normal(T(0.2), 1.3))
        pyro.sample("z1", dist.Normal(0.8 * z2, 0.7))

    terms = outcome(lambda: ph.LayerwiseELBO().terms(model, guide), names=["'z1'", "'z2'"])
    assert terms is None or "kl_z2" not in terms
