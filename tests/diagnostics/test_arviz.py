"""ArviZ's own functions take our trees: all those that mean something on independent draws, and the others as told.

``pyro_hvae.diagnostics.loo`` has the table of what works and what can't; each row of it is called here.
"""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from pyro_hvae.diagnostics import compare, loo, resample, to_datatree

azs = pytest.importorskip("arviz_stats")
azp = pytest.importorskip("arviz_plots")

LATENT = ["intercept", "slope", "noise"]


def regression(dose, y):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    with pyro.plate("subject", len(y)):
        mean = pyro.deterministic("mean", intercept + slope * dose)
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


def fitted(dose, y):
    """Least squares with its errors, somewhat wide."""
    design = torch.stack([torch.ones_like(dose), dose], -1)
    found = torch.linalg.lstsq(design, y).solution
    spread = (y - design @ found).std()
    errors = 1.3 * spread * torch.linalg.inv(design.T @ design).diagonal().sqrt()
    pyro.sample("intercept", dist.Normal(found[0], errors[0]))
    pyro.sample("slope", dist.Normal(found[1], errors[1]))
    pyro.sample("noise", dist.LogNormal(spread.log(), 0.25))


def counts(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("datum", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def of_counts(x):
    pyro.sample("rate", dist.Gamma(2 + x.sum(), 1.0 + len(x)))


def coins(x):
    chance = pyro.sample("chance", dist.Beta(2.0, 1.0))
    with pyro.plate("datum", len(x)):
        pyro.sample("x", dist.Bernoulli(chance), obs=x)


def of_coins(x):
    pyro.sample("chance", dist.Beta(2 + x.sum(), 1.0 + len(x) - x.sum()))


class Trees:
    """Made once; tests only read them."""

    def __init__(self):
        torch.set_default_dtype(torch.float64)
        pyro.set_rng_seed(0)
        dose = torch.linspace(-1.0, 1.0, 20)
        y = 1 + 2 * dose + 0.5 * torch.randn(20)
        self.one = to_datatree(regression, fitted, dose, y, num_draws=400)
        self.several = to_datatree(regression, [fitted, fitted], dose, y, num_draws=200)
        self.counts = to_datatree(counts, of_counts, torch.poisson(torch.full((20,), 3.0)), num_draws=200)
        self.coins = to_datatree(coins, of_coins, torch.bernoulli(torch.full((20,), 0.5)), num_draws=200)
        self.posterior = resample(self.one)
        self.loo = loo(self.one)
        self.weights = {"log_weights": self.loo.log_weights, "pareto_k": self.loo.pareto_k}
        self.sets = {name: xr.Dataset({"y": value}) for name, value in self.weights.items()}
        stats = self.one["sample_stats"]
        self.densities = {"log_p": stats["lp"], "log_q": stats["log_q"]}


@pytest.fixture(scope="module")
def trees():
    dtype = torch.get_default_dtype()
    yield Trees()
    torch.set_default_dtype(dtype)


STATISTICS = {
    "summary": lambda t: azs.summary(t.one, kind="stats"),
    "loo_approximate_posterior": lambda t: azs.loo_approximate_posterior(t.one, **t.densities),
    "loo_subsample": lambda t: azs.loo_subsample(t.one, observations=10, **t.densities),
    "loo_i": lambda t: azs.loo_i(0, t.posterior),
    "compare": lambda t: azs.compare({"one": t.loo, "several": loo(t.several)}),
    "loo_pit": lambda t: azs.loo_pit(t.one, **t.sets),
    "loo_expectations": lambda t: azs.loo_expectations(t.one, **t.weights),
    "loo_score": lambda t: azs.loo_score(t.one, **t.weights),
    "loo_metrics": lambda t: azs.loo_metrics(t.posterior),
    "loo_r2": lambda t: azs.loo_r2(t.posterior, var_name="y"),
    "psense": lambda t: azs.psense(t.one, var_names=LATENT),
    "psense_summary": lambda t: azs.psense_summary(t.one, var_names=LATENT),
    "metrics": lambda t: azs.metrics(t.one),
    "bayes_factor": lambda t: azs.bayes_factor(t.one, var_names=["intercept"], ref_vals=1),
    "bayesian_r2": lambda t: azs.bayesian_r2(t.one, pred_mean="mean", scale="noise"),
    "residual_r2": lambda t: azs.residual_r2(t.one, pred_mean="mean", obs_name="y"),
    "kl_divergence": lambda t: azs.kl_divergence(t.one, t.posterior, var_names=LATENT, num_samples=200),
    "hdi": lambda t: azs.hdi(t.one),
    "eti": lambda t: azs.eti(t.one),
    "mode": lambda t: azs.mode(t.one),
    "kde": lambda t: azs.kde(t.one, var_names=LATENT),
    "histogram": lambda t: azs.histogram(t.one, var_names=LATENT),
    "ecdf": lambda t: azs.ecdf(t.one["posterior"].to_dataset(), dim=["chain", "draw"]),
    "qds": lambda t: azs.qds(t.one, var_names=LATENT),
    "rhat": lambda t: azs.rhat(t.several),
    "rhat_nested": lambda t: azs.rhat_nested(t.several, superchain_ids=[0, 1]),
    "ess": lambda t: azs.ess(t.one),
    "mcse": lambda t: azs.mcse(t.one),
    "thin": lambda t: azs.thin(t.one),
}

PLOTS = {
    "plot_dist": lambda t: azp.plot_dist(t.one, var_names=LATENT),
    "plot_forest": lambda t: azp.plot_forest(t.several, var_names=LATENT),
    "plot_ridge": lambda t: azp.plot_ridge(t.one, var_names=LATENT),
    "plot_pair": lambda t: azp.plot_pair(t.one, var_names=LATENT),
    "plot_pair_focus": lambda t: azp.plot_pair_focus(t.one, "noise", var_names=LATENT[:2]),
    "plot_parallel": lambda t: azp.plot_parallel(t.one, var_names=LATENT),
    "plot_prior_posterior": lambda t: azp.plot_prior_posterior(t.one, var_names=LATENT),
    "plot_bf": lambda t: azp.plot_bf(t.one, var_names="intercept", ref_val=1),
    "plot_lm": lambda t: azp.plot_lm(t.one, x="dose", y="y"),
    "plot_ppc_dist": lambda t: azp.plot_ppc_dist(t.one),
    "plot_ppc_dist of the prior": lambda t: azp.plot_ppc_dist(t.one, group="prior_predictive"),
    "plot_ppc_pit": lambda t: azp.plot_ppc_pit(t.one),
    "plot_ppc_tstat": lambda t: azp.plot_ppc_tstat(t.one),
    "plot_ppc_interval": lambda t: azp.plot_ppc_interval(t.one),
    "plot_ppc_rootogram": lambda t: azp.plot_ppc_rootogram(t.counts),
    "plot_ppc_pava": lambda t: azp.plot_ppc_pava(t.coins),
    "plot_loo_pit": lambda t: azp.plot_loo_pit(t.posterior),
    "plot_ecdf_pit": lambda t: azp.plot_ecdf_pit(
        xr.DataTree.from_dict({"pit": azs.loo_pit(t.one, **t.sets)}), group="pit", sample_dims=["subject"]
    ),
    "plot_khat": lambda t: azp.plot_khat(t.loo),
    "plot_compare": lambda t: azp.plot_compare(compare({"one": t.one, "several": t.several})),
    "plot_psense_dist": lambda t: azp.plot_psense_dist(t.one, var_names=LATENT[:1]),
    "plot_psense_quantities": lambda t: azp.plot_psense_quantities(t.one, var_names=LATENT[:1]),
    "plot_rank": lambda t: azp.plot_rank(t.several, var_names=LATENT[:1]),
    "plot_trace": lambda t: azp.plot_trace(t.one, var_names=LATENT[:1]),
    "plot_autocorr": lambda t: azp.plot_autocorr(t.one, var_names=LATENT[:1]),
    "plot_ess": lambda t: azp.plot_ess(t.one, var_names=LATENT[:1]),
    "plot_mcse": lambda t: azp.plot_mcse(t.one, var_names=LATENT[:1]),
}

REFUSED = {
    "bfmi": (lambda t: azs.bfmi(t.one), KeyError),
    "plot_energy": (lambda t: azp.plot_energy(t.one), (AttributeError, KeyError, ValueError)),
}


def quietly(function, trees):
    """ArviZ warns of large k-hats, and pandas and xarray warn of ArviZ: none of it is the tree's."""
    with warnings.catch_warnings():
        for message in ("Estimated shape parameter", "The inplace keyword", "The return type of"):
            warnings.filterwarnings("ignore", message=message)
        return function(trees)


def numbers(result):
    """Every number of a result, whatever it is made of."""
    if isinstance(result, xr.DataTree):
        return np.concatenate([numbers(node.to_dataset()) for node in result.subtree if node.data_vars])
    if isinstance(result, xr.Dataset):
        return np.concatenate([np.ravel(values.values) for values in result.data_vars.values()])
    if hasattr(result, "elpd"):
        return np.array([result.elpd, result.se])
    if hasattr(result, "select_dtypes"):
        return result.select_dtypes("number").to_numpy(dtype=float, na_value=np.nan).ravel()
    if isinstance(result, dict):
        return np.concatenate([numbers(value) for value in result.values()])
    if isinstance(result, (tuple, list)):
        return np.concatenate([numbers(value) for value in result if not isinstance(value, str)])
    return np.ravel(np.asarray(result, dtype=float))


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name, trees):
    found = numbers(quietly(STATISTICS[name], trees))
    assert found.size
    if name not in ("qds",):
        assert np.isfinite(found).mean() > 0.8


@pytest.mark.parametrize("name", PLOTS)
def test_plots(name, trees):
    import matplotlib.pyplot as plt

    try:
        quietly(PLOTS[name], trees)
        assert plt.get_fignums()
        figure = plt.gcf()
        assert any(axis.has_data() for axis in figure.axes)
    finally:
        plt.close("all")


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_work(name, trees):
    import matplotlib.pyplot as plt

    function, error = REFUSED[name]
    with pytest.raises(error):
        quietly(function, trees)
    plt.close("all")


def test_the_numbers_are_those_of_the_draws(trees):
    slope = trees.one["posterior"]["slope"].values
    summary = azs.summary(trees.one, kind="stats", var_names=["slope"], round_to="none")
    assert float(summary.loc["slope", "mean"]) == pytest.approx(slope.mean())
    pit = quietly(STATISTICS["loo_pit"], trees)["y"]
    assert pit.dims == ("subject",)
    assert ((pit >= 0) & (pit <= 1)).all()
    assert 0.25 < float(pit.mean()) < 0.75
    sensitive = quietly(STATISTICS["psense_summary"], trees)
    assert (sensitive["likelihood"] > sensitive["prior"]).all()


def test_counts_are_integers(trees):
    for tree, kind in ((trees.counts, np.int32), (trees.coins, np.int8)):
        for group in ("observed_data", "posterior_predictive", "prior_predictive"):
            assert tree[group]["x"].dtype == kind
