"""The reader's guide to the suite: one test for each equation of the exercise sheet that the library grew out of.

EQ2415, Machine Learning and Data Science, Tutorial 9 (A. Honoré and A. Ghosh, 2022).  Numbers are the sheet's; the
prose that belongs to them is ``docs/tutorial.md``.  Each test compares programs of the library with a closed form.
"""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_hvae as ph
from pyro_hvae.diffusion import LinearSchedule
from tests.linear_gaussian import Oracle, linear_gaussian

X = torch.tensor([-3.0, 0.0, 0.4, 2.0], dtype=torch.float64)
GRID = torch.linspace(-8, 8, 8001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(2.0 * z, 0.5), obs=x)


def posterior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(8.0 * x / 17.0, 17.0**-0.5))


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.4 * x, 0.5))


def log_evidence():
    return dist.Normal(0.0, math.sqrt(4.25)).log_prob(X)


def on_grid(program):
    """log p(x, z) and log q(z | x) on the grid, (8001, N) each."""
    run = ph.Problem(model, program)(X).run(len(GRID), {"z": GRID[:, None].expand(-1, len(X))})
    return run.log_p["z"] + run.log_p["x"], run.log_q["z"]


def close(first, second, tolerance=1e-9):
    torch.testing.assert_close(torch.as_tensor(first), torch.as_tensor(second), rtol=0, atol=tolerance)


def test_eq1_evidence_is_the_joint_with_the_latent_summed_out():
    close((on_grid(posterior)[0].exp() * STEP).sum(0).log(), log_evidence())


def test_eq1_evidence_of_a_discrete_chain_by_the_forward_algorithm():
    start, move = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    emit = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    chain = ph.TopDown(
        z2=ph.Transition(3, probs=start, enumerate=True),
        z1=ph.Transition(3, 3, probs=move, enumerate=True),
        x=ph.Transition(2, 3, probs=emit),
    )
    close(ph.TraceELBO().per_datum(chain, lambda x: None, torch.tensor([0, 1])), (start @ move @ emit).log())


@pytest.mark.parametrize("method", ["prior", "bayes"])
def test_eq1_and_eq2_as_estimators(method):
    found = ph.log_evidence(model, posterior, X, method=method, num_samples=50_000, chunk_size=50_000)
    assert ((found.value - log_evidence()).abs() <= 5 * found.stderr + 1e-9).all()


def test_eq2_bayes_rule_holds_at_every_latent_value_and_only_with_the_posterior():
    middle = GRID.abs() < 3
    joint, exact = on_grid(posterior)
    close((joint - exact)[middle], log_evidence().expand(int(middle.sum()), -1))
    joint, other = on_grid(guide)
    assert (joint - other)[middle].std(0).min() > 1.0


def test_eq3_divergence_is_not_negative_and_zero_for_equal_densities():
    first, second = torch.randn(1000, 6).softmax(-1), torch.randn(1000, 6).softmax(-1)
    assert ((first * (first / second).log()).sum(-1) > 0).all()
    q = dist.Normal(torch.randn(1000), torch.rand(1000) + 0.1)
    p = dist.Normal(torch.randn(1000), torch.rand(1000) + 0.1)
    assert (kl_divergence(q, p) > 0).all()
    close(kl_divergence(q, q), torch.zeros(1000))


def test_eq4_and_eq5_evidence_averaged_over_the_guide():
    mass = on_grid(guide)[1].exp() * STEP
    close(log_evidence() * mass.sum(0), log_evidence())
    close((mass * log_evidence()).sum(0), log_evidence())


def test_eq6_and_eq7_bayes_rule_inside_of_the_average():
    joint, exact = on_grid(posterior)
    _, log_q = on_grid(guide)
    mass = log_q.exp() * STEP
    close((mass * (joint - exact)).sum(0), log_evidence())
    close((mass * ((joint + log_q) - (exact + log_q))).sum(0), log_evidence())


