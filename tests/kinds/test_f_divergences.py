"""Registered divergences, as the layer-wise bound uses them, against plain draws."""

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_hvae as ph
from pyro_hvae.bounds.divergences import divergence
from tests.kinds.outcomes import right_or_refused

T = torch.tensor

# --- registered divergences

FAMILIES = {  # maker, parameters: the first are the guide's, each of the others the model's
    "Bernoulli": (dist.Bernoulli, [(T(0.3),), (T(0.6),)]),
    "Beta": (dist.Beta, [(T(2.0), T(3.0)), (T(1.5), T(0.7))]),
    "Binomial": (lambda p: dist.Binomial(5, p), [(T(0.3),), (T(0.6),)]),
    "Categorical": (dist.Categorical, [(T([0.2, 0.3, 0.5]),), (T([0.5, 0.3, 0.2]),)]),
    "Cauchy": (dist.Cauchy, [(T(0.0), T(1.0)), (T(0.5), T(2.0))]),
    "Chi2": (dist.Chi2, [(T(3.0),), (T(5.0),)]),
    "ContinuousBernoulli": (dist.ContinuousBernoulli, [(T(0.3),), (T(0.8),)]),
    "Dirichlet": (dist.Dirichlet, [(T([2.0, 1.0, 3.0]),), (T([1.0, 1.0, 2.0]),)]),
    "Exponential": (dist.Exponential, [(T(1.0),), (T(2.5),)]),
    "Folded": (lambda m, s: dist.FoldedDistribution(dist.Normal(m, s)), [(T(0.9), T(0.8)), (T(-0.3), T(1.2))]),
    "FoldedLaplace": (
        lambda m, s: dist.FoldedDistribution(dist.Laplace(m, s)),
        [(T(0.9), T(0.8)), (T(0.3), T(1.2))],
    ),
    "Gamma": (dist.Gamma, [(T(2.0), T(1.0)), (T(3.0), T(2.5))]),
    "Geometric": (dist.Geometric, [(T(0.3),), (T(0.6),)]),
    "Gumbel": (dist.Gumbel, [(T(0.0), T(1.0)), (T(0.5), T(2.0))]),
    "HalfCauchy": (dist.HalfCauchy, [(T(1.0),), (T(2.0),)]),
    "HalfNormal": (dist.HalfNormal, [(T(1.0),), (T(2.0),)]),
    "InverseGamma": (dist.InverseGamma, [(T(3.0), T(2.0)), (T(4.0), T(1.0))]),
    "Laplace": (dist.Laplace, [(T(0.0), T(1.0)), (T(0.5), T(2.0))]),
    "LogNormal": (dist.LogNormal, [(T(0.0), T(1.0)), (T(0.5), T(1.5))]),
    "LogisticNormal": (
        dist.LogisticNormal,
        [(torch.zeros(2), T([1.0, 2.0])), (T([1.0, 0.5]), T([0.5, 1.0]))],
    ),
    "LowRank": (
        dist.LowRankMultivariateNormal,
        [(torch.zeros(2), T([[1.0], [0.5]]), torch.ones(2)), (torch.ones(2), T([[0.2], [0.9]]), 0.5 * torch.ones(2))],
    ),
    "MultivariateNormal": (
        dist.MultivariateNormal,
        [(torch.zeros(2), T([[1.0, 0.4], [0.4, 0.8]])), (torch.ones(2), torch.eye(2))],
    ),
    "Normal": (dist.Normal, [(T(0.0), T(1.0)), (T(0.5), T(1.5))]),
    "Normals": (
        lambda m, s: dist.Normal(m, s).to_event(1),
        [(torch.zeros(2), T([1.0, 2.0])), (T([1.0, 0.5]), T([0.5, 1.0]))],
    ),
    "OneHot": (dist.OneHotCategorical, [(T([0.2, 0.3, 0.5]),), (T([0.5, 0.3, 0.2]),)]),
    "Pareto": (dist.Pareto, [(T(1.0), T(4.0)), (T(0.5), T(2.0)), (T(0.1), T(1.0))]),
    "Poisson": (dist.Poisson, [(T(2.0),), (T(3.5),)]),
    "Uniform": (
        dist.Uniform,
        [(T(0.2), T(0.9)), (T(-1.0), T(2.0)), (T(0.0), T(1.0)), (T(0.0), T(2.0)), (T(-1.0), T(1.0))],
    ),
}


