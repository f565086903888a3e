"""The closed forms of the tests, checked against each other and against plain Pyro traces."""

import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO

from tests.linear_gaussian import Oracle, linear_gaussian


def log_weight(model, guide, x):
    """log p(x, z) - log q(z | x) (N,) by Pyro alone."""
    drawn = poutine.trace(guide).get_trace(x)
    scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x)
    log_p = sum(
        site["fn"].log_prob(site["value"])
        for site in scored.nodes.values()
        if site["type"] == "sample" and site["name"] != "data"
    )
    log_q = sum(
        site["fn"].log_prob(site["value"])
        for site in drawn.nodes.values()
        if site["type"] == "sample" and site["name"] != "data"
    )
    return log_p - log_q


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("which", ["exact", "top_down"])
def test_exact_posterior_gives_the_evidence_at_every_draw(depth, full, which):
    case = linear_gaussian(depth, full=full)
    for _ in range(3):
        found = log_weight(case.model, getattr(case, which), case.x)
        torch.testing.assert_close(found, Oracle(case.model).log_evidence(case.x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("which", ["exact", "other", "top_down", "other_top_down"])
def test_elbo_is_evidence_less_kl(depth, which):
    case = linear_gaussian(depth)
    oracle, guide = Oracle(case.model), getattr(case, which)
    kl = oracle.kl(guide, case.x)
    gap = oracle.log_evidence(case.x) - oracle.elbo(guide, case.x)
    torch.testing.assert_close(gap, kl, rtol=0, atol=1e-10)
    if which in ("exact", "top_down"):
        torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-10)
    else:
        assert (kl > 1e-2).all()


@pytest.mark.parametrize("which", ["other", "other_top_down"])
def test_elbo_and_its_gradient_agree_with_pyro(which):
    case = linear_gaussian(2)
    guide = getattr(case, which)
    parameters = [*case.model.parameters(), *guide.parameters()]
    elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    estimate = -elbo(case.model, guide)(case.x)
    exact = Oracle(case.model).elbo(guide, case.x).sum()
    assert abs((estimate - exact).item()) < 0.1
    for found, expected in zip(torch.autograd.grad(estimate, parameters), torch.autograd.grad(exact, parameters)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.15)


def test_data_have_the_moments_of_the_model():
    case = linear_gaussian(2)
    oracle = Oracle(case.model)
    with torch.no_grad():
        x = case.model(size=100_000)
        torch.testing.assert_close(x.mean(0), oracle.mean[0], rtol=0, atol=0.03)
        torch.testing.assert_close(x.T.cov(), oracle.cov[0], rtol=0, atol=0.06)
