"""Predictive checks against closed forms of a Gaussian."""

import arviz_plots
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import kstest, norm

from pyro_hvae.diagnostics import pit, predictive_check, to_datatree

N = 400


def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def guide(x):
    pyro.sample("mean", dist.Normal(x.mean(), N**-0.5))


def tree_of(x, draws=2000):
    return to_datatree(model, guide, x, num_draws=draws)


def test_quantities_against_their_distribution():
    """T = mean: replicates N(xbar, 2/N), so p = 1/2; T = sd: replicates 1 within sqrt(1/2N)."""
    x = torch.randn(N)
    found = predictive_check(tree_of(x))
    assert abs(found.loc["mean", "p_value"] - 0.5) < 0.05
    exact = 1 - norm.cdf((float(x.std()) - 1) * (2 * N) ** 0.5)
    assert abs(found.loc["sd", "p_value"] - exact) < 0.08
    assert abs((found.loc["mean", "95%"] - found.loc["mean", "5%"]) / (2 * 1.645 * (2 / N) ** 0.5) - 1) < 0.1
    assert found.loc["zeros", "p_value"] == 0.5


def test_what_the_model_can_not_make_is_seen():
    heavy = torch.distributions.StudentT(2.0).sample((N,))
    found = predictive_check(tree_of(heavy), quantities={"largest": lambda values: np.abs(values).max(-1)})
    assert found.loc["largest", "p_value"] < 0.01


def test_transform_is_uniform_where_the_spread_is_right():
    right, wrong = (pit(tree_of(scale * torch.randn(N)))["pit"]["x"].values.ravel() for scale in (1.0, 0.5))
    assert kstest(right, "uniform").pvalue > 0.01
    assert kstest(wrong, "uniform").pvalue < 1e-6
    assert wrong.std() < 0.2


def test_discrete_ties():
    def rates(x):
        return pyro.sample("rate", dist.Normal(2.0, 1e-6))

    def counts(x):
        rate = rates(x)
        with pyro.plate("data", N):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    tree = to_datatree(counts, rates, torch.poisson(torch.full((N,), 2.0)), num_draws=500)
    assert kstest(pit(tree)["pit"]["x"].values.ravel(), "uniform").pvalue > 0.01


def test_arviz_draws_it_and_mistakes_are_named():
    tree = tree_of(torch.randn(N), draws=20)
    arviz_plots.plot_ecdf_pit(pit(tree), group="pit", backend="none")
    with pytest.raises(ValueError, match=r"quantity 'bad' must map \(..., 400\)"):
        predictive_check(tree, quantities={"bad": lambda values: values})
    with pytest.raises(ValueError, match="no observed site 'y'"):
        predictive_check(tree, var_name="y")
    with pytest.raises(ValueError, match="has no group 'posterior_predictive'"):
        pit(to_datatree(model, guide, torch.randn(N), num_draws=2, groups=["posterior", "observed_data"]))
