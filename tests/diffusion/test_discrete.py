"""Discrete diffusion against enumeration: oracle 10, exact reversal, one expectation whatever the estimator."""

import math

import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import Absorbing, CosineReplacement, DiscreteDiffusion, PowerReplacement, Uniform
from pyro_hvae.models import discrete_diffusion
from tests.diffusion.categories import (
    BITS,
    Linear,
    Masked,
    Replaced,
    assert_rate_is_the_limit_of_short_steps,
    expected_bound,
    integrated,
    model_evidence,
    states,
)

X = states(2, 3)


def bits(denoiser, num_layers, corruption="absorbing", **options):
    return discrete_diffusion(
        denoiser, event_shape=3, num_categories=2, num_layers=num_layers, corruption=corruption, **options
    )


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


# Absorbing noise


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, 1.9460523), (2, 1.9415306), (4, 1.9391906), (8, 1.9380008), (16, 1.9374010)],
)
def test_mean_bound_of_finitely_many_layers(num_layers, expected):
    bound = expected_bound(*bits(Masked(), num_layers), X)
    assert abs(-(BITS * bound).sum() - expected) < 1e-7


@pytest.mark.parametrize(("num_layers", "expected"), [(1, 1.8576707), (2, 1.8228066), (4, 1.8068060), (16, 1.7954316)])
def test_bound_of_one_datum(num_layers, expected):
    bound = expected_bound(*bits(Masked(), num_layers), X)
    assert abs(-bound[5] - expected) < 1e-7
    assert abs(-BITS[5].log() - 1.7917595) < 1e-7


@pytest.mark.parametrize("schedule", [PowerReplacement(1.0), PowerReplacement(2.0), CosineReplacement()])
def test_continuous_bound_is_the_evidence_of_every_datum_whatever_the_schedule(schedule):
    model, guide = bits(Masked(), None, schedule=schedule)
    torch.testing.assert_close(integrated(model, guide, X), BITS.log(), atol=1e-10, rtol=0)
    wrong, values = Linear(), []
    for other in (schedule, PowerReplacement(3.0)):
        values.append(integrated(*bits(Constant(wrong), None, schedule=other), X).detach())
    torch.testing.assert_close(values[0], values[1], atol=1e-10, rtol=0)
    assert (values[0] - BITS.log()).abs().min() > 1e-3


