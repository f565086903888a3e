"""The tree holds what the programs drew, in ArviZ's shapes, with densities that add up."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.diagnostics import GROUPS, to_datatree, to_inferencedata
from pyro_hvae.kernels import Gaussian, StandardNormal, WithoutContext
from pyro_hvae.nn import MLP
from tests.linear_gaussian import linear_gaussian
from tests.programs import PAIRS, build


def model(x, size=None):
    g = pyro.sample("g", dist.Normal(x.new_zeros(2), 1.0).to_event(1), infer={"event_dims": ["feature"]})
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(g.sum(-1), 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)


def guide(x, size=None):
    pyro.sample("g", dist.Normal(x.new_ones(2), 0.5).to_event(1))
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(x.mean(-1), 0.7))


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_shapes_names_and_sums(chunk_size):
    x = torch.randn(5, 3)
    tree = to_datatree(model, guide, x, num_draws=6, chunk_size=chunk_size)
    assert set(tree.children) == set(GROUPS) - {"constant_data"}
    posterior = tree["posterior"]
    assert posterior["g"].dims == ("chain", "draw", "feature")
    assert posterior["z"].dims == ("chain", "draw", "data")
    assert posterior["z"].shape == (1, 6, 5)
    likelihood = tree["log_likelihood"]["x"]
    assert likelihood.dims == ("chain", "draw", "data")
    z = torch.as_tensor(posterior["z"].values)
    expected = dist.Normal(z[..., None], 1.0).log_prob(x).sum(-1)
    np.testing.assert_allclose(likelihood.values, expected.numpy())
    g = torch.as_tensor(posterior["g"].values)
    prior_g, prior_z = dist.Normal(0.0, 1.0).log_prob(g).sum(-1), dist.Normal(g.sum(-1, keepdim=True), 1.0).log_prob(z)
    np.testing.assert_allclose(tree["log_prior"]["g"].values, prior_g.numpy())
    np.testing.assert_allclose(tree["log_prior"]["z"].values, prior_z.numpy())
    q_g, q_z = dist.Normal(1.0, 0.5).log_prob(g).sum(-1), dist.Normal(x.mean(-1), 0.7).log_prob(z)
    stats = tree["sample_stats"]
    np.testing.assert_allclose(stats["log_q_g"].values, q_g.numpy())
    np.testing.assert_allclose(stats["log_q_z"].values, q_z.numpy())
    np.testing.assert_allclose(stats["lp"].values, (prior_g + prior_z.sum(-1) + expected.sum(-1)).numpy())
    np.testing.assert_allclose(stats["log_q"].values, (q_g + q_z.sum(-1)).numpy())
    np.testing.assert_allclose(stats["log_weight"].values, (stats["lp"] - stats["log_q"]).values)
    assert tree["posterior_predictive"]["x"].shape == tree["prior_predictive"]["x"].shape == (1, 6, 5, 3)
    assert tree["prior"]["z"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.numpy())


def test_likelihood_is_unscaled_under_a_minibatch():
    x = torch.randn(5, 3)
    tree = to_datatree(model, guide, x, size=50, num_draws=2)
    z = torch.as_tensor(tree["posterior"]["z"].values)
    expected = dist.Normal(z[..., None], 1.0).log_prob(x).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values, expected.numpy())
    assert tree.attrs["plate_scale"] == 10.0


def test_a_plate_that_shows_some_of_its_indices_is_labelled_by_them():
    def some(x):
        with pyro.plate("data", 9, subsample=torch.tensor([7, 2])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def nearly(x):
        with pyro.plate("data", 9, subsample=torch.tensor([7, 2])):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    tree = to_datatree(some, nearly, torch.zeros(2), num_draws=2)
    assert tree["posterior"]["data"].values.tolist() == [7, 2]


def test_local_weights_keep_their_data_dim_and_an_exact_guide_has_the_evidence_in_each():
    case = linear_gaussian(2, size=4)
    tree = to_datatree(case.model, case.exact, case.x, num_draws=7)
    weights = tree["sample_stats"]["log_weight"]
    assert weights.dims == ("chain", "draw", "data")
    np.testing.assert_allclose(weights.values, np.broadcast_to(weights.values[:, :1], weights.shape), atol=1e-9)
    layers = sum(tree["log_prior"][z] - tree["sample_stats"][f"log_q_{z}"] for z in ("z1", "z2"))
    np.testing.assert_allclose(weights.values, (layers + tree["log_likelihood"]["x"]).values)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_every_pair_has_a_tree_whose_densities_are_the_programs_own(name):
    case = build(name)
    tree = to_datatree(case.model, case.guide, *case.args, num_draws=3, **case.kwargs)
    stats = tree["sample_stats"]
    assert stats["lp"].shape == (1, 3)
    whole = stats["log_weight"].sum([dim for dim in stats["log_weight"].dims if dim not in ("chain", "draw")])
    if tree.attrs["plate_scale"] == 1.0:
        np.testing.assert_allclose(whole.values, (stats["lp"] - stats["log_q"]).values, rtol=1e-9)
    for name, values in tree["posterior"].data_vars.items():
        assert np.isfinite(values).all(), name
        assert values.dims[:2] == ("chain", "draw")
    if "prior" in tree.children:
        for name, values in tree["prior"].data_vars.items():
            assert name not in tree["posterior"] or values.dims == tree["posterior"][name].dims


def regression(covariate, y):
    """With a positive scale, a simplex, deterministic sites in and out of the plate, and a factor."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    pyro.deterministic("doubled", 2 * slope)
    pyro.deterministic("pair", torch.stack([slope, scale], -1))
    pyro.factor("penalty", -(slope**2))
    with pyro.plate("subject", len(y)):
        mean = pyro.deterministic("mean", slope * covariate[:, 0] + shares[..., 0])
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta])
def test_auto_guides_deterministic_sites_factors_and_covariates(auto):
    covariate, y = torch.randn(6, 2), torch.randn(6)
    guide = auto(regression)
    tree = to_datatree(regression, guide, covariate, y, num_draws=4)
    posterior, stats = tree["posterior"], tree["sample_stats"]
    np.testing.assert_allclose(posterior["doubled"], 2 * posterior["slope"])
    np.testing.assert_allclose(posterior["pair"], np.stack([posterior["slope"], posterior["scale"]], -1))
    assert posterior["mean"].dims == ("chain", "draw", "subject")
    np.testing.assert_allclose(
        posterior["mean"],
        posterior["slope"].values[..., None] * covariate[:, 0].numpy() + posterior["shares"].values[..., :1],
    )
    np.testing.assert_allclose(tree["unconstrained_posterior"]["scale"], np.log(posterior["scale"]))
    assert tree["unconstrained_posterior"]["shares"].dims == ("chain", "draw", "shares_unconstrained_dim_0")
    assert tree["unconstrained_posterior"]["shares"].shape == (1, 4, 2)
    np.testing.assert_allclose(stats["log_factor_penalty"], -(posterior["slope"] ** 2))
    assert set(tree["log_likelihood"].data_vars) == {"y"}
    assert set(tree["log_prior"].data_vars) == {"slope", "scale", "shares"}
    assert tree["constant_data"]["covariate"].dims == ("subject", "covariate_dim_1")
    assert set(tree["constant_data"].data_vars) == {"covariate"}
    lp = sum(tree["log_prior"].data_vars.values()) + tree["log_likelihood"]["y"].sum("subject")
    np.testing.assert_allclose(stats["lp"], lp + stats["log_factor_penalty"])
    if auto is AutoNormal:
        np.testing.assert_allclose(stats["log_q"], stats["log_q_slope"] + stats["log_q_scale"] + stats["log_q_shares"])
        loc, sd = guide.locs.scale.detach(), guide.scales.scale.detach()
        expected = dist.LogNormal(loc, sd).log_prob(torch.as_tensor(posterior["scale"].values))
        np.testing.assert_allclose(stats["log_q_scale"], expected)


