"""The gap of the bound against its closed form, split into what the family and what the network leaves."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hvae.bounds import IWELBO, TraceELBO
from pyro_hvae.diagnostics import to_datatree
from pyro_hvae.evidence import posterior_gap, refine
from tests.linear_gaussian import Oracle, linear_gaussian


def test_full_covariance_leaves_only_amortisation():
    """One latent, a multivariate Normal far from the posterior: the best member of its family is the posterior."""
    case = linear_gaussian(1, size=4, full=True)
    oracle = Oracle(case.model)
    mean, _ = oracle.posterior(case.x)

    def guide(x):
        with pyro.plate("data", len(x)):
            covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
            pyro.sample("z1", dist.MultivariateNormal(mean.detach() + 0.3, covariance))

    gap = posterior_gap(case.model, guide, case.x, num_samples=4000)
    torch.testing.assert_close(gap.evidence.value, oracle.log_evidence(case.x).detach(), atol=5e-3, rtol=0.0)
    assert gap.approximation.abs().max() < 5e-3
    _, covariance = oracle.posterior(case.x)
    exact = torch.distributions.kl_divergence(
        dist.MultivariateNormal(mean + 0.3, torch.tensor([[1.0, 0.3], [0.3, 0.5]])),
        dist.MultivariateNormal(mean, covariance),
    ).detach()
    assert ((gap.amortisation - exact).abs() < 4 * gap.elbo_stderr + 5e-3).all()
    assert ((gap.total - exact).abs() < 4 * gap.elbo_stderr + 5e-3).all()


def test_diagonal_covariance_leaves_the_closed_form():
    """The best product of Gaussians has the conditional precisions: 1/2 (sum log L_ii - log|L|) remains (oracle 8)."""
    case = linear_gaussian(1, size=4, full=True)
    oracle = Oracle(case.model)
    _, covariance = oracle.posterior(case.x)
    precision = covariance.inverse()
    remains = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).detach()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(x[:, :2] * 0.1, torch.tensor([0.9, 1.3])).to_event(1))

    gap = posterior_gap(case.model, guide, case.x, num_samples=4000)
    assert remains > 0.02
    error = 4 * (gap.refined_stderr**2 + gap.evidence.stderr**2).sqrt() + 4e-3
    assert ((gap.approximation - remains).abs() < error).all()
    torch.testing.assert_close(gap.total, gap.approximation + gap.amortisation)
    assert "approximation" in str(gap)


def test_the_gap_of_a_chain_is_its_divergence():
    case = linear_gaussian(2, size=3)
    gap = posterior_gap(case.model, case.other, case.x, num_samples=4000, num_steps=100)
    exact = Oracle(case.model).kl(case.other, case.x).detach()
    assert ((gap.total - exact).abs() < 4 * gap.elbo_stderr + 4 * gap.evidence.stderr).all()
    before = [p.detach().clone() for p in case.other.parameters()]
    refine(case.model, case.other, case.x, num_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, case.other.parameters()))


def positive(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0 * torch.ones(()), torch.ones(())))
        pyro.sample("x", dist.Poisson(z), obs=x)


def positive_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Gamma(torch.full_like(x, 2.0), torch.ones(())))


def test_other_supports_and_what_the_refined_guide_is_good_for():
    """A Gamma proposal on the positive half-line; the posterior Gamma(2 + x, 2) gives the evidence."""
    x = torch.tensor([0.0, 4.0, 9.0])
    gap = posterior_gap(positive, positive_guide, x, num_steps=300, learning_rate=0.1)
    exact = (2 + x).lgamma() - (x + 1).lgamma() - (2 + x) * torch.log(torch.tensor(2.0))
    assert ((gap.evidence.value - exact).abs() < 4 * gap.evidence.stderr + 1e-3).all()
    assert gap.amortisation[2] > 1.0
    assert gap.approximation.max() < 0.05
    assert ((to_datatree(positive, gap.guide, x, num_draws=9)["posterior"]["z"] > 0).all()).item()
    for bound in (TraceELBO(), IWELBO(num_particles=3)):
        assert bound.per_datum(positive, gap.guide, x).shape == (3,)


def test_discrete_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.5)))

    with pytest.raises(ValueError, match=r"\['z'\] .* can't be refined"):
        posterior_gap(model, guide, torch.zeros(2))
    with pytest.raises(ValueError, match="num_steps"):
        refine(model, guide, torch.zeros(2), num_steps=0)