def cast(parameters):
    return [p.to(torch.float64) for p in parameters]


def registered():
    """Yield (name, guide's distribution, model's) for every pair with a divergence in torch's or Pyro's registry."""
    for first, (make_q, choices) in FAMILIES.items():
        for second, (make_p, others) in FAMILIES.items():
            for number, parameters in enumerate(others[1:]):
                q, p = make_q(*cast(choices[0])), make_p(*cast(parameters))
                try:
                    kl_divergence(q, p)
                except NotImplementedError:
                    continue
                yield f"{first} to {second} {number}", q, p


def by_monte_carlo(q, p, draws=40_000):
    """KL(q || p) and its standard error from plain draws; infinite where p is zero at a draw."""
    with torch.no_grad():
        z = q.sample((draws,))
        if not p.support.check(z).all():
            return T(math.inf), 0.0
        found = (q.log_prob(z) - p.log_prob(z)).reshape(draws, -1).sum(-1)
    return found.mean(), float(found.std()) / draws**0.5


def compared(q, p, plate=0):
    """Return None if LayerwiseELBO gives KL(q || p) or refuses, else what is wrong."""

    def program(distribution):
        def run():
            if plate:
                with pyro.plate("data", plate):
                    pyro.sample("z", distribution)
            else:
                pyro.sample("z", distribution)

        return run

    right, error = by_monte_carlo(q, p)
    bound = ph.LayerwiseELBO(4000)
    # 4000 particles, where the term is no closed form, are noisier by sqrt(10) than 40,000 draws
    try:
        right_or_refused(
            lambda: T(bound.loss(program(p), program(q)), dtype=torch.float64), right, 22 * error + 1e-9, [r"\bz\b"]
        )
    except Exception as wrong:  # collected, so that one pair does not hide the others
        return f"{type(wrong).__name__}: {str(wrong).splitlines()[0][:150]}"
    return None


@pytest.mark.parametrize("finite", [True, False])
def test_every_registered_divergence(finite):
    pairs = [(name, q, p) for name, q, p in registered() if math.isfinite(by_monte_carlo(q, p, 2000)[0]) == finite]
    assert len(pairs) > 40
    wrong = {name: found for name, q, p in pairs if (found := compared(q, p)) is not None}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


def masked(loc, scale, mask):
    return dist.Normal(T(loc), T(scale)).mask(mask)