def test_correlations_context_and_masks():
    def correlated(x):
        factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=x)

    guide, x = AutoNormal(correlated), torch.randn(4, 3)
    tree = to_datatree(correlated, guide, x, num_draws=5)
    assert tree["posterior"]["factor"].shape == (1, 5, 3, 3)
    assert tree["unconstrained_posterior"]["factor"].shape == (1, 5, 3)

    model = TopDown(z=WithoutContext(StandardNormal(1)), x=Gaussian(MLP(2, 4)))
    context, mask = torch.randn(4, 1), torch.tensor([[True, False], [True, True], [False, False], [True, True]])
    tree = to_datatree(model, BottomUp(z=Gaussian(MLP(3, 2))), x[:, :2], context=context, mask=mask, num_draws=5)
    assert set(tree["constant_data"].data_vars) == {"context", "mask"}
    assert tree["constant_data"]["context"].dims == ("data", "context_dim_1")
    assert (tree["log_likelihood"]["x"].sel(data=2) == 0).all()
    assert (tree["log_likelihood"]["x"].sel(data=0) != 0).all()


def test_summed_out_sites_are_marginal_in_the_likelihood_and_drawn_in_predictions():
    def mixture(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(torch.where(k == 0, loc[..., 0], loc[..., 1]), 1.0), obs=x)

    def mode(x):
        pyro.sample("loc", dist.Normal(torch.tensor([-50.0, 50.0]), 1e-3).to_event(1))

    x = torch.tensor([-50.0, 50.0, 49.0])
    tree = to_datatree(mixture, mode, x, num_draws=400)
    assert set(tree["posterior"].data_vars) == {"loc", "k"}
    assert (tree["posterior"]["k"].values == [0, 1, 1]).all()
    assert set(tree["prior"].data_vars) == {"loc", "k"}
    loc = torch.as_tensor(tree["posterior"]["loc"].values)
    each = dist.Normal(loc[..., None, :], 1.0).log_prob(x[:, None]) + torch.tensor([0.2, 0.8]).log()
    np.testing.assert_allclose(tree["log_likelihood"]["x"], each.logsumexp(-1))
    replicates = tree["posterior_predictive"]["x"].values[0]
    assert ((replicates > 0) == [False, True, True]).all()  # of the states that the data have, not of the prior's
    np.testing.assert_allclose(abs(replicates).mean(0), 50, atol=4 / 400**0.5)
    share = float((tree["prior"]["k"] == 1).mean())
    assert abs(share - 0.8) < 4 * (0.16 / 1200) ** 0.5


