"""Columns of every family against scipy, masked entry by entry."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.stats as stats
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_hvae import IWELBO, BottomUp, LayerwiseELBO, StandardNormal, TopDown, distributions
from pyro_hvae.kernels import (
    Bernoulli,
    Beta,
    Categorical,
    Columns,
    Gamma,
    Gaussian,
    LinearGaussian,
    LogNormal,
    NegativeBinomial,
    Ordinal,
    Poisson,
    StudentT,
    ZeroInflated,
)
from pyro_hvae.problem.checks import check_observations


def softplus(value):
    return np.logaddexp(0.0, value)


def scale(raw, floor=1e-3):
    """The map to positive numbers that is 1 at zero."""
    return softplus(raw + math.log(math.expm1(1 - floor))) + floor


def logistic(value):
    return 1 / (1 + np.exp(-value))


def ordinal(p, x):
    cuts = np.log(np.arange(1, 4) / (4 - np.arange(1, 4)))
    edges = np.concatenate([[0.0], logistic(cuts - p[0]), [1.0]])
    return np.log(edges[int(x) + 1] - edges[int(x)])


def categorical(p, x):
    return p[int(x)] - np.log(np.exp(p).sum())


def zero_inflated(log_pmf, gate, x):
    share = logistic(gate - 2)
    return np.log(share * (x == 0) + (1 - share) * np.exp(log_pmf))


def negative_binomial(a, logit, x):
    return stats.nbinom.logpmf(x, softplus(a) + 1e-6, logistic(-logit))  # scipy's p is that of stopping


# kernel of a network, parameters a column, values, and log-density by scipy
FAMILIES = {
    "gaussian": (lambda net: Gaussian(net), 2, (-1.3, 0.0, 2.5),
                 lambda p, x: stats.norm.logpdf(x, p[0], scale(p[1]))),
    "student_t": (lambda net: StudentT(net), 3, (-30.0, 0.0, 2.5),
                  lambda p, x: stats.t.logpdf(x, 2 + softplus(p[2] + 8), p[0], scale(p[1]))),
    "log_normal": (lambda net: LogNormal(net), 2, (1e-3, 1.0, 40.0),
                   lambda p, x: stats.lognorm.logpdf(x, scale(p[1]), scale=np.exp(p[0]))),
    "gamma": (lambda net: Gamma(net), 2, (1e-3, 1.0, 40.0),
              lambda p, x: stats.gamma.logpdf(x, scale(p[1]), scale=scale(p[0]) / scale(p[1]))),
    "beta": (lambda net: Beta(net), 2, (1e-3, 0.5, 0.999),
             lambda p, x: stats.beta.logpdf(x, 1e-3 + 2 * scale(p[1], 0) * logistic(p[0]),
                                            1e-3 + 2 * scale(p[1], 0) * logistic(-p[0]))),
    "bernoulli": (lambda net: Bernoulli(net), 1, (0.0, 1.0),
                  lambda p, x: stats.bernoulli.logpmf(x, logistic(p[0]))),
    "ordinal": (lambda net: Ordinal(net, 4), 1, (0.0, 1.0, 2.0, 3.0), ordinal),
    "categorical": (lambda net: Categorical(net, num_categories=4), 4, (0.0, 1.0, 2.0, 3.0), categorical),
    "poisson": (lambda net: Poisson(net), 1, (0.0, 1.0, 17.0),
                lambda p, x: stats.poisson.logpmf(x, softplus(p[0]) + 1e-6)),
    "negative_binomial": (lambda net: NegativeBinomial(net), 2, (0.0, 1.0, 17.0),
                          lambda p, x: negative_binomial(p[0], p[1], x)),
    "zero_inflated_poisson": (lambda net: ZeroInflated(net), 2, (0.0, 1.0, 17.0),
                              lambda p, x: zero_inflated(stats.poisson.logpmf(x, softplus(p[0]) + 1e-6), p[1], x)),
    "zero_inflated_negative_binomial": (
        lambda net: ZeroInflated(net, "negative_binomial"), 3, (0.0, 1.0, 17.0),
        lambda p, x: zero_inflated(negative_binomial(p[0], p[1], x), p[2], x)),
}  # fmt: skip


def bias(*values):
    """A network whose output is the same for all parents."""
    layer = nn.Linear(2, len(values))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor(values))
    return layer


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihood_is_scipys(family):
    make, count, values, truth = FAMILIES[family]
    for draw in range(3):
        parameters = np.random.default_rng(draw).normal(0, 1.5, count) * (draw > 0)
        kernel = Columns(None, {"a": make(bias(*parameters))})
        row = kernel(torch.zeros(len(values), 2))
        expected = [truth(parameters, value) for value in values]
        np.testing.assert_allclose(row.log_prob(torch.tensor(values)[:, None]).detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_have_the_moments_and_lie_in_the_support(family):
    make, count, _, _ = FAMILIES[family]
    torch.manual_seed(3)
    row = Columns(None, {"a": make(bias(*(0.3 * torch.randn(count))))})(torch.zeros(2))
    x = row.sample((40_000,))
    assert x.dtype == torch.float64
    assert x.shape == (40_000, 1)
    assert row.base_dist.support.check(x).all()
    if family in ("ordinal", "categorical"):
        assert row.mean.isnan().all()
        found, expected = x.mean(), row.base_dist.parts[0].probs[0] @ torch.arange(4.0)
    else:
        found, expected = x.mean(), row.mean[0]
    error = 4 * x.std() / 200
    assert abs(found - expected) < error


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_finite_gradient_in_float32(family):
    make, count, values, _ = FAMILIES[family]
    torch.set_default_dtype(torch.float32)
    for size in (1.0, 30.0, -30.0):
        kernel = Columns(None, {"a": make(bias(*[size] * count))})
        for value in values:
            log_prob = kernel(torch.ones(1, 2)).log_prob(torch.tensor([[value]]))
            gradients = torch.autograd.grad(log_prob.sum(), kernel.parameters())
            assert all(gradient.isfinite().all() for gradient in gradients), (size, value)


def mixed(order=None, **options):
    """One column of each family; features of width 3."""
    columns = {name: make(nn.Linear(3, count)) for name, (make, count, _, _) in FAMILIES.items()}
    return Columns(nn.Linear(2, 3), columns, order=order, **options)


def rows(num_rows):
    generator = np.random.default_rng(0)
    return torch.stack(
        [torch.tensor(generator.choice(values, num_rows)) for _, _, values, _ in FAMILIES.values()], -1
    )


def mixed_pair():
    torch.manual_seed(0)
    width = len(FAMILIES)
    return TopDown(z=StandardNormal(2), x=mixed()), BottomUp(z=Gaussian(nn.Linear(width, 4)))


class TestMask:
    def test_masked_entries_change_nothing(self):
        model, guide = mixed_pair()
        x, mask = rows(9), torch.rand(9, len(FAMILIES)) < 0.6
        results = []
        for rubbish in (math.nan, 1e30, -5.0, 0.0):
            torch.manual_seed(1)
            loss = IWELBO(num_particles=3).differentiable_loss(model, guide, torch.where(mask, x, rubbish), mask=mask)
            results.append([loss, *torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])])
        for first, *others in zip(*results):
            assert first.isfinite().all()
            assert all(torch.equal(first, other) for other in others)

    def test_likelihood_is_that_of_the_observed_columns(self):
        model, _ = mixed_pair()
        x, mask = rows(9), torch.rand(9, len(FAMILIES)) < 0.6
        z = torch.randn(9, 2)
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(torch.where(mask, x, math.nan), mask=mask)
        trace.compute_log_prob()
        expected = sum(
            mask[:, j] * getattr(model.x, f"column_{j}")(model.x.net(z)).log_prob(x[:, j : j + 1])
            for j in range(len(FAMILIES))
        )
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)
        check_observations(trace)

    def test_a_masked_column_gives_its_own_parameters_no_gradient(self):
        model, guide = mixed_pair()
        mask = torch.ones(5, len(FAMILIES), dtype=torch.bool)
        mask[:, 3] = False
        loss = LayerwiseELBO().differentiable_loss(model, guide, rows(5), mask=mask)
        own = torch.autograd.grad(loss, list(model.x.column_3.parameters()))
        assert all(not gradient.any() for gradient in own)


class TestColumns:
    def test_order_is_that_of_the_data(self):
        names = list(FAMILIES)
        order = names[::-1]
        torch.manual_seed(0)
        straight = mixed()
        torch.manual_seed(0)
        turned = mixed(order)
        z, x = torch.randn(7, 2), rows(7)
        torch.testing.assert_close(straight(z).log_prob(x), turned(z).log_prob(x.flip(-1)))
        torch.testing.assert_close(
            straight(z).base_dist.log_prob(x).flip(-1), turned(z).base_dist.log_prob(x.flip(-1))
        )
        assert turned(z).base_dist.support.check(x.flip(-1)).all()
        assert turned(z).sample().shape == (7, len(names))

    def test_a_block_is_its_columns_one_by_one(self):
        net = nn.Linear(2, 4)
        block = Columns(None, {("a", "b"): Gaussian(net)})(torch.randn(5, 2))
        assert block.event_shape == (2,)
        assert block.has_rsample
        x = torch.randn(5, 2)
        torch.testing.assert_close(block.base_dist.log_prob(x).sum(-1), block.log_prob(x))

    def test_particles_and_context(self):
        columns = {"a": Gaussian(nn.Linear(4, 2)), "b": Bernoulli(nn.Linear(4, 1))}
        kernel = Columns(nn.Linear(3 + 2, 4), columns)
        assert kernel(torch.randn(6, 5, 3), torch.randn(5, 2)).batch_shape == (6, 5)

    def test_observations_outside_of_a_support_are_refused(self):
        model, guide = mixed_pair()
        x = rows(4)
        x[2, 3] = -1.0  # of the gamma column
        with pytest.raises(ValueError, match=r"first is -1.0 at index \(2, 3\)"):
            IWELBO(num_particles=2).per_datum(model, guide, x)

    def test_the_store_trains_every_parameter(self):
        model, guide = mixed_pair()
        before = {name: value.clone() for name, value in model.named_parameters()}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(3):
            svi.step(rows(20))
        assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())

    def test_exact_posterior_of_a_linear_gaussian_table(self):
        """log p(x_obs) of a factor model is a Gaussian's; importance sampling with many draws finds it."""
        torch.manual_seed(0)
        weight = torch.randn(3, 2)
        model = TopDown(
            z=StandardNormal(2),
            x=Columns(
                None,
                {
                    ("a", "b"): LinearGaussian(2, 2, weight=weight[:2], scale=0.7),
                    "c": LinearGaussian(2, 1, weight=weight[2:], scale=0.7),
                },
            ),
        )
        guide = BottomUp(z=Gaussian(bias(0, 0, 0, 0)))
        guide.z.net = nn.Linear(3, 4)
        nn.init.zeros_(guide.z.net.weight)
        nn.init.zeros_(guide.z.net.bias)
        x, mask = torch.randn(2, 3), torch.tensor([[True, False, True], [True, True, False]])
        bound = IWELBO(num_particles=200_000).per_datum(model, guide, x, mask=mask)
        covariance = weight @ weight.T + 0.49 * torch.eye(3)
        for n in range(2):
            seen = mask[n].nonzero()[:, 0]
            truth = dist.MultivariateNormal(torch.zeros(2), covariance[seen][:, seen]).log_prob(x[n, seen])
            assert abs(bound[n] - truth) < 0.02


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Columns(None, {}), "at least one column"),
            (lambda: Columns(None, {"a": Gaussian(nn.Linear(2, 2)), ("a",): Gaussian(nn.Linear(2, 2))}), "each name"),
            (lambda: Columns(None, {"a": Gaussian(nn.Linear(2, 2))}, order=["b"]), "order must hold"),
            (lambda: Columns(None, {"a": nn.Linear(2, 2)})(torch.zeros(2)), "Pyro distribution"),
            (lambda: Columns(None, {"a": Gaussian(nn.Linear(2, 4))})(torch.zeros(2)), r"need \(1,\)"),
            (lambda: Columns(None, {"a": Categorical(nn.Linear(2, 3), 0)})(torch.zeros(2)), r"event_dim=1"),
            (lambda: Columns(None, {("a", "b"): LinearGaussian(2, 2, covariance=torch.eye(2))})(torch.zeros(2)),
             "does not factorise"),
            (lambda: Ordinal(nn.Linear(2, 1), 1), "num_categories >= 2"),
            (lambda: ZeroInflated(nn.Linear(2, 2), "binomial"), "'poisson' or"),
            (lambda: ZeroInflated(nn.Linear(2, 3))(torch.zeros(2)), "even size"),
            (lambda: StudentT(nn.Linear(2, 4))(torch.zeros(2)), "a multiple of 3"),
            (lambda: Gamma(nn.Linear(2, 4), 0), "event_dim >= 1"),
            (lambda: Beta(nn.Linear(2, 4), floor=0.0), r"\(0, 1\)"),
            (lambda: distributions.Columns([]), "at least one"),
            (lambda: distributions.Columns([dist.Normal(0.0, 1.0)]), "last batch dim"),
            (lambda: distributions.Columns([dist.Normal(torch.zeros(2), 1.0)], [0, 0]), "permutation"),
        ],
    )  # fmt: skip
    def test_says_what_to_write(self, make, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make()