class Constant(torch.nn.Module):
    """A denoiser that does not look at the noise level."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z, gamma):
        return self.net(z, torch.zeros_like(gamma))


def test_any_order_is_continuous_time():
    """One entry a layer, as many layers as entries: the bound of absorbing noise in continuous time."""
    net = Constant(Linear())
    layers = expected_bound(*bits(net, 3, "any_order"), X)
    torch.testing.assert_close(layers, integrated(*bits(net, None), X), atol=1e-10, rtol=0)
    torch.testing.assert_close(expected_bound(*bits(Masked(), 3, "any_order"), X), BITS.log(), atol=1e-12, rtol=0)


def test_weights_over_orders_have_no_variance_with_exact_conditionals():
    model, guide = bits(Masked(), 3, "any_order")
    x = X.repeat(20, 1)
    for bound in (ph.TraceELBO(), ph.IWELBO(4)):
        torch.testing.assert_close(bound.per_datum(model, guide, x), BITS.log().repeat(20), atol=1e-12, rtol=0)
    evidence = ph.log_evidence(model, guide, X, num_samples=100)
    assert (evidence.khat == -math.inf).all()
    assert (evidence.stderr < 1e-12).all()


def test_importance_weights_over_orders_of_a_wrong_denoiser():
    model, guide = bits(Linear(), 3, "any_order")
    exact = model_evidence(model, X)
    x = X.repeat(500, 1)
    bounds = {k: ph.IWELBO(k).per_datum(model, guide, x).reshape(500, 8) for k in (1, 8, 64)}
    gaps = [(exact - mean_and_error(draws)[0]).mean() for draws in bounds.values()]
    assert gaps[0] > 2 * gaps[1] > 8 * gaps[2] > 0
    evidence = ph.log_evidence(model, guide, X, num_samples=4000)
    assert ((evidence.value - exact).abs() < 4 * evidence.stderr + 1e-9).all()


# Uniform noise


def test_reversal_is_bayes_rule_over_the_alphabet():
    guide = DiscreteDiffusion(Uniform(4, PowerReplacement(2.0)), 5)
    every = torch.arange(4)[:, None]
    for s, t in ((0.0, 0.3), (0.2, 0.4), (0.35, 1.0), (0.999, 1.0)):
        s, t = torch.tensor(s), torch.tensor(t)
        for x in range(4):
            datum = torch.full((4, 1), x)
            below = guide.marginal(s, datum).log_prob(every).exp()
            for z in range(4):
                up = guide.step(s, t, every).log_prob(torch.full((4, 1), z)).exp()
                whole = (below * up).sum()
                assert abs(whole - guide.marginal(t, datum[:1]).log_prob(torch.tensor([[z]])).exp()) < 1e-12
                found = guide.posterior(s, t, torch.full((4, 1), z), datum).log_prob(every).exp()
                torch.testing.assert_close(found, below * up / whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["uniform", "absorbing"])
def test_steps_compose_and_reverse(kind):
    noise = {"uniform": Uniform, "absorbing": Absorbing}[kind](3, CosineReplacement())
    guide = DiscreteDiffusion(noise, 5, event_dim=1)
    count = noise.num_states
    every = torch.arange(count)
    rows, columns = every[:, None, None].expand(count, count, 1), every[None, :, None].expand(count, count, 1)
    s, t, u = torch.tensor(0.2), torch.tensor(0.5), torch.tensor(0.9)

    def table(a, b):
        return guide.step(a, b, rows).log_prob(columns).exp()

    torch.testing.assert_close(table(s, t) @ table(t, u), table(s, u), atol=1e-12, rtol=0)
    x = torch.full((count, count, 1), 1)
    forward = guide.marginal(s, x).log_prob(rows).exp() * table(s, t)
    posterior = guide.posterior(s, t, columns, x).log_prob(rows).exp()
    backward = posterior * guide.marginal(t, x).log_prob(columns).exp()
    torch.testing.assert_close(torch.where(forward > 0, backward, 0.0), forward, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["uniform", "absorbing"])
def test_exact_denoiser_gives_the_reversal_of_the_data_entry_by_entry(kind):
    """p(z_s^j | z_t) is that of the joint of data and noise, summed over the data."""
    model, guide = bits(Replaced() if kind == "uniform" else Masked(), 4, kind)
    every = states(model.corruption.num_states, 3)
    count = len(every)
    s, t = torch.tensor(0.25), torch.tensor(0.75)
    data = X[:, None].expand(8, count, 3)
    of_s = guide.marginal(s, data).log_prob(every.expand(8, count, 3)).exp()
    below = every[:, None].expand(count, count, 3)
    up = guide.step(s, t, below).log_prob(every.expand(count, count, 3)).exp()
    joint = (BITS @ of_s)[:, None] * up  # of z_s and z_t
    reachable = joint.sum(0) > 0
    found = model.transition(s, t, every).base_dist.probs
    for j in range(3):
        for value in range(model.corruption.num_states):
            share = joint[every[:, j] == value].sum(0) / joint.sum(0)
            torch.testing.assert_close(found[reachable, j, value], share[reachable], atol=1e-12, rtol=0)


def test_uniform_noise_in_continuous_time():
    """The mean bound with the exact denoiser is the entropy; its rate is the limit of short steps."""
    model, guide = bits(Replaced(), None, "uniform")
    assert abs((BITS * (integrated(model, guide, X, points=200) - BITS.log())).sum()) < 1e-7
    wrong, _ = bits(Linear(), None, "uniform")
    assert_rate_is_the_limit_of_short_steps(wrong, X)


def test_rates_near_the_ends_are_finite_in_float32():
    net = Linear().float()
    for kind in ("uniform", "absorbing"):
        model, guide = bits(net, None, kind)
        t = torch.tensor([0.0, 1e-7, 1e-3, 0.5, 0.9999, 1.0], dtype=torch.float32)
        x = X[5].expand(6, 3)
        torch.manual_seed(0)
        terms = model.matching(None, t, guide.marginal(t, x).sample(), x)
        gradients = torch.autograd.grad(terms.sum(), list(net.parameters()))
        assert terms.isfinite().all()
        assert all(g.isfinite().all() for g in gradients)
        exact = bits(Replaced(BITS).double(), None, "uniform")[0].matching(None, t.double(), x, x)
        assert (exact >= 0).all()


# One expectation


ESTIMATORS = [("uniform", 1), ("antithetic", 1), ("antithetic", 4), ("importance", 2), ("exact", 1)]


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "any_order"])
@pytest.mark.parametrize(("sampling", "layers"), ESTIMATORS)
def test_sampled_layers_have_the_expectation_of_the_exact_sum(kind, sampling, layers):
    model, guide = bits(Linear(), 3 if kind == "any_order" else 6, kind)
    x = X[5].expand(4000, 3)
    bound = DiffusionELBO(layers, sampling)
    if sampling == "importance":
        for _ in range(60):
            bound.differentiable_loss(model, guide, x[:200])
        assert bound._weights(torch.ones(())).std() > 0
    found, error = mean_and_error(bound.per_datum(model, guide, x, data_size=12_000))
    assert abs(found - expected_bound(model, guide, X[5:6]).item()) < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "any_order"])
@pytest.mark.parametrize("bound", [ph.TraceELBO(), ph.LayerwiseELBO()])
def test_the_full_chain_has_that_expectation_too(kind, bound):
    model, guide = bits(Linear(), 3 if kind == "any_order" else 6, kind)
    x = X[5].expand(4000, 3)
    found, error = mean_and_error(bound.per_datum(model, guide, x))
    assert abs(found - expected_bound(model, guide, X[5:6]).item()) < 4 * error


@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
@pytest.mark.parametrize("sampling", ["uniform", "antithetic", "importance"])
def test_continuous_time_by_sampling(kind, sampling):
    model, guide = bits(Linear(), None, kind)
    x = X[5].expand(6000, 3)
    found, error = mean_and_error(DiffusionELBO(4, sampling).per_datum(model, guide, x))
    exact = integrated(model, guide, X[5:6], points=200).item()
    assert abs(found - exact) < 4 * error
    assert error < 0.1
    assert DiffusionELBO().terms(model, guide, X)["reconstruction"].abs().max() == 0


def test_prior_matching_of_noise_that_leaves_something():
    model, guide = bits(Linear(), 4, "uniform", schedule=Half())
    expected = expected_bound(model, guide, X)
    terms = DiffusionELBO().terms(model, guide, X)
    assert terms["prior_matching"].min() > 0.01
    found, error = mean_and_error(DiffusionELBO(4).per_datum(model, guide, X[5].expand(4000, 3)))
    assert abs(found - expected[5]) < 4 * error


class Half(PowerReplacement):
    def forward(self, t):
        return 0.8 * t

    def kept(self, t):
        return 1 - 0.8 * t

    def derivative(self, t):
        return torch.full_like(t, 0.8)


def test_the_number_of_denoiser_calls_does_not_depend_on_the_number_of_layers():
    counts = []
    for num_layers in (10, 1000, None):
        net = Linear()
        calls = []
        net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        DiffusionELBO().loss(*bits(net, num_layers), X)
        counts.append(len(calls))
    assert counts == [2, 2, 1]


def test_another_alphabet_by_enumeration():
    """Five categories on two entries, an alphabet that is no power of two; all noises in one table."""
    x = states(5, 2)[::7]
    for kind, layers in (("absorbing", 3), ("uniform", 3), ("ordinal", 3), ("any_order", 2)):
        model, guide = discrete_diffusion(
            Linear(2, 5), event_shape=2, num_categories=5, num_layers=layers, corruption=kind
        )
        gap = model_evidence(model, x) - expected_bound(model, guide, x).detach()
        assert (gap > -1e-12).all()
        everything = model_evidence(model, states(5, 2))
        assert abs(everything.exp().sum() - 1) < 1e-12
        evidence = ph.log_evidence(model, guide, x, num_samples=4000)
        assert ((evidence.value - model_evidence(model, x)).abs() < 4 * evidence.stderr + 1e-9).all()
