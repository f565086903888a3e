"""Poisson and negative binomial against their definitions in 50 digits, at rates too large for sums in float32."""

import itertools

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hvae.distributions import NegativeBinomial, Poisson

MEANS = [0.01, 1.0, 30.0, 1e4, 1e6]


def counts(mean, sd):
    """Zero, counts within three standard deviations, and one far away."""
    return sorted({0, *(max(0, round(mean + z * sd)) for z in (-1, 0, 1, 3)), round(5 * mean + 3)})


@mpmath.workdps(50)
def negative_binomial(k, r, logit):
    k, r, logit = mpmath.mpf(k), mpmath.mpf(r), mpmath.mpf(logit)
    coefficient = mpmath.loggamma(k + r) - mpmath.loggamma(r) - mpmath.loggamma(k + 1)
    success = 1 / (1 + mpmath.exp(-logit))
    value = coefficient + k * mpmath.log(success) + r * mpmath.log(1 - success)
    by_r = mpmath.digamma(k + r) - mpmath.digamma(r) + mpmath.log(1 - success)
    return float(value), float(by_r), float(k * (1 - success) - r * success)


@mpmath.workdps(50)
def poisson(k, rate):
    k, rate = mpmath.mpf(k), mpmath.mpf(rate)
    return float(k * mpmath.log(rate) - rate - mpmath.loggamma(k + 1)), float(k / rate - 1)


@pytest.mark.parametrize("r", [1e-3, 1.0, 17.0, 1e3, 1e4, 1e6, 1e8])
def test_negative_binomial_in_float32(r):
    for mean in MEANS:
        total = torch.tensor(r, dtype=torch.float32, requires_grad=True)
        logit = torch.tensor(mean / r).log().float().requires_grad_()
        sd = (mean + mean**2 / r) ** 0.5
        for k in counts(mean, sd):
            found = NegativeBinomial(total, logits=logit).log_prob(torch.tensor(float(k), dtype=torch.float32))
            assert found.dtype == torch.float32
            value, by_r, by_logit = negative_binomial(k, total.item(), logit.item())
            assert found.item() == pytest.approx(value, rel=1e-6, abs=1e-6)
            gradients = [g.item() for g in torch.autograd.grad(found, (total, logit))]
            # of log r and the logit, beside their usual size
            assert gradients[0] * r == pytest.approx(by_r * r, rel=1e-4, abs=1e-6)
            assert gradients[1] == pytest.approx(by_logit, rel=1e-4, abs=1e-6 * sd)


@pytest.mark.parametrize("rate", [*MEANS, 1e7])
def test_poisson_in_float32(rate):
    parameter = torch.tensor(rate, dtype=torch.float32, requires_grad=True)
    for k in counts(rate, rate**0.5):
        found = Poisson(parameter).log_prob(torch.tensor(k))
        value, by_rate = poisson(k, parameter.item())
        assert found.item() == pytest.approx(value, rel=1e-6, abs=1e-6)
        assert torch.autograd.grad(found, parameter)[0].item() == pytest.approx(by_rate, rel=1e-5, abs=1e-9)


def test_the_limit_of_large_r_is_poisson():
    """They differ by a term of the order of k^2 / r."""
    x = torch.arange(30.0, dtype=torch.float32)
    r = torch.tensor(1e8, dtype=torch.float32)
    limit = Poisson(torch.tensor(12.0)).log_prob(x)
    found = NegativeBinomial(r, logits=(12 / r).log()).log_prob(x).double()
    torch.testing.assert_close(found, limit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [0.3, 40.0])
def test_masses_sum_to_one(r):
    x = torch.arange(4000.0)
    for p in (NegativeBinomial(r, probs=torch.tensor(0.9)), NegativeBinomial(r, logits=torch.tensor(1.0)), Poisson(r)):
        assert p.log_prob(x).exp().sum().item() == pytest.approx(1.0, abs=1e-10)


def test_edges():
    assert Poisson(torch.tensor(0.0)).log_prob(torch.tensor([0.0, 1.0])).tolist() == [0.0, -torch.inf]
    assert NegativeBinomial(0.0, logits=torch.tensor(1.0)).log_prob(torch.tensor(0.0)).item() == 0.0
    x = torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    torch.testing.assert_close(Poisson(2.0, is_sparse=True).log_prob(x), Poisson(2.0).log_prob(x))


@pytest.mark.parametrize("value", [0.5, -1.0, torch.nan])
@pytest.mark.parametrize("p", [Poisson(3.0), NegativeBinomial(3.0, logits=torch.tensor(0.0))])
def test_what_is_no_count_is_refused(p, value):
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor(value))
    with pytest.raises(ValueError, match="support"):
        p.expand((2,)).log_prob(torch.tensor([1.0, value]))


def test_sites_of_a_program_keep_the_class_and_its_divergence():
    def model():
        with pyro.plate("data", 5):
            pyro.sample("n", NegativeBinomial(2.0, logits=torch.tensor(0.0)))
            return pyro.sample("x", Poisson(torch.tensor(3.0)))

    nodes = pyro.poutine.trace(model).get_trace().nodes
    assert type(nodes["x"]["fn"]) is Poisson
    assert type(nodes["n"]["fn"]) is NegativeBinomial
    assert nodes["x"]["fn"].batch_shape == (5,)
    p, q = Poisson(torch.tensor(3.0)), Poisson(torch.tensor(2.0))
    expected = torch.distributions.kl_divergence(dist.Poisson(3.0), dist.Poisson(2.0))
    torch.testing.assert_close(torch.distributions.kl_divergence(p, q), expected)


def test_moments_are_those_of_the_masses():
    x = torch.arange(3000.0)
    for r, logit in itertools.product([0.5, 20.0], [-1.0, 1.5]):
        p = NegativeBinomial(r, logits=torch.tensor(logit))
        masses = p.log_prob(x).exp()
        torch.testing.assert_close((masses * x).sum(), p.mean)
        torch.testing.assert_close((masses * (x - p.mean) ** 2).sum(), p.variance)