def test_eq8_evidence_is_bound_plus_divergence_by_quadrature():
    joint, exact = on_grid(posterior)
    _, log_q = on_grid(guide)
    mass = log_q.exp() * STEP
    close((mass * (joint - log_q)).sum(0) + (mass * (log_q - exact)).sum(0), log_evidence())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_eq9_gap_of_the_bound_is_the_divergence_from_the_posterior(depth):
    case = linear_gaussian(depth)
    oracle = Oracle(case.model)
    close(oracle.elbo(case.other, case.x), oracle.log_evidence(case.x) - oracle.kl(case.other, case.x))
    draws = torch.stack([ph.TraceELBO(500).per_datum(case.model, case.other, case.x) for _ in range(40)])
    error = draws.std(0) / 40**0.5
    assert ((draws.mean(0) - oracle.elbo(case.other, case.x)).abs() < 5 * error).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_eq10_bound_lies_below_the_evidence_and_touches_it_at_the_posterior(depth):
    case = linear_gaussian(depth)
    oracle = Oracle(case.model)
    assert (oracle.elbo(case.other, case.x) < oracle.log_evidence(case.x)).all()
    close(ph.TraceELBO().per_datum(case.model, case.exact, case.x), oracle.log_evidence(case.x))


def test_eq11_weight_is_likelihood_times_prior_over_guide():
    case = linear_gaussian(1)
    z = torch.randn(100, len(case.x), 2)
    run = ph.Problem(case.model, case.other)(case.x).run(len(z), {"z1": z})
    likelihood = case.model.x(z).log_prob(case.x)
    prior = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1).log_prob(z)
    close(run.log_weights, likelihood + prior - case.other.z1(case.x).log_prob(z))


def test_eq12_bound_splits_in_reconstruction_and_log_ratio():
    case = linear_gaussian(1)
    torch.manual_seed(3)
    terms = ph.TraceELBO(50).terms(case.model, case.other, case.x)
    torch.manual_seed(3)
    close(ph.TraceELBO(50).per_datum(case.model, case.other, case.x), terms["reconstruction"] - terms["rate_z1"])


def test_eq13_prior_matching_is_a_divergence_in_closed_form():
    case = linear_gaussian(1)
    terms = ph.LayerwiseELBO().terms(case.model, case.other, case.x)
    q = case.other.z1(case.x)
    prior = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    close(terms["kl_z1"], kl_divergence(q, prior))
    close(terms["kl_z1"], Oracle(case.model).terms(case.other, case.x)["z1"])


def test_question4_encoder_and_decoder():
    case = linear_gaussian(1)
    codes = ph.encode(case.other, case.x, mean=True)["z1"]
    close(codes, case.other.z1(case.x).mean)
    close(ph.decode(case.model, {"z1": codes}).mean, case.model.x(codes).mean)


def test_eq14_and_eq15_joint_of_the_hierarchy_is_the_product_of_its_kernels():
    case = linear_gaussian(3)
    z = {"z3": torch.randn(5, 3), "z2": torch.randn(5, 2), "z1": torch.randn(5, 3)}
    z = {site: torch.randn(5, case.exact.kernels[site].out_features) for site in z}
    joint = poutine.trace(poutine.condition(case.model, data=z)).get_trace(case.x).log_prob_sum()
    kernels = case.model.kernels
    product = (
        kernels["z3"](None).log_prob(z["z3"])
        + kernels["z2"](z["z3"]).log_prob(z["z2"])
        + kernels["z1"](z["z2"]).log_prob(z["z1"])
        + kernels["x"](z["z1"]).log_prob(case.x)
    )
    close(joint, product.sum())


def test_eq16_and_eq17_posterior_of_the_hierarchy_is_the_product_of_its_kernels():
    case = linear_gaussian(3)
    z = {site: torch.randn(5, kernel.out_features) for site, kernel in case.other.kernels.items()}
    run = ph.Problem(case.model, case.other)(case.x).run(values=z)
    kernels = case.other.kernels
    product = (
        kernels["z1"](case.x).log_prob(z["z1"])
        + kernels["z2"](z["z1"]).log_prob(z["z2"])
        + kernels["z3"](z["z2"]).log_prob(z["z3"])
    )
    close(run.log_q["z1"] + run.log_q["z2"] + run.log_q["z3"], product[None])


