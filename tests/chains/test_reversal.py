"""A bottom-up Gaussian guide drawn from the top down is the same distribution, with closed-form divergences."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from torch.distributions import kl_divergence

import pyro_hvae as ph
from tests.linear_gaussian import Oracle, linear_gaussian


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("which", ["exact", "other"])
def test_the_joint_density_is_that_of_the_chain(depth, which):
    case = linear_gaussian(depth)
    chain = getattr(case, which)
    drawn = poutine.trace(ph.Reversed(chain)).get_trace(case.x)
    drawn.compute_log_prob()
    below = poutine.trace(poutine.replay(chain, drawn)).get_trace(case.x)
    below.compute_log_prob()
    sites = [f"z{t}" for t in range(1, depth + 1)]
    assert [name for name in drawn.nodes if name in sites] == sites[::-1]
    reverse, forward = (sum(trace.nodes[site]["log_prob"] for site in sites) for trace in (drawn, below))
    torch.testing.assert_close(reverse, forward, atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("depth", [2, 5])
def test_every_term_of_the_layerwise_bound_is_closed(depth):
    case = linear_gaussian(depth)
    guide = ph.Reversed(case.other)
    bound = ph.LayerwiseELBO(num_particles=2000)
    terms = bound.terms(case.model, guide, case.x)
    assert sorted(terms) == sorted(["reconstruction", *(f"kl_z{t}" for t in range(1, depth + 1))])
    found = torch.stack([bound.per_datum(case.model, guide, case.x) for _ in range(30)])
    expected = Oracle(case.model).elbo(case.other, case.x).detach()
    assert bool(((found.mean(0) - expected).abs() < 4.5 * found.std(0) / 30**0.5).all())
    assert "rate_z1" in ph.LayerwiseELBO().terms(case.model, case.other, case.x)


def test_the_exact_posterior_has_no_gap():
    case = linear_gaussian(2)
    found = ph.TraceELBO().per_datum(case.model, ph.Reversed(case.exact), case.x)
    torch.testing.assert_close(found, Oracle(case.model).log_evidence(case.x), atol=1e-9, rtol=1e-10)


def test_an_amortised_first_layer_with_context_and_mask():
    guide = ph.BottomUp(
        z1=ph.Gaussian(torch.nn.Linear(5 + 2, 6)), z2=ph.LinearGaussian(3 + 2, 2), z3=ph.LinearGaussian(2 + 2, 4)
    )
    x, context, mask = torch.randn(7, 5), torch.randn(7, 2), torch.rand(7, 5) < 0.7
    drawn = poutine.trace(ph.Reversed(guide)).get_trace(x, context, mask=mask)
    below = poutine.trace(poutine.replay(guide, drawn)).get_trace(x, context, mask=mask)
    torch.testing.assert_close(drawn.log_prob_sum(), below.log_prob_sum(), atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("local", [False, True])
def test_its_parameters_train_by_both_routes(local):
    model, _ = ph.hvae(5, (3, 2), hidden=(4,))
    guide = ph.Reversed(ph.BottomUp(z1=ph.Gaussian(torch.nn.Linear(5, 6)), z2=ph.LinearGaussian(3, 2)))
    x = torch.randint(0, 2, (7, 5)).to(torch.get_default_dtype())
    before = [p.detach().clone() for p in guide.parameters()]
    if local:
        module = ph.LayerwiseELBO()(model, guide)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        module(x).backward()
        optimizer.step()
    else:
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ph.LayerwiseELBO()).step(x)
    assert all(bool((p != old).any()) for p, old in zip(guide.parameters(), before, strict=True))


def test_what_can_not_be_reversed():
    nonlinear = ph.BottomUp(z1=ph.Gaussian(torch.nn.Linear(5, 6)), z2=ph.Gaussian(torch.nn.Linear(3, 4)))
    with pytest.raises(TypeError, match=r"'z2' of 'guide' is a Gaussian.*LinearGaussian"):
        ph.Reversed(nonlinear)
    with pytest.raises(TypeError, match="takes a BottomUp chain, got Linear"):
        ph.Reversed(torch.nn.Linear(2, 2))
    discrete = ph.Reversed(ph.BottomUp(z1=ph.Bernoulli(torch.nn.Linear(5, 3)), z2=ph.LinearGaussian(3, 2)))
    with pytest.raises(TypeError, match="first layer 'z1' must be a Gaussian"):
        discrete(torch.zeros(2, 5))


def test_divergence_of_a_full_from_a_diagonal_gaussian():
    factor = torch.randn(3, 3).tril(-1) + torch.eye(3) * 0.7
    p = dist.MultivariateNormal(torch.randn(4, 3), scale_tril=factor)
    loc, scale = torch.randn(3), torch.rand(3) + 0.5
    expected = kl_divergence(p, dist.MultivariateNormal(loc, scale_tril=scale.diag()))
    torch.testing.assert_close(kl_divergence(p, dist.Normal(loc, scale).to_event(1)), expected)
