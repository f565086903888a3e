"""Calibration: the exact posterior passes, and each way of being wrong is named as what it is."""

import importlib

import arviz_plots
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value
from scipy.stats import kstest

from pyro_hvae.diagnostics.calibration import Calibration, calibrate
from pyro_hvae.diagnostics.uniformity import ecdf_bands, uniformity
from tests.linear_gaussian import linear_gaussian

N = 600


def two_layers(scale=1.0, shift=0.0, crossed=False):
    """z2 -> z1 -> x of standard deviations 1, with a guide that is the posterior up to what the arguments do."""

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            # z2 | x ~ N(x / 3, 2 / 3), z1 | z2, x ~ N((z2 + x) / 2, 1 / 2)
            z2 = pyro.sample("z2", dist.Normal(x / 3 + shift, scale * (2 / 3) ** 0.5))
            if crossed:  # each marginal as it should be, and drawn without looking at the other layer
                pyro.sample("z1", dist.Normal(2 * x / 3, (2 / 3) ** 0.5).expand([len(x)]))
            else:
                pyro.sample("z1", dist.Normal((z2 + x) / 2, scale * 0.5**0.5))

    return model, guide


def test_the_exact_posterior_passes():
    for depth in (1, 2):
        case = linear_gaussian(depth)
        found = calibrate(case.model, case.exact, torch.zeros(N, case.x.shape[1]))
        assert found.passed, str(found)
        assert "all ranks uniform" in str(found)
        assert {"log_joint", "log_q", "tarp", "z1"} <= set(found.ranks)
        assert found.ranks["z1"].shape[0] == N


@pytest.mark.parametrize(
    ("options", "words", "region"),
    [
        ({"scale": 0.7}, "draws too narrow", "regions too small"),
        ({"scale": 1.5}, "draws too wide", "regions too large"),
        ({"shift": 0.5}, "draws too high", None),
        ({"shift": -0.5}, "draws too low", None),
    ],
)
def test_what_is_wrong_is_named(options, words, region):
    found = calibrate(*two_layers(**options), torch.zeros(N))
    failures = found.failures()
    assert failures["z2"].startswith(words)
    if region is not None:
        assert failures["log_q"].startswith(region)
    assert failures["z2"].split(" (")[0] in str(found)


def test_layers_in_the_wrong_order_are_seen_jointly_only():
    joint = {"difference": lambda values, args: values["z1"] - values["z2"]}
    found = calibrate(*two_layers(crossed=True), torch.zeros(N), quantities=joint)
    assert not {"z1", "z2"} & set(found.failures())
    assert found.failures()["difference"].startswith("draws too wide")
    assert calibrate(*two_layers(), torch.zeros(N), quantities=joint).passed


def test_point_estimates_may_be_good_where_the_spread_is_not():
    narrow = calibrate(*two_layers(scale=0.5), torch.zeros(N)).point_bias()
    shifted = calibrate(*two_layers(shift=0.5), torch.zeros(N)).point_bias()
    assert narrow["z2"][0] > 0.005
    assert shifted["z2"][0] < 1e-6
    assert shifted["z2"][1] < -0.1
    assert set(narrow) == {"z1", "z2"}


def test_a_guide_that_is_fitted_to_each_simulation():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def fitted(y, scale=1.0):
        return lambda y: pyro.sample("mean", dist.Normal(y.sum() / 5, scale * 0.2**0.5))

    y = torch.zeros(4)
    assert calibrate(model, None, y, fit=fitted, num_simulations=150).passed
    wrong = calibrate(model, None, y, fit=lambda y: fitted(y, 0.5), num_simulations=150)
    assert wrong.failures()["mean"].startswith("draws too narrow")
    with pytest.raises(ValueError, match=r"only 1 simulation\(s\) to compare"):
        calibrate(model, fitted(y), y)


def test_discrete_draws_break_ties_at_random():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x):
        odds = torch.distributions.Normal(1.0, 0.7).log_prob(x) - torch.distributions.Normal(0.0, 0.7).log_prob(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=odds + torch.log(torch.tensor(3 / 7))))

    assert calibrate(model, guide, torch.zeros(N)).passed


def test_uniformity_has_its_level_and_power():
    rng = np.random.default_rng(1)
    p_values = [uniformity(rng.integers(0, 51, 200), 50).p_value for _ in range(400)]
    assert kstest(p_values, "uniform").pvalue > 0.001
    assert uniformity(rng.binomial(50, rng.beta(2, 2, 400)), 50).words(0.01) == "draws too wide"
    assert uniformity(rng.binomial(50, rng.beta(0.5, 0.5, 400)), 50).words(0.01) == "draws too narrow"
    assert uniformity(rng.binomial(50, rng.beta(2, 1, 400)), 50).words(0.01) == "draws too low"


