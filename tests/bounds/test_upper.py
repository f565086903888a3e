"""Estimates from above: population values where the moments are finite, and how far K draws fall short of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from tests.bounds.test_importance import LOC, MEAN, VARIANCE, chi_square, gaussian_pair, mean_and_error
from tests.linear_gaussian import Oracle, linear_gaussian
from tests.programs import binary, build, by_quadrature, two_layers, wide


def divergence(m, v, other, s2):
    """KL(N(m, v) || N(other, s2))."""
    return 0.5 * (v / s2 + (m - other) ** 2 / s2 - 1 + math.log(s2 / v))


def test_population_values():
    """With log p = 0: CUBO = log(1 + chi2)/2 = .0788 and EUBO = KL(p||q) = .1038, both above."""
    model, guide = gaussian_pair(1000)
    chi = 0.5 * math.log1p(chi_square())
    assert round(chi, 4) == 0.0788
    value, error = mean_and_error(ph.CUBO(2, 4000).per_datum(model, guide))
    assert abs(value - chi) < 4 * error + 3e-4
    value, error = mean_and_error(ph.EUBO(4000).per_datum(model, guide))
    assert abs(value - divergence(MEAN, VARIANCE, LOC, 0.8)) < 4 * error + 3e-4
    order = 3  # E w^3 is a Gaussian integral as well
    precision = 3 / VARIANCE - 2 / 0.8
    linear = 3 * MEAN / VARIANCE - 2 * LOC / 0.8
    third = -1.5 * math.log(VARIANCE) + math.log(0.8) - 0.5 * math.log(precision)
    third += 0.5 * linear**2 / precision - 1.5 * MEAN**2 / VARIANCE + LOC**2 / 0.8
    value, error = mean_and_error(ph.CUBO(order, 4000).per_datum(model, guide))
    assert abs(value - third / 3) < 4 * error + 3e-3
    assert 0 < chi < third / 3


@pytest.mark.parametrize(("num_particles", "expected"), [(1, -0.155), (2, 0.003)])
def test_few_draws_may_lie_below_the_evidence(num_particles, expected):
    value, error = mean_and_error(ph.CUBO(2, num_particles).per_datum(*gaussian_pair(100_000)))
    assert abs(value - expected) < 4 * error + 0.001
    one, error = mean_and_error(ph.EUBO(1).per_datum(*gaussian_pair(100_000)))
    assert abs(one + divergence(LOC, 0.8, MEAN, VARIANCE)) < 4 * error


def test_they_are_typed_as_estimates():
    for estimate in (ph.CUBO(2, 4), ph.EUBO(4)):
        assert not estimate.is_bound
        assert not isinstance(estimate, ph.bounds.Bound)
    assert ph.IWELBO(4).is_bound


def test_an_infinite_moment_is_not_hidden():
    """Where 2 s2 < v nothing converges to a bound; the effective sample size beside the figure is what tells."""
    terms = ph.CUBO(2, 1000).terms(*gaussian_pair(200, 0.15))
    good = ph.CUBO(2, 1000).terms(*gaussian_pair(200))
    assert set(terms) == {"estimate", "ess", "log_weight_variance"}
    assert terms["ess"].median() < 0.3 * good["ess"].median()


@pytest.mark.parametrize("depth", [1, 3])
def test_posterior_samples_give_a_bound_in_expectation(depth):
    """EUBO at exact joint samples has mean log p + KL(p(z|x) || q); on chains in closed form."""
    case = linear_gaussian(depth, size=4000)
    draws = pyro.poutine.trace(case.model).get_trace(size=4000)
    x = draws.nodes["x"]["value"]
    latents = {name: draws.nodes[name]["value"] for name in case.model.latents}
    value = ph.EUBO.from_posterior(case.model, case.other, latents, x)
    assert value.shape == (4000,)
    assert not value.requires_grad
    gap = value - Oracle(case.model).log_evidence(x).detach()
    mean, error = mean_and_error(gap)
    assert abs(mean - reverse(case, x)) < 4 * error
    assert mean > 4 * error
    torch.testing.assert_close(
        ph.EUBO.from_posterior(case.model, case.exact, latents, x), Oracle(case.model).log_evidence(x).detach()
    )


def reverse(case, x):
    """Mean over data of KL(p(z|x) || q(z|x))."""
    oracle = Oracle(case.model)
    levels = range(1, oracle.depth + 1)
    mean, cov = oracle.moments(case.other, x)
    loc = torch.cat([mean[t] for t in levels], -1)
    joint = torch.cat([torch.cat([cov[s, t] for t in levels], -1) for s in levels], -2)
    true_loc, true_joint = oracle.posterior(x)
    posterior = dist.MultivariateNormal(true_loc, true_joint)
    guide = dist.MultivariateNormal(loc, 0.5 * (joint + joint.mT))
    return torch.distributions.kl_divergence(posterior, guide).mean().item()


def test_several_draws_and_missing_sites():
    case = linear_gaussian(2)
    draws = {"z1": torch.randn(7, 5, 2), "z2": torch.randn(7, 5, 3)}
    each = [
        ph.EUBO.from_posterior(case.model, case.other, {k: v[i] for k, v in draws.items()}, case.x) for i in range(7)
    ]
    together = ph.EUBO.from_posterior(case.model, case.other, draws, case.x)
    torch.testing.assert_close(together, torch.stack(each).mean(0))
    with pytest.raises(ValueError, match="z2"):
        ph.EUBO.from_posterior(case.model, case.other, {"z1": draws["z1"]}, case.x)


@pytest.mark.parametrize("estimate", [ph.CUBO(2, 20), ph.EUBO(20)], ids=repr)
def test_the_guide_is_pushed_down_and_the_model_held(estimate):
    case = linear_gaussian(2)
    start = estimate.loss_and_grads(case.model, case.other, case.x)
    assert all(p.grad is None for p in case.model.parameters())
    assert all(p.requires_grad for p in case.model.parameters())
    assert all(p.grad is not None for p in case.other.parameters())
    assert start > Oracle(case.model).log_evidence(case.x).sum() - 10
    optimizer = torch.optim.Adam(case.other.parameters(), 0.01)
    before = torch.stack([estimate.loss(case.model, case.other, case.x) for _ in range(40)]).mean()
    for _ in range(100):
        optimizer.zero_grad()
        estimate.loss_and_grads(case.model, case.other, case.x)
        optimizer.step()
    after = torch.stack([estimate.loss(case.model, case.other, case.x) for _ in range(40)]).mean()
    assert after < before
    evidence = Oracle(case.model).log_evidence(case.x).sum()
    assert evidence - 2 < after < evidence + 2


@pytest.mark.parametrize("estimate", [ph.CUBO(2, 4), ph.EUBO(4)], ids=repr)
def test_the_first_call_holds_the_parameters_that_it_makes(estimate):
    """A function's parameters are in no module and, before the first call, in no store."""
    pair = build("by_hand")
    estimate.loss_and_grads(pair.model, pair.guide, *pair.args)
    grads = {name: value.grad for name, value in pyro.get_param_store().named_parameters()}
    assert grads.pop("prior") is None
    assert sorted(grads) == ["encoder", "sd1", "sd2", "upper"]
    assert all(bool(grad != 0) for grad in grads.values())


