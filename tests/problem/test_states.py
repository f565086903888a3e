"""Draws of what a model sums out: their exact posterior given the guide's draws, one for each particle."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_hvae.problem import Problem

PARALLEL = {"enumerate": "parallel"}
K = 6000


def nothing(*args):
    pass


def shares(states, count):
    """Relative frequencies of each state, (count, ...)."""
    return torch.stack([(states == k).double().mean(0) for k in range(count)])


def test_a_masked_state_is_drawn_from_its_prior():
    x, keep = torch.tensor([3.0, 3.0]), torch.tensor([True, False])

    def model(x):
        with pyro.plate("rows", 2), poutine.mask(mask=keep):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer=PARALLEL)
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    found = Problem(model, nothing)(x).run(K).draw_states()["k"].reshape(K, 2)
    log_odds = math.log(0.3 / 0.7) + dist.Normal(2.0, 1.0).log_prob(x[0]) - dist.Normal(0.0, 1.0).log_prob(x[0])
    right = torch.stack([log_odds.sigmoid(), torch.tensor(0.3)])
    assert ((found.mean(0) - right).abs() < 4 * (right * (1 - right) / K).sqrt()).all()


def test_particles_and_data_have_draws_of_their_own():
    """Nothing depends on the particle, so that its dim is missing in the factors."""

    def model():
        with pyro.plate("rows", 2):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2), infer=PARALLEL)
            pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=torch.tensor([0.5, 0.5]))

    found = Problem(model, nothing)().run(K).draw_states()["k"].reshape(K, 2).double()
    assert (found.mean(0) - 0.5).abs().max() < 4 * 0.5 / K**0.5
    assert abs(torch.corrcoef(found.T)[0, 1]) < 4 / K**0.5


def test_a_plate_inside_of_a_state_and_a_vector_as_state():
    """A one-hot state for each row, observed in three columns that follow it."""
    x, means = torch.tensor([[0.2, 1.0, 0.3], [2.0, 2.5, 0.5]]), torch.tensor([0.0, 1.0, 2.5])

    def model(x):
        with pyro.plate("rows", 2, dim=-2):
            k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])), infer=PARALLEL)
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal((k * means).sum(-1), 1.0), obs=x)

    found = Problem(model, nothing)(x).run(K).draw_states()["k"].reshape(K, 2, 3)
    assert (found.sum(-1) == 1).all()
    log_joint = torch.tensor([0.2, 0.3, 0.5]).log() + dist.Normal(means, 1.0).log_prob(x[..., None]).sum(1)
    right = log_joint.softmax(-1)
    assert ((found.mean(0) - right).abs() < 4 * (right * (1 - right) / K).sqrt()).all()


@pytest.mark.parametrize(("particles", "runs"), [(1, 1500), (2000, 10)])
def test_states_given_a_global_draw_are_drawn_jointly(particles, runs):
    """k and its child c, both summed out: their four pairs have the probabilities of Bayes' rule at each draw."""
    x = torch.tensor([1.0, -0.5])

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4)), infer=PARALLEL)
            c = pyro.sample("c", dist.Bernoulli(0.2 + 0.6 * k), infer=PARALLEL)
            pyro.sample("x", dist.Normal(loc + 1.5 * c - k, 0.7), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Delta(torch.tensor(0.3)))

    problem = Problem(model, guide)(x)
    counts = torch.zeros(2, 2, 2)
    for _ in range(runs):
        drawn = {name: v.reshape(particles, 2).long() for name, v in problem.run(particles).draw_states().items()}
        for row in range(2):
            for k, c in itertools.product(range(2), repeat=2):
                counts[row, k, c] += ((drawn["k"][:, row] == k) & (drawn["c"][:, row] == c)).sum()
    right = torch.empty(2, 2, 2)
    for k, c in itertools.product(range(2), repeat=2):
        prior = (0.4 if k else 0.6) * abs(1 - c - (0.2 + 0.6 * k))
        right[:, k, c] = math.log(prior) + dist.Normal(0.3 + 1.5 * c - k, 0.7).log_prob(x)
    right = right.flatten(1).softmax(1).reshape(2, 2, 2)
    total = particles * runs
    assert ((counts / total - right).abs() < 4 * (right * (1 - right) / total).sqrt() + 3 / total).all()


def test_states_of_no_probability_are_named():
    def model():
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=PARALLEL)
        pyro.factor("never", -math.inf * torch.ones_like(k))

    with pytest.raises(ValueError, match=r"states of \['k'\].*no state has a positive probability"):
        Problem(model, nothing)().run(3).draw_states()


def test_sites_that_the_guide_enumerates_are_drawn_when_asked_for():
    """Weights of drawn classes and of summed ones have the same mean, p(x)."""
    x, prior, means = torch.tensor([0.5, 2.0]), torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0])

    def model(x):
        with pyro.plate("rows", 2):
            y = pyro.sample("y", dist.Categorical(prior))
            z = pyro.sample("z", dist.Normal(means[y], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 2):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])), infer=PARALLEL)
            pyro.sample("z", dist.Normal((means[y] + x) / 2, 0.5**0.5))

    problem = Problem(model, guide)(x)
    truth = (prior.log() + dist.Normal(means, 2**0.5).log_prob(x[:, None])).logsumexp(1)
    summed, drawn = problem.run(5), problem.run(K, draw_enumerated=True)
    torch.testing.assert_close(summed.log_weights, truth.expand(5, 2))
    assert drawn.values["y"].shape == (K, 2)
    assert (drawn.values["z"] - (means[drawn.values["y"]] + x) / 2).std(0).sub(0.5**0.5).abs().max() < 0.03
    weights = drawn.log_weights.exp()
    assert ((weights.mean(0) - truth.exp()).abs() < 4 * weights.std(0) / K**0.5).all()
    assert set(problem.structure.enumerated_in_guide) == {"y"}  # as before