def test_bands_hold_simultaneously():
    rng = np.random.default_rng(2)
    points, low, high = ecdf_bands(300, 40, 0.9)
    inside = 0
    for _ in range(500):
        ranks = rng.integers(0, 41, 300)
        ecdf = (ranks[:, None] <= points * 41 - 1 + 1e-9).mean(0)
        inside += bool(((low <= ecdf) & (ecdf <= high)).all())
    assert 0.85 < inside / 500 <= 0.96


def test_arviz_draws_the_ranks():
    tree = calibrate(*two_layers(), torch.zeros(100)).to_datatree()
    assert tree["prior_sbc"]["z1"].dims == ("chain", "draw")
    assert 0 < float(tree["prior_sbc"]["z1"].min()) < float(tree["prior_sbc"]["z1"].max()) < 1
    arviz_plots.plot_ecdf_pit(tree, var_names=["z1", "z2"], backend="none")


def test_arguments():
    model, guide = two_layers()
    with pytest.raises(ValueError, match="num_draws must be at least 9"):
        calibrate(model, guide, torch.zeros(100), num_draws=3)
    with pytest.raises(ValueError, match=r"quantity 'bad' must map values \(..., 100, \*event\) to \(..., 100\)"):
        calibrate(model, guide, torch.zeros(100), quantities={"bad": lambda values, args: values["z1"].sum()})
    with pytest.raises(ValueError, match="quantity 'z1' has the name of another quantity"):
        calibrate(model, guide, torch.zeros(100), quantities={"z1": lambda values, args: values["z1"] ** 2})
    with pytest.raises(ValueError, match="ranks must lie within 0 and 5"):
        Calibration({"z": np.array([7])}, 5).failures()


def test_auto_guides_with_coordinates_of_their_own():
    """Put at the posterior's mean of each simulation, with its width sqrt(1/5) or less than half of it."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def fitted(width):
        def fit(y):
            pyro.clear_param_store()  # where the parameters of the last guide of this name are
            guide = AutoNormal(model, init_loc_fn=init_to_value(values={"mean": y.sum() / 5}), init_scale=width)
            guide(y)
            return guide

        return fit

    good = calibrate(model, None, torch.zeros(4), fit=fitted(0.2**0.5), num_simulations=150)
    assert good.passed, str(good)
    assert set(good.ranks) == {"mean", "log_joint", "tarp"}
    wrong = calibrate(model, None, torch.zeros(4), fit=fitted(0.2), num_simulations=150)
    assert wrong.failures()["mean"].startswith("draws too narrow")


@pytest.mark.parametrize("num_draws", [9, 19])
def test_distances_do_not_reject_an_exact_guide_of_few_draws(num_draws):
    """Truth and draws are exchangeable, so that the rank is uniform where the truth counts in the scale as they do."""
    tests = [calibrate(*two_layers(), torch.zeros(3000), num_draws=num_draws).tests()["tarp"] for _ in range(3)]
    assert max(test.p_value for test in tests) > 0.05
    assert min(test.p_value for test in tests) > 1e-3
    wide = calibrate(*two_layers(scale=1.6), torch.zeros(3000), num_draws=num_draws).tests()["tarp"]
    assert wide.p_value < 1e-3


def test_a_site_that_the_guide_enumerates_is_drawn():
    prior, means = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(prior))
            z = pyro.sample("z", dist.Normal(means[y], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, scale=1.0):
        logits = prior.log() + dist.Normal(means, 2**0.5).log_prob(x[:, None])
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal((means[y] + x) / 2, scale * 0.5**0.5))

    found = calibrate(model, guide, torch.zeros(N))
    assert {"y", "z", "log_q"} <= set(found.ranks)
    assert found.passed, str(found)
    assert "z" in calibrate(model, lambda x: guide(x, 0.5), torch.zeros(N)).failures()


def test_ranks_do_not_depend_on_how_many_numbers_are_compared_at_once(monkeypatch):
    """Latents, densities and distances by hand, of draws that come in runs of a few."""
    model, guide = two_layers()
    module = importlib.import_module("pyro_hvae.diagnostics.layers")  # the package has a function of this name
    monkeypatch.setattr(module, "default_chunk", lambda entries: 7)
    torch.manual_seed(3)
    whole = calibrate(model, guide, torch.zeros(30), num_draws=25)
    monkeypatch.setattr("pyro_hvae.diagnostics.calibration._ENTRIES", 90)
    torch.manual_seed(3)
    parts = calibrate(model, guide, torch.zeros(30), num_draws=25)
    for name, ranks in whole.ranks.items():
        np.testing.assert_array_equal(parts.ranks[name], ranks, err_msg=name)
        assert ranks.min() >= 0
        assert ranks.max() <= 25
        assert abs(ranks.mean() - 12.5) < 4 * 25 / 12**0.5 / 30**0.5
