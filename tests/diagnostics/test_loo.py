"""Cross-validation from draws of a guide: closed forms, ArviZ's own numbers, and what is refused."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS

from pyro_hvae.diagnostics import compare, held_out, loo, resample, smoothed_weights, to_datatree
from tests.diagnostics.schools import SCHOOLS, eight_schools
from tests.linear_gaussian import Oracle, linear_gaussian


def line(x, prior=1.0):
    z = pyro.sample("z", dist.Normal(0.0, prior))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def off(x, prior=1.0):
    """Neither the mean nor the width of the posterior."""
    pyro.sample("z", dist.Normal(x.sum() / (1 + len(x)) + 0.1, 1.5 * (1 + len(x)) ** -0.5))


def left_out(x):
    """log N(x_i; mean of the posterior without x_i, its variance + 1), for the unit prior."""
    rest = (x.sum() - x) / len(x)
    return dist.Normal(rest, (1 + 1 / len(x)) ** 0.5).log_prob(x)


def test_loo_of_a_guide_is_the_posteriors():
    x = torch.randn(12)
    tree = to_datatree(line, off, x, num_draws=20_000, groups=["log_likelihood", "sample_stats"])
    found = loo(tree)
    np.testing.assert_allclose(found.elpd_i, left_out(x), atol=0.02)
    assert found.elpd_i.dims == ("data",)
    assert found.approx_posterior
    assert float(found.pareto_k.max()) < 0.5
    total = np.exp(found.log_weights).sum(("chain", "draw"))
    np.testing.assert_allclose(total, np.ones(12))


@pytest.mark.parametrize("centred", [True, False])
def test_it_is_arvizs_approximate_loo_and_not_its_plain_one(centred):
    """Plain loo sees nothing amiss in the centred guide, whose draws can't be corrected."""
    import arviz_stats

    tree = to_datatree(*eight_schools(centred), SCHOOLS, num_draws=4000)
    ours = loo(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = arviz_stats.loo(tree, pointwise=True)
        stats = tree["sample_stats"]
        theirs = arviz_stats.loo_approximate_posterior(tree, stats["lp"], stats["log_q"], pointwise=True)
    np.testing.assert_allclose(ours.elpd_i, theirs.elpd_i)
    np.testing.assert_allclose(ours.pareto_k, theirs.pareto_k)
    np.testing.assert_allclose([ours.elpd, ours.se, ours.p], [theirs.elpd, theirs.se, theirs.p])
    assert ours.warning == theirs.warning == bool((ours.pareto_k > ours.good_k).any())
    assert str(ours) == str(theirs)
    if centred:
        assert float(plain.pareto_k.max()) < 0.5
        assert float(ours.pareto_k.max()) > 0.7


def test_reweighted_and_resampled_draws_have_the_posteriors_moments():
    x = torch.randn(12)
    mean, variance = float(x.sum() / 13), 1 / 13
    tree = to_datatree(line, off, x, num_draws=20_000)
    found = smoothed_weights(tree)
    assert found["weight"].dims == ("chain", "draw")
    assert float(found["khat"]) < 0.5
    z = tree["posterior"]["z"]
    error = (variance / float(found["ess"])) ** 0.5
    assert abs(float(z.mean()) - mean) > 20 * error  # the draws as they are show the guide
    assert abs(float((found["weight"] * z).sum()) - mean) < 4 * error
    again = resample(tree, 10_000, seed=1)
    z = again["posterior"]["z"]
    assert z.shape == (1, 10_000)
    assert abs(float(z.mean()) - mean) < 4 * error
    assert abs(float(z.var()) - variance) < 6 * variance * (2 / float(found["ess"])) ** 0.5
    # whole draws are taken: predictions and densities go with their latents
    expected = dist.Normal(torch.as_tensor(z.values)[..., None], 1.0).log_prob(x)
    np.testing.assert_allclose(again["log_likelihood"]["x"], expected)
    assert "log_weight" not in again["sample_stats"]
    np.testing.assert_allclose(loo(again).elpd_i, left_out(x), atol=0.05)
    xr.testing.assert_identical(again["prior"].to_dataset(), tree["prior"].to_dataset())
    xr.testing.assert_identical(again["observed_data"].to_dataset(), tree["observed_data"].to_dataset())
    with pytest.raises(ValueError, match="its draws: resampled"):
        smoothed_weights(again)


def test_each_datum_is_resampled_by_its_own_weights():
    """The guide draws z_2 below z_1 and too wide; given x the posterior is known."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x / 3 + 0.2)[:, None].expand(-1, 2), 1.1).to_event(1))

    x = torch.tensor([-2.0, 0.0, 5.0])
    tree = to_datatree(model, guide, x, num_draws=20_000)
    weights = smoothed_weights(tree)
    assert weights["weight"].dims == ("chain", "draw", "data")
    assert weights["khat"].shape == (3,)
    again = resample(tree)
    z = torch.as_tensor(again["posterior"]["z"].values[0])
    assert z.shape == (20_000, 3, 2)
    least = float(weights["ess"].min())
    torch.testing.assert_close(z.mean(0), (x / 3)[:, None].expand(-1, 2), atol=5 * (2 / 3 / least) ** 0.5, rtol=0)
    for datum in range(3):
        torch.testing.assert_close(z[:, datum].T.cov(), torch.tensor([[2.0, -1], [-1, 2]]) / 3, atol=0.05, rtol=0)
    expected = dist.Normal(z.sum(-1), 1.0).log_prob(x)
    np.testing.assert_allclose(again["log_likelihood"]["x"].values[0], expected)
    assert set(again["sample_stats"].data_vars) == {"log_q_z"}


def test_two_guides_share_their_weights():
    x = torch.randn(12)

    def other(x, prior=1.0):
        pyro.sample("z", dist.Normal(x.sum() / 13 - 0.2, 2 * 13**-0.5))

    tree = to_datatree(line, [off, other], x, num_draws=10_000)
    weights = smoothed_weights(tree)["weight"]
    assert float(weights.sum()) == pytest.approx(1.0)
    assert abs(float((weights * tree["posterior"]["z"]).sum()) - float(x.sum() / 13)) < 0.02
    np.testing.assert_allclose(loo(tree).elpd_i, left_out(x), atol=0.03)


def test_compare_ranks_by_what_is_left_out():
    x = torch.randn(30) + 3

    def tight(x):
        pyro.sample("z", dist.Normal(x.sum() / (1 / 0.01 + len(x)), (1 / 0.01 + len(x)) ** -0.5))

    def tight_model(x):
        return line(x, 0.1)

    trees = {
        "unit": to_datatree(line, off, x, num_draws=2000),
        "tight": to_datatree(tight_model, tight, x, num_draws=2000),
    }
    table = compare(trees)
    assert list(table.index) == ["unit", "tight"]
    gap = left_out(x).sum() - torch.as_tensor(loo(trees["tight"]).elpd)
    assert abs(table.loc["tight", "elpd_diff"]) == pytest.approx(float(gap), abs=0.5)  # its sign is another in arviz 1
    assert compare({name: loo(tree) for name, tree in trees.items()}).equals(table)
    with pytest.raises(ValueError, match="two models or more, got \\['unit'\\]"):
        compare({"unit": trees["unit"]})


def test_held_out_data_of_an_amortised_model():
    case = linear_gaussian(2, size=30)
    evidence = Oracle(case.model).log_evidence(case.x).detach()
    exact = held_out(case.model, case.exact, case.x, num_draws=20)
    np.testing.assert_allclose(exact.elpd_i, evidence)
    assert (exact.pareto_k == -np.inf).all()
    assert not exact.warning
    rough = held_out(case.model, case.other, case.x, num_draws=500)
    assert rough.pareto_k.shape == (30,)
    assert rough.warning == bool((rough.pareto_k > rough.good_k).any())
    assert rough.elpd < exact.elpd + 0.1
    assert list(compare({"rough": rough, "exact": exact}).index) == ["exact", "rough"]
    with pytest.raises(ValueError, match="shared by all data"):
        held_out(line, off, torch.randn(3))


def test_draws_of_a_sampler_are_taken_as_they_are():
    x = torch.randn(12)
    sampler = MCMC(NUTS(line), num_samples=300, warmup_steps=100, disable_progbar=True)
    sampler.run(x)
    found = loo(to_datatree(line, sampler, x))
    np.testing.assert_allclose(found.elpd_i, left_out(x), atol=0.1)


def two(x, y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def whole(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, len(x)), 1.0).to_event(1), obs=x)


def batch(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 100, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def point(x):
    pyro.sample("z", dist.Delta(torch.tensor(0.3)))


def local():
    case = linear_gaussian(1, size=3)
    return case.model, case.exact, (case.x,)


@pytest.mark.parametrize(
    ("make", "groups", "message"),
    [
        (lambda: (two, lambda x, y: off(x), (torch.randn(4), torch.randn(4))), None, "none of .*: \\['x', 'y'\\]"),
        (lambda: (whole, off, (torch.randn(4),)), None, "no dim but the draws"),
        (lambda: (batch, off, (torch.randn(4),)), None, "minibatch that stands for 25 times as many data"),
        (lambda: (line, point, (torch.randn(4),)), None, "the guide is a point"),
        (local, None, "every latent is local to a datum.*Use held_out"),
        (lambda: (line, off, (torch.randn(4),)), ["log_likelihood"], "no sample_stats/log_q"),
        (
            lambda: (line, off, (torch.randn(4),)),
            ["sample_stats"],
            "none of the observed sites in log_likelihood: \\[\\]",
        ),
    ],
)
def test_what_has_no_loo(make, groups, message):
    model, guide, args = make()
    tree = to_datatree(model, guide, *args, num_draws=50, groups=groups)
    with pytest.raises(ValueError, match=message):
        loo(tree)


def test_what_has_no_weights():
    tree = to_datatree(batch, off, torch.randn(4), num_draws=50)
    with pytest.raises(ValueError, match="minibatch that stands for 25 times"):
        resample(tree)
    tree = to_datatree(line, off, torch.randn(4), num_draws=50)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        resample(tree, 0)