A, B = [True, False, True, False], [True, True, False, False]
WRAPPED = {  # distribution of the guide, of the model, size of a plate or 0
    "masks differ": (
        lambda: masked([0.0, 1.0, 2.0, 3.0], 1.0, T(A)),
        lambda: masked([1.0, 1.0, 1.0, 1.0], 2.0, T(B)),
        4,
    ),
    "masks differ, in the event": (
        lambda: masked([0.0, 1.0, 2.0, 3.0], 1.0, T(A)).to_event(1),
        lambda: masked([1.0, 1.0, 1.0, 1.0], 2.0, T(B)).to_event(1),
        0,
    ),
    "a mask of one value": (
        lambda: masked([0.0, 1.0, 2.0, 3.0], 1.0, T(True)),
        lambda: masked([1.0, 1.0, 1.0, 1.0], 2.0, T(A)),
        4,
    ),
    "masks, gamma": (
        lambda: dist.Gamma(T([2.0, 3.0]), T(1.0)).mask(T([True, False])),
        lambda: dist.Gamma(T([1.0, 1.0]), T(2.0)).mask(T([False, True])),
        2,
    ),
    "folded in a plate": (
        lambda: dist.FoldedDistribution(dist.Normal(T([0.5, 1.5]), T(1.0))),
        lambda: dist.FoldedDistribution(dist.Normal(T([1.5, 0.0]), T(1.5))),
        2,
    ),
    "folded in an event": (
        lambda: dist.FoldedDistribution(dist.Normal(T([0.5, 1.5]), T(1.0))).to_event(1),
        lambda: dist.HalfNormal(T([1.5, 2.0])).to_event(1),
        0,
    ),
    "half to folded": (
        lambda: dist.HalfNormal(T(1.0)),
        lambda: dist.FoldedDistribution(dist.Normal(T(1.5), T(1.0))),
        0,
    ),
    "continuous Bernoulli to the unit interval": (
        lambda: dist.ContinuousBernoulli(T(0.3)),
        lambda: dist.Uniform(T(0.0), T(1.0)),
        0,
    ),
    "continuous Bernoulli to a longer interval, in a plate": (
        lambda: dist.ContinuousBernoulli(T([0.3, 0.8])),
        lambda: dist.Uniform(T([0.0, -1.0]), T([2.0, 1.0])),
        2,
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_divergences_of_wrapped_distributions(name):
    guide, model, plate = WRAPPED[name]

    def value():  # what the ELBO is: E log p - log q, each in its own mask
        q, p = guide(), model()
        z = q.sample((100_000,))
        return (q.log_prob(z) - p.log_prob(z)).reshape(len(z), -1).sum(-1)

    draws = value()

    def program(distribution):
        def run():
            if plate:
                with pyro.plate("data", plate):
                    pyro.sample("z", distribution())
            else:
                pyro.sample("z", distribution())

        return run

    right_or_refused(
        lambda: T(ph.LayerwiseELBO(4000).loss(program(model), program(guide))),
        draws.mean(),
        30 * float(draws.std()) / len(draws) ** 0.5,
        names=[r"\bz\b"],
    )


REINTERPRETED = {
    "events of two dims, twice over": (
        lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(2),
        lambda: dist.Normal(torch.ones(2, 3), 2.0).to_event(1).to_event(1),
    ),
    "independent of correlated": (
        lambda: dist.Independent(dist.MultivariateNormal(torch.zeros(2, 3), torch.eye(3)), 1),
        lambda: dist.Normal(torch.ones(2, 3), 2.0).to_event(2),
    ),
    "log-normal inside and outside of the event": (
        lambda: dist.LogNormal(torch.zeros(3), 1.0).to_event(1),
        lambda: dist.TransformedDistribution(dist.Normal(torch.ones(3), 2.0).to_event(1), [transforms.ExpTransform()]),
    ),
}


@pytest.mark.parametrize("name", REINTERPRETED)
def test_divergences_of_events_written_in_two_ways(name):
    """All three are sums of KL(N(0, 1) || N(1, 2)); guards, since torch's registry knows them."""
    guide, model = REINTERPRETED[name]
    size = guide().event_shape.numel()
    right = size * (math.log(2) + 2 / 8 - 0.5)
    right_or_refused(
        lambda: T(ph.LayerwiseELBO(20_000).loss(lambda: pyro.sample("z", model()), lambda: pyro.sample("z", guide()))),
        right,
        0.15,
        names=[r"\bz\b"],
    )


def test_divergences_without_a_formula_that_holds():
    """Masks of the distributions themselves, and maps that are no bijections, as a fold of the line."""
    normal, other = dist.Normal(torch.zeros(2), 1.0), dist.Normal(torch.ones(2), 2.0)
    folded = [dist.TransformedDistribution(fn, [dist.transforms.AbsTransform()]) for fn in (normal, other)]
    masked = [fn.mask(torch.tensor(mask)) for fn, mask in ((normal, [True, False]), (other, [True, True]))]
    for q, p in (folded, masked, [normal, masked[1]], [fn.to_event(1) for fn in folded]):
        assert divergence(q, p) is None
    torch.testing.assert_close(divergence(normal, other), kl_divergence(normal, other))
