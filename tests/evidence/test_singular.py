"""Matrices that the model factorises, and that are not positive definite at the states of some chains."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hvae.evidence import anneal, evidence_sandwich
from pyro_hvae.evidence.singular import undefined_where_singular

X = torch.tensor([[1.5, 1.4], [2.0, 1.8]], dtype=torch.float64)
WARNING = "not positive definite, or singular, at the state of at least one chain"


def covariance(r):
    one = torch.ones_like(r)
    return torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2)


def correlated(x):
    """A correlation with a prior on the real line: beyond 1 there is no covariance."""
    with pyro.plate("data", len(x)):
        r = pyro.sample("r", dist.Normal(x.new_zeros(()), 0.4))
        pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), covariance_matrix=covariance(r)), obs=x)


def inside(x):
    with pyro.plate("data", len(x)):
        pyro.sample("r", dist.Normal(x.new_tensor(0.3), 0.15))


def exact_correlated(x):
    r = torch.linspace(-1, 1, 40_002)[1:-1]
    normal = dist.MultivariateNormal(torch.zeros(2), covariance_matrix=covariance(r)[:, None])
    log_f = dist.Normal(0.0, 0.4).log_prob(r)[:, None] + normal.log_prob(x)
    return log_f.logsumexp(0) + math.log(float(r[1] - r[0]))


def test_a_chain_whose_matrix_is_singular_hinders_no_other():
    """Half of the mass of the likelihood is near a correlation of 1: proposals go beyond."""
    with pytest.warns(UserWarning, match=WARNING):
        chains = anneal(correlated, inside, X, num_chains=400, betas=30, num_leapfrog=3)
    weights = chains.log_weights
    error = ((2 * weights.log_softmax(0)).logsumexp(0).exp() - 1 / 400).sqrt()
    assert ((weights.logsumexp(0) - math.log(400) - exact_correlated(X)).abs() < 4 * error).all()
    assert (chains.values["r"].abs() < 1).all()
    with pytest.warns(UserWarning, match=WARNING):
        bracket = evidence_sandwich(correlated, inside, X, num_chains=64, betas=60)
    assert (bracket.lower < exact_correlated(X) + 0.02).all()
    assert (bracket.width < 0.3).all()


def test_draws_of_a_base_beyond_the_covariances_are_refused():
    """The first look at the programs takes one draw, which is inside; the next takes several, which are not."""

    def wide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("r", dist.Normal(x.new_zeros(()), 0.1))

    def model(x):
        with pyro.plate("data", len(x)):
            r = pyro.sample("r", dist.Normal(x.new_zeros(()), 0.4))
            beyond = r + (1.5 if r.dim() > 1 else 0.0)
            pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), covariance_matrix=covariance(beyond)), obs=x)

    with pytest.raises(ValueError, match=r"singular or not positive definite at one of .* Cholesky factors"):
        anneal(model, wide, X)


@pytest.mark.parametrize("factorise", [torch.linalg.cholesky, torch.linalg.inv, torch.inverse])
def test_factorisations_are_undefined_where_they_fail_alone(factorise):
    matrices = torch.stack([torch.eye(2), torch.zeros(2, 2), 4 * torch.eye(2)])
    with pytest.warns(UserWarning, match=WARNING):
        result = undefined_where_singular(lambda: factorise(matrices))
    assert result[1].isnan().all()
    torch.testing.assert_close(result[[0, 2]], factorise(matrices[[0, 2]]))


def test_solutions_are_undefined_where_the_matrix_is_singular():
    matrices = torch.stack([torch.eye(2), torch.zeros(2, 2)]).requires_grad_()
    right = torch.ones(2, 2)
    with pytest.warns(UserWarning, match=WARNING):
        vectors = undefined_where_singular(lambda: torch.linalg.solve(matrices, right))
    with pytest.warns(UserWarning, match=WARNING):
        many = undefined_where_singular(lambda: torch.linalg.solve(matrices, right[..., None]))
    assert vectors[1].isnan().all()
    torch.testing.assert_close(vectors[0], torch.ones(2))
    torch.testing.assert_close(many[0], torch.ones(2, 1))
    (slope,) = torch.autograd.grad(vectors[0].sum(), matrices)
    torch.testing.assert_close(slope[0], -torch.ones(2, 2))


def test_other_errors_are_not_touched():
    with pytest.raises(RuntimeError, match="shape"):
        undefined_where_singular(lambda: torch.zeros(2).view(3).reshape(7))