def test_predictions_of_several_observed_sites_depend_on_each_other():
    def pair(a, b):
        with pyro.plate("data", len(a)):
            first = pyro.sample("a", dist.Normal(0.0, 10.0), obs=a)
            pyro.sample("b", dist.Normal(first, 0.01), obs=b)

    def nothing(a, b):
        return None

    tree = to_datatree(pair, nothing, torch.zeros(3), torch.zeros(3), num_draws=50)
    for group in ("posterior_predictive", "prior_predictive"):
        assert float(abs(tree[group]["a"] - tree[group]["b"]).max()) < 0.06
        assert float(tree[group]["a"].std()) > 5


def test_independent_guides_become_chains():
    x = torch.randn(5, 3)

    def shifted(x):
        pyro.sample("g", dist.Normal(x.new_ones(2) + 100, 0.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.7))

    tree = to_datatree(model, [guide, shifted], x, num_draws=30, chunk_size=7)
    assert tree["posterior"].sizes["chain"] == 2
    assert float(tree["posterior"]["g"].sel(chain=1).mean()) > 100
    arviz_stats = pytest.importorskip("arviz_stats")
    assert float(arviz_stats.rhat(tree, var_names=["g"])["g"].min()) > 1.5

    def short(x):
        pyro.sample("g", dist.Normal(x.new_ones(2), 0.5).to_event(1))

    with pytest.raises(ValueError, match="the guide draws nothing for the model's \\['z'\\]"):
        to_datatree(model, [guide, short], x, num_draws=3)