def test_order_on_a_trained_pair():
    """ELBO <= VR(.5) <= IWELBO <= log p <= EUBO at exact joint samples, on data that the trained model draws."""
    torch.manual_seed(3)
    model, guide = two_layers(), ph.BottomUp(z1=wide(5), z2=wide(1))
    x = binary(64)
    objective = ph.LayerwiseELBO(4)(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        objective(x).backward()
        optimizer.step()
    trace = pyro.poutine.trace(model).get_trace(size=2000)
    simulated = trace.nodes["x"]["value"]
    evidence = by_quadrature(model, simulated)
    latents = {name: trace.nodes[name]["value"].detach() for name in ("z1", "z2")}
    above = ph.EUBO.from_posterior(model, guide, latents, simulated) - evidence
    mean, error = mean_and_error(above)
    assert mean > -4 * error
    gaps = []
    for bound in (ph.TraceELBO(8), ph.VRBound(0.5, 8), ph.IWELBO(8)):
        pyro.set_rng_seed(1)
        gaps.append(bound.per_datum(model, guide, simulated) - evidence)
    assert (gaps[0] <= gaps[1] + 1e-12).all()
    assert (gaps[1] <= gaps[2] + 1e-12).all()
    mean, error = mean_and_error(gaps[2])
    assert mean < 4 * error
    mean, error = mean_and_error(gaps[0])
    assert mean < -4 * error


def test_minibatches_and_partial_plates():
    pair = build("nested_subsampled")
    for estimate in (ph.CUBO(2, 4), ph.EUBO(4)):
        with pytest.raises(ValueError, match="plate 'columns' shows 3 of 15"):
            estimate.per_datum(pair.model, pair.guide, *pair.args)
