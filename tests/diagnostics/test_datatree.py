"""The tree holds what the programs drew, in ArviZ's shapes, with densities that add up."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from pyro_hvae.diagnostics import to_datatree


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
    log_p = dist.Normal(0.0, 1.0).log_prob(g).sum(-1) + dist.Normal(g.sum(-1, keepdim=True), 1.0).log_prob(z).sum(-1)
    log_q = dist.Normal(1.0, 0.5).log_prob(g).sum(-1) + dist.Normal(x.mean(-1), 0.7).log_prob(z).sum(-1)
    stats = tree["sample_stats"]
    np.testing.assert_allclose(stats["lp"].values, (log_p + expected.sum(-1)).numpy())
    np.testing.assert_allclose(stats["log_q"].values, log_q.numpy())
    np.testing.assert_allclose(stats["log_weight"].values, (stats["lp"] - stats["log_q"]).values)
    assert tree["posterior_predictive"]["x"].shape == (1, 6, 5, 3)
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.numpy())


def test_likelihood_is_unscaled_under_a_minibatch():
    x = torch.randn(5, 3)
    tree = to_datatree(model, guide, x, size=50, num_draws=2)
    z = torch.as_tensor(tree["posterior"]["z"].values)
    expected = dist.Normal(z[..., None], 1.0).log_prob(x).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values, expected.numpy())


def test_netcdf_round_trip_and_summary(tmp_path):
    arviz_stats = pytest.importorskip("arviz_stats")
    tree = to_datatree(model, guide, torch.randn(5, 3), num_draws=50)
    tree.to_netcdf(tmp_path / "posterior.nc")
    with xr.open_datatree(tmp_path / "posterior.nc") as again:
        xr.testing.assert_allclose(again["posterior"].to_dataset(), tree["posterior"].to_dataset())
        assert len(arviz_stats.summary(again, kind="stats")) == 7


def test_no_draws():
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        to_datatree(model, guide, torch.randn(5, 3), num_draws=0)
