"""Kind D: latents that are summed out, under masks, in plates of one, in scales and in trees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

import pyro_hvae as ph
from tests.kinds.checks import close

PARALLEL = {"enumerate": "parallel"}


def nothing(*args: Any, **kwargs: Any) -> None:
    """A guide without sites: all latents are summed out."""


def evidence_of(bound: Any) -> Callable[..., Tensor]:
    return lambda model, *args: bound.per_datum(model, nothing, *args)


EXACT = {
    "trace": evidence_of(ph.TraceELBO()),
    "layerwise": evidence_of(ph.LayerwiseELBO()),
    "iwelbo": evidence_of(ph.IWELBO(3)),
    "enumerate": lambda model, *args: ph.log_evidence(model, None, *args, method="enumerate").value,
}


def logsumexp(*terms: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(*terms)), 0)


# Masks

RATES = torch.tensor([0.5, 2.0, 6.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def poisson_mixture(x: Tensor) -> Tensor:
    return torch.logsumexp(WEIGHTS.log() + dist.Poisson(RATES).log_prob(x[..., None]), -1)


@pytest.mark.parametrize("verb", EXACT)
@pytest.mark.parametrize("keep", [[True, False, True], [False, False, False], [False, True, False]], ids=str)
def test_a_masked_mixture_of_as_many_states_as_data(verb: str, keep: list[bool]) -> None:
    x, mask = torch.tensor([0.0, 3.0, 7.0]), torch.tensor(keep)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3), poutine.mask(mask=mask):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
            pyro.sample("x", dist.Poisson(RATES[k]), obs=x)

    close(EXACT[verb](model, x), torch.where(mask, poisson_mixture(x), 0.0))


@pytest.mark.parametrize("verb", EXACT)
def test_masks_of_the_distributions_themselves(verb: str) -> None:
    x, mask = torch.tensor([0.5, 0.5]), torch.tensor([True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 2):
            k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4).mask(mask), infer=PARALLEL)
            pyro.sample("x", dist.Normal(1.0 * k, 1.0).mask(mask), obs=x)

    truth = logsumexp(*[dist.Normal(float(k), 1.0).log_prob(x[0]) for k in range(4)]) - math.log(4)
    close(EXACT[verb](model, x), torch.stack([truth, torch.zeros(())]))


def test_a_masked_site_beside_a_drawn_one() -> None:
    x, mask = torch.tensor([0.5, -2.0, 1.0]), torch.tensor([True, False, True])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer=PARALLEL)
            pyro.sample("x", dist.Normal(2.0 * k - 1, 1.0), obs=x)

    def posterior(x: Tensor) -> None:
        with pyro.plate("rows", 3), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    mixture = logsumexp(
        math.log(0.7) + dist.Normal(-1.0, 1.0).log_prob(x), math.log(0.3) + dist.Normal(1.0, 1.0).log_prob(x)
    )
    truth = torch.where(mask, mixture + dist.Normal(0.0, 2**0.5).log_prob(x), 0.0)
    close(ph.log_evidence(model, posterior, x, num_samples=20).value, truth)
    close(ph.IWELBO(3).per_datum(model, posterior, x), truth)


MOVES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def hmm(x: Tensor, lengths: Tensor) -> None:
    state: Any = None
    with pyro.plate("sequences", len(x), dim=-1):
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                state = pyro.sample(f"s{t}", dist.Categorical(START if t == 0 else MOVES[state]), infer=PARALLEL)
                pyro.sample(f"x{t}", dist.Normal(MEANS[state], 1.0), obs=x[:, t])


def forward_algorithm(x: Tensor) -> Tensor:
    """Log-density of one sequence."""
    message = START.log() + dist.Normal(MEANS, 1.0).log_prob(x[0])
    for value in x[1:]:
        message = torch.logsumexp(message[:, None] + MOVES.log(), 0) + dist.Normal(MEANS, 1.0).log_prob(value)
    return message.logsumexp(0)


def smoothed(x: Tensor) -> Tensor:
    """Posterior probabilities (T, S) of the states of one sequence, by enumeration of all paths."""
    table = torch.zeros(len(x), 3)
    for path in itertools.product(range(3), repeat=len(x)):
        log_joint = START[path[0]].log() + sum(MOVES[a, b].log() for a, b in itertools.pairwise(path))
        log_joint = log_joint + sum(dist.Normal(MEANS[s], 1.0).log_prob(v) for s, v in zip(path, x, strict=True))
        for t, s in enumerate(path):
            table[t, s] += log_joint.exp()
    return table / table.sum(1, keepdim=True)


def sequences(count: int, steps: int) -> Tensor:
    return torch.sin(torch.arange(float(count * steps))).reshape(count, steps) * 2


@pytest.mark.parametrize("lengths", [[4, 2, 1], [1, 1, 1], [3, 4, 4, 2, 1], [2], [1]], ids=str)
@pytest.mark.parametrize("verb", EXACT)
def test_ragged_sequences(verb: str, lengths: list[int]) -> None:
    x = sequences(len(lengths), 4)
    truth = torch.stack([forward_algorithm(row[:length]) for row, length in zip(x, lengths, strict=True)])
    close(EXACT[verb](hmm, x, torch.tensor(lengths)), truth)


def test_ragged_sequences_after_whole_ones() -> None:
    x = sequences(3, 3)
    for lengths in ([3, 3, 3], [3, 1, 2]):
        truth = torch.stack([forward_algorithm(row[:length]) for row, length in zip(x, lengths, strict=True)])
        close(ph.TraceELBO().per_datum(hmm, nothing, x, torch.tensor(lengths)), truth)
    close(ph.TraceELBO().loss(hmm, nothing, x, torch.tensor([3, 1, 2])), -truth.sum())


# Plates of one


@pytest.mark.parametrize("verb", EXACT)
def test_one_sequence(verb: str) -> None:
    x = sequences(1, 4)
    close(EXACT[verb](hmm, x, torch.tensor([4])), forward_algorithm(x[0])[None])


@pytest.mark.parametrize("verb", EXACT)
def test_one_row_after_several(verb: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
            pyro.sample("x", dist.Poisson(RATES[k]), obs=x)

    for x in (torch.tensor([0.0, 3.0]), torch.tensor([4.0])):
        close(EXACT[verb](model, x), poisson_mixture(x))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1)])
def test_nested_plates_of_one(sizes: tuple[int, int]) -> None:
    x = torch.linspace(-1.0, 2.0, sizes[0] * sizes[1]).reshape(sizes)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", sizes[1], dim=-1):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer=PARALLEL)
            with pyro.plate("views", sizes[0], dim=-2):
                pyro.sample("x", dist.Normal(2.0 * k - 1, 1.0), obs=x)

    log_likelihood = [dist.Normal(loc, 1.0).log_prob(x).sum(0) for loc in (-1.0, 1.0)]
    truth = logsumexp(math.log(0.7) + log_likelihood[0], math.log(0.3) + log_likelihood[1])
    for verb in EXACT.values():
        close(verb(model, x), truth)


def test_gradient_in_a_plate_of_one() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit = nn.Parameter(torch.tensor(0.4))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                k = pyro.sample("k", dist.Bernoulli(logits=self.logit), infer=PARALLEL)
                pyro.sample("x", dist.Normal(3.0 * k, 1.0), obs=x)

    model, x = Model(), torch.tensor([2.0])
    (found,) = torch.autograd.grad(-ph.TraceELBO().differentiable_loss(model, nothing, x), model.logit)
    prior = torch.sigmoid(torch.tensor(0.4))
    log_odds = 0.4 + dist.Normal(3.0, 1.0).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x)
    close(found, (torch.sigmoid(log_odds) - prior).squeeze())


# Exact draws of what was summed out


@pytest.mark.parametrize("rows", [1, 3])
def test_states_are_drawn_from_their_posterior(rows: int) -> None:
    x = torch.tensor([0.0, 3.0, 7.0])[:rows]

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
            pyro.sample("x", dist.Poisson(RATES[k]), obs=x)

    tree = ph.to_datatree(model, nothing, x, num_draws=4000)
    draws = tree["posterior"]["k"].values[0]
    assert draws.shape == (4000, rows)
    right = torch.softmax(WEIGHTS.log() + dist.Poisson(RATES).log_prob(x[:, None]), -1)
    close(np.stack([(draws == k).mean(0) for k in range(3)], -1), right, 0.035)
    replicates = tree["posterior_predictive"]["x"].values[0]
    close(replicates.mean(0), right @ RATES, 0.25)
    given = np.where(draws == 2, replicates, 0).sum(0) / (draws == 2).sum(0).clip(1)
    assert abs(given[-1] - 6.0) < 0.3 or rows == 1


def test_states_of_a_chain_are_drawn_jointly() -> None:
    x, lengths = sequences(2, 3), torch.tensor([3, 3])
    posterior = ph.to_datatree(hmm, nothing, x, lengths, num_draws=4000)["posterior"]
    states = np.stack([posterior[f"s{t}"].values[0] for t in range(3)], -1)
    for row in range(2):
        found = np.stack([(states[:, row] == s).mean(0) for s in range(3)], -1)
        close(found, smoothed(x[row]), 0.035)
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (states[:, 0, 0], states[:, 0, 1]), 1 / 4000)
    right = torch.zeros(3, 3)
    for path in itertools.product(range(3), repeat=3):
        log_joint = START[path[0]].log() + MOVES[path[0], path[1]].log() + MOVES[path[1], path[2]].log()
        right[path[0], path[1]] += (log_joint + dist.Normal(MEANS[list(path)], 1.0).log_prob(x[0]).sum()).exp()
    close(pairs, right / right.sum(), 0.035)


def test_states_given_the_drawn_latents() -> None:
    means, x = torch.tensor([-1.0, 1.0]), torch.tensor([0.3, -0.4, 2.0])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
            pyro.sample("x", dist.Normal(means[k] + z, 0.8), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(x / 3, 0.9))

    tree = ph.to_datatree(model, guide, x, num_draws=4000)
    z = torch.as_tensor(tree["posterior"]["z"].values[0])
    k = torch.as_tensor(tree["posterior"]["k"].values[0])
    log_joint = torch.stack(
        [math.log(w) + dist.Normal(m + z, 0.8).log_prob(x) for w, m in zip((0.4, 0.6), means, strict=True)]
    )
    probability = torch.softmax(log_joint, 0)[1]
    for weight in (1.0, z):  # residuals are uncorrelated with anything that z tells
        residual = weight * (k - probability)
        assert bool((residual.mean(0).abs() < 4 * residual.std(0) / 4000**0.5).all())
    noise = torch.as_tensor(tree["posterior_predictive"]["x"].values[0]) - means[k.long()] - z
    close(noise.mean(0), torch.zeros(3), 0.06)
    close(noise.std(0), torch.full((3,), 0.8), 0.05)


def test_a_state_of_the_whole_data_set() -> None:
    x = torch.tensor([0.4, 1.0, -0.2])

    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer=PARALLEL)
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    log_joint = torch.stack([math.log(p) + dist.Normal(k, 1.0).log_prob(x).sum() for p, k in ((0.7, 0.0), (0.3, 1.0))])
    close(ph.TraceELBO().per_datum(model, nothing, x), log_joint.logsumexp(0))
    draws = ph.to_datatree(model, nothing, x, num_draws=4000)["posterior"]["k"].values[0]
    assert draws.shape == (4000,)
    close(draws.mean(), log_joint.softmax(0)[1], 0.035)


# Scales


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_a_scale_around_the_whole_plate(scale: float) -> None:
    x = torch.tensor([0.0, 3.0, 7.0])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3), poutine.scale(scale=scale):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
            pyro.sample("x", dist.Poisson(RATES[k]), obs=x)

    truth = scale * poisson_mixture(x)
    close(TraceEnum_ELBO(max_plate_nesting=1).loss(model, nothing, x), -truth.sum())
    close(ph.TraceELBO().per_datum(model, nothing, x), truth)
    close(ph.TraceELBO().loss(model, nothing, x), -truth.sum())


def test_a_scale_around_a_chain_of_states() -> None:
    x, lengths = sequences(2, 3), torch.tensor([3, 3])
    scaled = poutine.scale(hmm, scale=0.5)
    truth = 0.5 * torch.stack([forward_algorithm(row) for row in x])
    close(ph.TraceELBO().per_datum(scaled, nothing, x, lengths), truth)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_mixture_with_global_means_on_a_minibatch(batch: int) -> None:
    size, means = 20, torch.tensor([-2.0, 2.0])
    x = torch.linspace(-3.0, 2.5, batch)

    def locations() -> Tensor:  # the prior is narrow, so that every draw has the same likelihood
        with pyro.plate("components", 2):
            return pyro.sample("means", dist.Normal(means, 1e-9))

    def model(x: Tensor) -> None:
        loc = locations()
        with pyro.plate("rows", size, subsample=torch.arange(len(x))):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
            pyro.sample("x", dist.Normal(loc[..., k] if loc.dim() == 1 else pick(loc, k), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        locations()

    mixture = logsumexp(
        math.log(0.3) + dist.Normal(-2.0, 1.0).log_prob(x), math.log(0.7) + dist.Normal(2.0, 1.0).log_prob(x)
    )
    truth = -size / batch * mixture.sum()
    pyro_loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    close(pyro_loss, truth, 1e-5)
    close(ph.TraceELBO().loss(model, guide, x), truth, 1e-5)
    close(ph.TraceELBO(3).loss(model, guide, x), truth, 1e-5)


def pick(loc: Tensor, k: Tensor) -> Tensor:
    """Return loc[..., k] where loc has particles to the left of its two components."""
    lower, upper = loc[..., :1], loc[..., 1:]
    return torch.where(k == 1, upper, lower)


def test_gradient_of_a_global_parameter_on_a_minibatch() -> None:
    size, x = 30, torch.tensor([0.5, 2.0, -1.0])

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.7))

        def forward(self, x: Tensor) -> None:
            pyro.sample("gap", dist.Normal(self.loc, 1e-9))

    def model(x: Tensor) -> None:
        gap = pyro.sample("gap", dist.Normal(torch.zeros(()), 2.0))
        with pyro.plate("rows", size, subsample=torch.arange(3)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer=PARALLEL)
            pyro.sample("x", dist.Normal(gap * k, 1.0), obs=x)

    guide = Guide()
    (found,) = torch.autograd.grad(ph.TraceELBO().differentiable_loss(model, guide, x), guide.loc)
    gap = torch.tensor(0.7, requires_grad=True)
    mixture = logsumexp(
        math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x), math.log(0.3) + dist.Normal(gap, 1.0).log_prob(x)
    )
    log_joint = dist.Normal(0.0, 2.0).log_prob(gap) + size / 3 * mixture.sum()
    (right,) = torch.autograd.grad(-log_joint, gap)
    close(found, right, 1e-5)


# Annealing


def annealed_model(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer=PARALLEL)
        pyro.sample("x", dist.Normal(z + 2.0 * k, 1.0), obs=x)


def annealed_truth(x: Tensor) -> Tensor:
    wide = 2**0.5
    return logsumexp(
        math.log(0.7) + dist.Normal(0.0, wide).log_prob(x), math.log(0.3) + dist.Normal(2.0, wide).log_prob(x)
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_annealing_from_the_prior(rows: int) -> None:
    x = torch.tensor([0.5, -1.0, 3.0])[:rows]
    chains = ph.evidence.anneal(annealed_model, None, x, base="prior", num_chains=300, betas=10, num_leapfrog=2)
    close(chains.log_weights.logsumexp(0) - math.log(300), annealed_truth(x), 0.15)


def test_a_bracket_from_the_prior() -> None:
    x = torch.tensor([0.5, -1.0])
    bracket = ph.evidence_sandwich(annealed_model, None, x, num_chains=40, betas=15, num_leapfrog=2)
    assert bool((bracket.lower - 0.1 <= annealed_truth(x)).all())
    assert bool((annealed_truth(x) <= bracket.upper + 0.1).all())
    assert bool((bracket.upper - bracket.lower < 0.7).all())


def test_prior_draws_with_marked_sites() -> None:
    x = torch.tensor([0.5, -1.0])
    found = ph.log_evidence(annealed_model, None, x, num_samples=4000, method="prior")
    close(found.value, annealed_truth(x), 0.08)