def test_pairs_trained_together_become_chains():
    """Restarts of a VAE have a decoder each, so each guide comes with its model."""
    cases = [linear_gaussian(1, size=3), linear_gaussian(1, size=3)]
    with torch.no_grad():
        cases[1].model.x.bias.add_(100.0)
    x = cases[0].x
    pairs = [case.model for case in cases], [case.exact for case in cases]
    tree = to_datatree(*pairs, x, num_draws=20)
    assert float(tree["posterior_predictive"]["x"].sel(chain=1).mean()) > 50
    assert abs(float(tree["posterior_predictive"]["x"].sel(chain=0).mean())) < 50
    weights = tree["sample_stats"]["log_weight"]
    assert float(weights.sel(chain=0).std("draw").max()) < 1e-9  # the guide is exact for the first model only
    with pytest.raises(ValueError, match=r"2 model\(s\) and 1 guide\(s\)"):
        to_datatree(pairs[0], cases[0].exact, x)


def test_a_sampler_that_has_run():
    x = torch.randn(4, 3)
    sampler = MCMC(NUTS(model), num_samples=12, warmup_steps=5, disable_progbar=True)
    sampler.run(x)
    tree = to_datatree(model, sampler, x, chunk_size=5)
    samples = sampler.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(tree["posterior"]["z"].values, samples["z"].numpy())
    assert tree["posterior"]["g"].dims == ("chain", "draw", "feature")
    stats = tree["sample_stats"]
    assert stats["diverging"].dtype == bool
    assert "log_q" not in stats
    lp = sum(v.sum([d for d in v.dims if d not in ("chain", "draw")]) for v in tree["log_prior"].data_vars.values())
    np.testing.assert_allclose(stats["lp"], lp + tree["log_likelihood"]["x"].sum("data"))
    assert tree.attrs["draws"] == "mcmc"
    with pytest.raises(ValueError, match="the sampler has no draws: call its run"):
        to_datatree(model, MCMC(NUTS(model), num_samples=1, warmup_steps=1), x)


def test_predictions_have_the_moments_of_the_guide():
    """The guide's z has the mean of x and variance .49, and x given z has variance 1."""
    x = torch.randn(5, 3)
    draws = torch.as_tensor(to_datatree(model, guide, x, num_draws=4000)["posterior_predictive"]["x"].values[0])
    assert (draws.mean(0) - x.mean(-1, keepdim=True)).abs().max() < 5 * (1.49 / 4000) ** 0.5
    assert (draws.var(0) - 1.49).abs().max() < 5 * 1.49 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_written_as_they_come_the_draws_are_the_same(suffix, tmp_path):
    covariate, y = torch.randn(6, 2), torch.randn(6)
    guide = AutoNormal(regression)
    guide(covariate, y)
    options = {"num_draws": 7, "chunk_size": 3, "coords": {"subject": list("abcdef")}}
    pyro.set_rng_seed(1)
    kept = to_datatree(regression, guide, covariate, y, **options)
    pyro.set_rng_seed(1)
    path = tmp_path / f"tree{suffix}"
    with to_datatree(regression, guide, covariate, y, path=path, **options) as written:
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert set(written.children) == set(kept.children)
        assert {k: v for k, v in written.attrs.items() if k != "created_at"} == {
            k: v for k, v in kept.attrs.items() if k != "created_at"
        }
        for name, group in kept.children.items():
            xr.testing.assert_identical(written[name].to_dataset().drop_attrs().load(), group.to_dataset().drop_attrs())
    with xr.open_datatree(path, engine="zarr" if suffix == ".zarr" else "h5netcdf") as again:
        assert again["posterior"].sizes["draw"] == 7
    with pytest.raises(FileExistsError, match="is not overwritten"):
        to_datatree(regression, guide, covariate, y, path=path)


