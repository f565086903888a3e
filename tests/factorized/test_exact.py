"""Gaussian posteriors and discrete tables: both directions against closed forms."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_hvae.factorized import compare_guides, forward_kl, reverse_kl, total_correlation
from tests.linear_gaussian import Oracle, linear_gaussian

COUPLED = torch.tensor([[2.0, 0.9, -0.4], [0.9, 1.0, 0.3], [-0.4, 0.3, 0.8]], dtype=torch.float64)
CENTRE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def coupled():
    pyro.sample("z", dist.MultivariateNormal(CENTRE, COUPLED))


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


def test_forward_is_marginals_reverse_is_conditionals_with_the_two_closed_divergences():
    precision = COUPLED.inverse()
    forward, reverse = forward_kl(coupled).distribution("z"), reverse_kl(coupled).distribution("z")
    close(forward.mean, CENTRE)
    close(reverse.mean, CENTRE)
    close(forward.variance, COUPLED.diagonal())
    close(reverse.variance, 1 / precision.diagonal())
    found = compare_guides(coupled, num_samples=200)
    correlation = 0.5 * (COUPLED.diagonal().log().sum() - COUPLED.logdet())
    close(found.forward[0], correlation)
    close(found.total_correlation, correlation)
    close(total_correlation(coupled), correlation)
    close(found.reverse[1], 0.5 * (precision.diagonal().log().sum() - precision.logdet()))
    close(found.log_evidence, torch.tensor(0.0))
    # Each is the better one by its own measure.
    assert found.forward[0] < found.forward[1]
    assert found.reverse[1] < found.reverse[0]


def test_a_block_of_all_is_the_posterior_either_way():
    for fit in (forward_kl, reverse_kl):
        guide = fit(coupled, blocks=[("z",)])
        close(guide.distribution("z").covariance_matrix, COUPLED)
    assert abs(float(total_correlation(coupled, blocks=[("z",)]))) < 1e-12


def test_every_datum_of_a_chain_has_marginals_of_its_own():
    case = linear_gaussian(2, size=4)
    oracle = Oracle(case.model)
    guide, other = forward_kl(case.model, case.x), reverse_kl(case.model, case.x)
    mean, covariance = oracle.posterior(case.x)
    names = list(guide.latents.sites)
    forward = torch.cat([guide.distribution(name).mean for name in names], -1)
    assert names == ["z2", "z1"]
    order = [2, 3, 4, 0, 1]  # the oracle stacks z1, of two dims, before z2, of three
    mean, covariance = mean[:, order].detach(), covariance[order][:, order].detach()
    close(forward, mean)
    variance = torch.cat([guide.distribution(name).variance for name in names], -1)
    close(variance, covariance.diagonal().expand_as(variance))
    narrow = torch.cat([other.distribution(name).variance for name in names], -1)
    close(narrow, (1 / covariance.inverse().diagonal()).expand_as(narrow))
    found = compare_guides(case.model, case.x, num_samples=200)
    close(found.log_evidence, oracle.log_evidence(case.x).detach())
    expected = 0.5 * (covariance.diagonal().log().sum() - covariance.logdet())
    close(found.forward[0], expected.expand(len(case.x)))
    joint = forward_kl(case.model, case.x, blocks=[tuple(names)])
    close(joint.gaussian()[1], covariance.expand(len(case.x), -1, -1))
    close(compare_guides(case.model, case.x, guides={"joint": joint}, num_samples=200).forward[0], torch.zeros(4))


# Tables

TABLE = torch.tensor(
    [[[0.10, 0.02], [0.05, 0.13]], [[0.20, 0.01], [0.04, 0.11]], [[0.0, 0.14], [0.08, 0.12]]], dtype=torch.float64
)


def table():
    """a in {0, 1, 2}, b and c in {0, 1}: any joint table, one conditional after another."""
    a = pyro.sample("a", dist.Categorical(TABLE.sum((1, 2))))
    b = pyro.sample("b", dist.Bernoulli(TABLE.sum(2)[a, 1] / TABLE.sum((1, 2))[a]))
    pyro.sample("c", dist.Bernoulli(TABLE[a, b.long(), 1] / TABLE.sum(2)[a, b.long()]))


def tables_of(guide):
    return [guide.factor(name).tables().detach() for name in ("a", "b", "c")]


def product(tables):
    a, b, c = tables
    return a[:, None, None] * b[:, None] * c


def divergence(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


def test_forward_tables_are_the_marginal_tables_and_the_multiplier_is_one():
    tables = tables_of(forward_kl(table))
    for dims, found in zip([(1, 2), (0, 2), (0, 1)], tables, strict=True):
        close(found, TABLE.sum(dims))
    # Seed eq. 24-26: d/dq_i [ -sum p log q + lambda (sum q - 1) ] = 0 has lambda = p_i(v)/q_i(v) = 1 at every entry.
    free = [found.clone().requires_grad_() for found in tables]
    divergence(TABLE, product(free)).backward()
    for found in free:
        close(-found.grad, torch.ones_like(found))


def test_total_correlation_of_a_table():
    expected = divergence(TABLE, product([TABLE.sum(dims) for dims in [(1, 2), (0, 2), (0, 1)]]))
    close(total_correlation(table), expected)
    found = compare_guides(table, num_samples=500)
    close(found.forward[0], expected)
    pair = TABLE.sum(2)[:, :, None] * TABLE.sum((0, 1))
    close(total_correlation(table, blocks=[("a", "b")]), divergence(TABLE, pair))
    close(total_correlation(table, blocks=[("b", "a")]), divergence(TABLE, pair))


def positive():
    a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.1, 0.7, 0.4])[a]))
    pyro.sample("c", dist.Bernoulli(0.2 + 0.6 * b * (a == 1)))


def test_reverse_tables_are_a_stationary_point_and_no_worse_than_any_start():
    guide = reverse_kl(positive)
    tables = [guide.factor(name).tables().detach() for name in ("a", "b", "c")]
    log_p = torch.zeros(3, 2, 2)
    for a, b, c in itertools.product(range(3), range(2), range(2)):
        values = {"a": torch.tensor(a), "b": torch.tensor(float(b)), "c": torch.tensor(float(c))}
        log_p[a, b, c] = poutine.trace(poutine.condition(positive, values)).get_trace().log_prob_sum()
    q = product(tables)
    best = (q * (q.log() - log_p)).sum()
    # log q_i = E_{-i} log p + const at each factor
    for position, found in enumerate(tables):
        others = q / found.reshape([-1 if d == position else 1 for d in range(3)])
        mean = (others * log_p).sum([d for d in range(3) if d != position])
        close(found, mean.softmax(0))
    for seed in range(20):
        start = [torch.distributions.Dirichlet(torch.ones(n)).sample() for n in (3, 2, 2)]
        q = product(start)
        assert best <= (q * (q.log() - log_p)).sum() + 1e-12, seed
    close(compare_guides(positive, num_samples=500).reverse[1], best)


def test_reverse_of_a_two_mode_table_stays_where_it_starts():
    def agree():
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.6)))
        pyro.sample("b", dist.Bernoulli(torch.tensor([0.01, 0.99])[a.long()]))

    low = reverse_kl(agree, start={"a": torch.tensor(0.0), "b": torch.tensor(0.0)})
    high = reverse_kl(agree, start={"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
    assert float(low.distribution("a").probs) < 0.05
    assert float(high.distribution("a").probs) > 0.95
    found = compare_guides(agree, guides={"low": low, "high": high, "free": reverse_kl(agree)}, num_samples=500)
    assert found.reverse[1] < found.reverse[0]
    close(found.reverse[2], found.reverse[1])


def test_tables_of_each_datum_with_elements_of_an_event_and_an_inner_plate():
    x = torch.tensor([0.5, -1.0])
    scale = torch.tensor([1.0, 2.0, -1.5])

    def model(x):
        with pyro.plate("data", 2, dim=-2):
            bits = pyro.sample("bits", dist.Bernoulli(0.3 * torch.ones(2)).to_event(1))
            with pyro.plate("inner", 3, dim=-1):
                switch = pyro.sample("switch", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.8])))
            total = bits.sum(-1) + (switch * scale).sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(total, 1.0), obs=x[:, None])

    guide = forward_kl(model, x)
    assert guide.distribution("bits").base_dist.probs.shape == (2, 1, 2)
    assert guide.distribution("switch").probs.shape == (2, 3)
    for n in range(2):
        mass, bits, switch = 0.0, torch.zeros(2), torch.zeros(3)
        for values in itertools.product([0.0, 1.0], repeat=5):
            b, s = torch.tensor(values[:2]), torch.tensor(values[2:])
            prior = (
                torch.where(b > 0, 0.3, 0.7).prod()
                * (s * torch.tensor([0.2, 0.5, 0.8]) + (1 - s) * torch.tensor([0.8, 0.5, 0.2])).prod()
            )
            weight = prior * math.exp(-0.5 * float(x[n] - b.sum() - (s * scale).sum()) ** 2)
            mass, bits, switch = mass + weight, bits + weight * b, switch + weight * s
        close(guide.distribution("bits").base_dist.probs[n, 0], bits / mass)
        close(guide.distribution("switch").probs[n], switch / mass)


def test_many_discrete_latents_by_elimination():
    """A hidden Markov model of 3^14 configurations, against the forward-backward recursions; sequences of their own."""
    start = torch.tensor([0.5, 0.3, 0.2])
    move = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])
    level = torch.tensor([-1.0, 0.5, 2.0])
    x = torch.randn(2, 14)

    def model(x):
        with pyro.plate("sequences", 2):
            state = None
            for t in pyro.markov(range(14)):
                state = pyro.sample(f"z{t}", dist.Categorical(start if state is None else move[state]))
                pyro.sample(f"x{t}", dist.Normal(level[state], 1.0), obs=x[:, t])

    guide = forward_kl(model, x)
    assert "elimination" in guide.how
    seen = dist.Normal(level, 1.0).log_prob(x[..., None]).exp()
    forward, backward = [start * seen[:, 0]], [torch.ones(2, 3)]
    for t in range(1, 14):
        forward.append((forward[-1] @ move) * seen[:, t])
        backward.append((backward[-1] * seen[:, 14 - t]) @ move.T)
    for t in range(14):
        both = forward[t] * backward[13 - t]
        close(guide.distribution(f"z{t}").probs, both / both.sum(-1, keepdim=True))
    assert (guide.khat == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactness_is_seen_in_either_precision(dtype):
    torch.set_default_dtype(dtype)
    x = torch.linspace(-3.0, 4.0, 50)

    def model(x, power):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        basis = torch.stack([(0.7 * k * x).sin() for k in range(1, 21)], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((basis @ slope[..., None])[..., 0] ** power, 0.5), obs=x)

    assert "Gaussian" in forward_kl(model, x, 1).how


def test_a_wall_in_a_gaussian_is_no_gaussian():
    """Gradients are those of a Gaussian on both sides of the wall; the values are not."""

    def walled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("wall", torch.where(z > 0, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def step(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("step", torch.where(z > 9.0, 5.0, 0.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = torch.tensor([-1.0, 0.5])
    centre, width = x / 2, 0.5**0.5
    normal = dist.Normal(0.0, 1.0)
    moved = centre + width * normal.log_prob(centre / width).exp() / normal.cdf(centre / width)
    guide = forward_kl(walled, x, num_samples=40_000)
    close(guide.distribution("z").mean, moved, atol=0.02)
    with pytest.raises(ValueError, match="closed form for posteriors of linear-Gaussian"):
        total_correlation(walled, x)
    with pytest.raises(ValueError, match="the ELBO is -inf at step 0"):
        reverse_kl(walled, x)
    with pytest.raises(ValueError, match="closed form for posteriors of linear-Gaussian"):
        total_correlation(step, torch.tensor([9.0, 0.0]))
