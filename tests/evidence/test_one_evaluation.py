"""One problem is one evaluation: one minibatch for all passes, and nothing changed outside of it."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_hvae.evidence import anneal, evidence_sandwich, log_evidence, posterior_gap, refine
from pyro_hvae.problem import Problem

SIZE, BATCH = 40, 4


def model(x):
    with pyro.plate("rows", len(x), subsample_size=BATCH) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def posterior(x):
    with pyro.plate("rows", len(x), subsample_size=BATCH) as rows:
        pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))


def evidence(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


VALUES = {
    "importance": lambda *pair: log_evidence(*pair, num_samples=20, chunk_size=6).value,
    "bayes": lambda *pair: log_evidence(*pair, num_samples=30, chunk_size=7, method="bayes").value,
    "annealed": lambda *pair: log_evidence(*pair, num_samples=12, chunk_size=5, method="annealed").value,
    "lower": lambda *pair: evidence_sandwich(*pair, num_chains=3, betas=3).lower,
    "upper": lambda *pair: evidence_sandwich(*pair, num_chains=3, betas=3).upper,
    "elbo": lambda *pair: posterior_gap(*pair, num_samples=20, num_steps=2, learning_rate=1e-9).elbo,
    "refined": lambda *pair: posterior_gap(*pair, num_samples=20, num_steps=2, learning_rate=1e-9).refined_elbo,
}


@pytest.mark.parametrize("verb", VALUES)
def test_all_passes_see_one_minibatch(verb):
    """Under the exact posterior every log-weight is log p(x_n), and every estimate is if its data are one minibatch."""
    x = torch.linspace(-6.0, 5.0, SIZE)
    value = VALUES[verb](model, posterior, x)
    distance, index = (value[:, None] - evidence(x)).abs().min(1)
    assert distance.max() < 1e-6
    assert len(set(index.tolist())) == BATCH


def test_functions_of_one_problem_see_one_minibatch():
    x = torch.linspace(-6.0, 5.0, SIZE)
    problem = Problem(model, posterior)(x)
    first = log_evidence(problem, num_samples=20).value
    for verb in VALUES.values():
        torch.testing.assert_close(verb(problem), first, atol=1e-6, rtol=0.0)
    chains = anneal(problem, betas=3, num_chains=4)
    again = anneal(problem, betas=3, num_chains=2, moves=chains.moves)
    torch.testing.assert_close(again.log_weights, first.expand(2, BATCH), atol=1e-6, rtol=0.0)
    prior = log_evidence(problem, method="prior", num_samples=20_000)
    assert ((prior.value - first).abs() < 5 * prior.stderr).all()


def test_a_problem_is_called_without_more_data():
    problem = Problem(model, posterior)(torch.zeros(SIZE))
    with pytest.raises(TypeError, match="guide and its data bound already"):
        log_evidence(problem, posterior)


class Drifting(nn.Module):
    """A guide that changes a buffer whenever it runs, in either mode, and draws from the other generators."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones(()))
        self.drop = nn.Dropout(0.5)
        self.runs, self.fails_at = 0, -1

    def forward(self, x):
        self.runs += 1
        if self.runs == self.fails_at:
            raise RuntimeError("stop here")
        self.average.mul_(0.9)
        np.random.rand()  # noqa: NPY002
        random.random()
        scale = pyro.param("scale", lambda: torch.tensor(0.8), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.average * x / 2, scale))


def whole(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


VERBS = {
    "importance": lambda *pair: log_evidence(*pair, num_samples=12, chunk_size=4),
    "bayes": lambda *pair: log_evidence(*pair, num_samples=12, chunk_size=4, method="bayes"),
    "annealed": lambda *pair: log_evidence(*pair, num_samples=12, chunk_size=4, method="annealed"),
    "anneal": lambda *pair: anneal(*pair, num_chains=2, betas=3),
    "sandwich": lambda *pair: evidence_sandwich(*pair, num_chains=2, betas=3),
    "gap": lambda *pair: posterior_gap(*pair, num_samples=12, num_steps=2),
    "refine": lambda *pair: refine(*pair, num_steps=2),
}


@pytest.mark.parametrize("fails_at", [-1, 1, 2, 6, 9], ids=str)
@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_left_changed(verb, fails_at):
    guide = Drifting()
    guide.fails_at = fails_at
    numpy_state, python_state = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    run = VERBS[verb]
    if fails_at > 0:
        with pytest.raises(RuntimeError, match="stop here"):
            run(whole, guide, torch.tensor([0.5, -1.0]))
    else:
        run(whole, guide, torch.tensor([0.5, -1.0]))
    assert guide.average == 1.0
    assert guide.training
    assert guide.drop.training
    assert list(pyro.get_param_store().keys()) == []
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
    assert random.getstate() == python_state


def test_torchs_generator_goes_on():
    x = torch.tensor([0.5, -1.0])

    def wide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    first, second = (log_evidence(whole, wide, x, num_samples=20).value for _ in range(2))
    assert (first != second).all()


@pytest.mark.parametrize("verb", ["importance", "bayes", "annealed", "anneal", "sandwich", "gap"])
def test_point_guides_have_no_weights(verb):
    def point(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    with pytest.raises(ValueError, match=r"weighs draws .* point estimate of \['z'\]"):
        VERBS[verb](whole, point, torch.tensor([0.5, -1.0]))