def test_an_error_leaves_no_file(tmp_path):
    calls = []

    def failing(x):
        calls.append(1)
        if len(calls) > 12:
            raise RuntimeError("out of luck")
        return guide(x)

    with pytest.raises(RuntimeError, match="out of luck"):
        to_datatree(model, failing, torch.randn(5, 3), num_draws=100, chunk_size=1, path=tmp_path / "tree.nc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_round_trips_by_xarray_itself(kind, tmp_path):
    tree = to_datatree(model, guide, torch.randn(5, 3), num_draws=10)
    path = tmp_path / f"tree.{kind}"
    if kind == "netcdf":
        tree.to_netcdf(path, engine="h5netcdf")
        again = xr.open_datatree(path, engine="h5netcdf")
    else:
        tree.to_zarr(path, consolidated=False)
        again = xr.open_datatree(path, engine="zarr", consolidated=False)
    with again:
        for name, group in tree.children.items():
            xr.testing.assert_identical(again[name].to_dataset().load(), group.to_dataset())


def test_legacy_inferencedata():
    arviz = pytest.importorskip("arviz")
    tree = to_datatree(model, guide, torch.randn(5, 3), num_draws=10)
    if "InferenceData" not in vars(arviz):  # asking 1.x for the attribute makes it warn
        with pytest.raises(ImportError, match="Give them the tree"):
            to_inferencedata(tree)
        return
    legacy = to_inferencedata(tree)
    assert set(legacy.groups()) == set(tree.children)
    xr.testing.assert_identical(legacy.posterior, tree["posterior"].to_dataset())
    assert arviz.summary(legacy, kind="stats").shape[0] == 7


def test_an_improper_prior_is_left_out_unless_asked_for():
    def improper(x):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(improper, init_loc_fn=lambda site: torch.zeros(()))
    tree = to_datatree(improper, guide, torch.zeros(3), num_draws=4)
    assert "prior" not in tree.children
    assert "improper" in tree.attrs["left_out"]
    with pytest.raises(NotImplementedError):
        to_datatree(improper, guide, torch.zeros(3), num_draws=4, groups=["prior"])


def redrawn(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as chosen:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[chosen])


def test_a_minibatch_that_the_programs_draw_is_one_for_all_draws():
    x = torch.arange(5.0)
    tree = to_datatree(redrawn, point, x, num_draws=9, chunk_size=2)
    chosen = tree["log_likelihood"]["data"].values.tolist()
    assert len(set(chosen)) == 2
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x[chosen])
    z = torch.as_tensor(tree["posterior"]["z"].values)
    np.testing.assert_allclose(tree["log_likelihood"]["x"], dist.Normal(z[..., None], 1.0).log_prob(x[chosen]))
    assert tree["posterior_predictive"]["data"].values.tolist() == chosen


def of_two_sizes(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"event_dims": ["side"]})
    pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(3), 1.0).to_event(1), obs=x[:3])


def point(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("programs", "options", "message"),
    [
        ((model, guide), {"num_draws": 0}, "num_draws must be at least 1, got 0"),
        ((model, guide), {"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ((model, guide), {"groups": ["posteriors"]}, "unknown group\\(s\\) \\['posteriors'\\]"),
        ((model, guide), {"groups": "posterior"}, "groups is a list of names"),
        ((model, guide), {"path": "tree.csv"}, "must end in .nc"),
        ((model, guide), {"coords": {"dat": [1]}}, "coords labels \\['dat'\\], which are no dims"),
        ((model, guide), {"dims": {"x": ["a", "b"]}}, "site 'x' has 1 event dim\\(s\\)"),
        ((model, guide), {"dims": {"x": ["feature"]}}, "dim 'feature' has size 3 at site 'x' and 2 at 'g'"),
        ((model, guide), {"dims": {"x": ["z"]}}, "'z' names a site and a dim"),
        ((model, []), {}, "1 model\\(s\\) and 0 guide\\(s\\)|0 guide"),
    ],
)
def test_what_has_no_tree(programs, options, message):
    with pytest.raises(ValueError, match=message):
        to_datatree(*programs, torch.randn(5, 3) if programs[0] is model else torch.randn(5), **options)