def test_eq15_and_eq17_each_draw_depends_on_its_neighbour_alone():
    case = linear_gaussian(3)
    rows = {row.site: row for row in ph.explain(ph.LayerwiseELBO(), case.model, case.other, case.x).rows}
    assert {site: row.parents_model for site, row in rows.items()} == {
        "z3": (), "z2": ("z3",), "z1": ("z2",), "x": ("z1",),
    }  # fmt: skip
    assert [rows[site].parents_guide for site in ("z1", "z2", "z3")] == [(), ("z1",), ("z2",)]


def test_vdm_is_a_hierarchy_whose_guide_composes_to_its_marginal():
    noising = ph.Diffusion(LinearSchedule(-10.0, 4.0), num_layers=20)
    x, s, t = torch.randn(3, 5), torch.tensor(0.3), torch.tensor(0.8)
    first = noising.marginal(s, x).base_dist
    step = noising.step(s, t, first.mean).base_dist
    both = noising.marginal(t, x).base_dist
    close(step.mean, both.mean)
    close(step.scale**2 + (step.mean / first.mean) ** 2 * first.scale**2, both.scale**2)
    assert not list(noising.parameters())


P = torch.tensor([[0.10, 0.05, 0.15, 0.02], [0.08, 0.20, 0.01, 0.09], [0.06, 0.04, 0.12, 0.08]], dtype=torch.float64)


def product(factors):
    return factors[0][:, None] * factors[1][None, :]


def forward_kl(factors):
    return (P * (P / product(factors)).log()).sum()


def some_factors():
    return [torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.1, 0.3, 0.2])]


def test_eq18_product_of_factors_is_a_density():
    close(product(some_factors()).sum(), 1.0)


def test_eq19_and_eq27_best_product_has_the_marginals():
    best = [P.sum(1), P.sum(0)]
    mutual_information = (P * (P / (P.sum(1, keepdim=True) * P.sum(0, keepdim=True))).log()).sum()
    close(forward_kl(best), mutual_information)
    logits = [factor.log().requires_grad_() for factor in some_factors()]
    optimiser = torch.optim.Adam(logits, lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        forward_kl([logit.softmax(0) for logit in logits]).backward()
        optimiser.step()
    for logit, marginal in zip(logits, best, strict=True):
        close(logit.softmax(0).detach(), marginal, 1e-6)


def test_eq20_divergence_is_a_cross_entropy_and_a_constant():
    q = some_factors()
    close(forward_kl(q), (P * P.log()).sum() - (P * (q[0].log()[:, None] + q[1].log()[None])).sum())


@pytest.mark.parametrize("j", [0, 1])
def test_eq21_one_factor_meets_its_marginal_only(j):
    q, others = some_factors(), some_factors()
    others[j] = others[j].flip(0)
    marginal = P.sum(1 - j)
    close(forward_kl(q) - forward_kl(others), -(marginal * (q[j].log() - others[j].log())).sum())


def test_eq22_to_eq26_lagrangian_is_stationary_at_the_marginal_with_multiplier_one():
    marginal = P.sum(1)

    def lagrangian(factor, multiplier):
        return -(marginal * factor.log()).sum() + multiplier * (factor.sum() - 1)  # (22)

    factor, multiplier = marginal.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
    slopes = torch.autograd.grad(lagrangian(factor, multiplier), (factor, multiplier))  # (23)
    close(slopes[0], torch.zeros(3))
    close(slopes[1], torch.zeros(()))
    anywhere = torch.tensor([0.3, 0.9, 0.1], requires_grad=True)
    (slope,) = torch.autograd.grad(lagrangian(anywhere, torch.tensor(1.7)), anywhere)
    close(slope, 1.7 - marginal / anywhere.detach())  # (24)
    for guess in (0.5, 1.0, 2.0):
        stationary = marginal / guess  # (25)
        close(stationary.sum(), 1.0 / guess)  # (26): a density for a multiplier of one alone
