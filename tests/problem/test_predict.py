"""Predictions at new data, against exact posterior predictive distributions."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_hvae as ph
from pyro_hvae.problem import Predictions, Problem, predict
from tests.programs import build

DRAWS = 1500
NOISE = 0.5


def regression(x, y=None):
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal((weights * x).sum(-1), NOISE), obs=y)


def data(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 2, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0]) + NOISE * torch.randn(num_rows, generator=generator)


def posterior(x, y):
    """Exact mean and covariance of the weights."""
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x / NOISE**2)
    return covariance @ x.T @ y / NOISE**2, covariance


def exact_guide(x, y=None):
    """Guide that is exact at the data that it gets."""
    mean, covariance = posterior(x, y)
    pyro.sample("weights", dist.MultivariateNormal(mean, covariance))


def fixed_guide(x, y):
    """The posterior of these data, whatever the guide is called with."""
    mean, covariance = posterior(x, y)

    def guide(x, y=None):
        pyro.sample("weights", dist.MultivariateNormal(mean, covariance))

    return guide


def check(draws, mean, variance):
    """Means and variances within four standard errors."""
    count = len(draws)
    assert ((draws.mean(0) - mean).abs() < 4 * (variance / count).sqrt()).all()
    assert ((draws.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / count)).all()


class TestRegression:
    @pytest.mark.parametrize("rows", [7, 12])  # 12 are as many as the old ones
    def test_new_rows(self, rows):
        x, y = data(12)
        new, _ = data(rows, seed=1)
        mean, covariance = posterior(x, y)
        variance = ((new @ covariance) * new).sum(-1) + NOISE**2
        for found in (
            predict(Problem(regression, exact_guide)(x, y), new, num_draws=DRAWS),
            predict(regression, fixed_guide(x, y), new, num_draws=DRAWS),
        ):
            assert found["y"].shape == (DRAWS, rows)
            check(found["y"], new @ mean, variance)
            check(found.latents["weights"], mean, covariance.diagonal())
            assert found.drawn_from == {"weights": "guide"}
            # predictions of two rows share the weights
            both = torch.cov(found["y"][:, :2].T)[0, 1]
            expected = new[0] @ covariance @ new[1]
            scale = (variance[0] * variance[1] + expected**2).sqrt()
            assert abs(both - expected) < 4 * scale / math.sqrt(DRAWS)

    def test_old_rows(self):
        """With the old data given, replicates of them."""
        x, y = data(12)
        mean, covariance = posterior(x, y)
        found = predict(regression, exact_guide, x, y, num_draws=DRAWS)
        check(found["y"], x @ mean, ((x @ covariance) * x).sum(-1) + NOISE**2)

    def test_prior(self):
        x, y = data(5)
        for args in ((x,), (x, y)):
            found = predict(regression, None, *args, num_draws=DRAWS)
            check(found["y"], torch.zeros(5), (x**2).sum(-1) + NOISE**2)
        assert found.drawn_from == {"weights": "prior"}

    def test_autoguide(self):
        x, y = data(12)
        guide = AutoMultivariateNormal(regression)
        ph.fit(
            regression, guide, (x, y), bound=ph.TraceELBO(num_particles=16), steps=300, batch_size=None, progress=False,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        )  # fmt: skip
        new, (mean, _) = data(3, 1)[0], posterior(x, y)
        for found in (
            predict(regression, guide, new, num_draws=500),
            predict(Problem(regression, guide)(x, y), new, num_draws=500),
        ):
            assert found["y"].shape == (500, 3)
            assert (found["y"].mean(0) - new @ mean).abs().max() < 0.3
            assert found.drawn_from == {"weights": "guide"}


def groups(x, group, y=None):
    """An effect for each group, one for each row, and a row's value."""
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        own = pyro.sample("own", dist.Normal(0.0, 0.5))
        return pyro.sample("y", dist.Normal(effect[..., group] + own + x, 0.1), obs=y)


class TestLocal:
    def guide(self, rows):
        guide = AutoNormal(groups, init_scale=1e-3)
        group = torch.arange(rows) % 3
        guide(torch.zeros(rows), group, torch.ones(rows))
        with torch.no_grad():
            guide.locs.effect.copy_(torch.tensor([1.0, 2.0, 3.0]))
            guide.locs.own.fill_(50.0)  # of the old rows alone
        return guide

    @pytest.mark.parametrize("rows", [3, 6, 7])
    def test_latents_of_new_rows_are_of_the_prior(self, rows):
        """Whatever the number of new rows: as many as there are groups, or old rows."""
        guide, group = self.guide(6), torch.arange(rows) % 3
        old = (torch.zeros(6), torch.arange(6) % 3, torch.ones(6))
        for found in (
            predict(groups, guide, torch.zeros(rows), group, num_draws=DRAWS, plates=["data"]),
            predict(Problem(groups, guide)(*old), torch.zeros(rows), group, num_draws=DRAWS, plates=["data"]),
        ):
            check(found["y"], group + 1.0, torch.full((rows,), 0.25 + 0.01))
            assert found.drawn_from == {"effect": "guide", "own": "prior"}
            assert "own drawn from the prior" in repr(found)

    def test_plates_are_found(self):
        found = predict(groups, self.guide(6), torch.zeros(5), torch.zeros(5, dtype=torch.long), num_draws=20)
        assert found.drawn_from == {"effect": "guide", "own": "prior"}

    def test_amortised_guide(self):
        """A chain's guide sees the new rows; without them their latents are of the prior."""
        torch.manual_seed(0)
        model = ph.TopDown(z=ph.StandardNormal(2), x=ph.Gaussian(nn.Linear(2 + 1, 2 * 4)))
        guide = ph.BottomUp(z=ph.Gaussian(nn.Linear(4 + 1, 2 * 2)))
        x, context = torch.randn(5, 4), torch.randn(5, 1)
        found = predict(model, guide, x, context, num_draws=DRAWS)
        assert found.drawn_from == {"z": "guide"}
        expected = guide.z(x, context)
        check(found.latents["z"], expected.mean.detach(), expected.variance.detach())
        prior = predict(model, None, None, context, num_draws=2000)
        check(prior["z"], torch.zeros(5, 2), torch.ones(5, 2))
        assert prior["x"].shape == (2000, 5, 4)
        found = predict(Problem(model, guide)(x, context), None, context[:3], num_draws=50)
        assert found["x"].shape == (50, 3, 4)
        assert found.drawn_from == {"z": "prior"}
        with pytest.raises(ValueError, match=r"can't be called with the new data .*predict\(model, None"):
            predict(model, guide, None, context)


class TestShapes:
    def test_summed_out_sites_are_drawn(self):
        def mixture(x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(torch.tensor([-5.0, 5.0])[k], 0.1), obs=x)

        def nothing(x):
            pass

        found = predict(mixture, nothing, torch.tensor([-5.0, 5.0, 5.0]), num_draws=20)
        assert (found["x"].sign() == torch.tensor([-1.0, 1.0, 1.0])).all()
        assert found.latents["k"].shape == (20, 3)

    def test_is_a_mapping(self):
        x, y = data(4)
        found = predict(regression, exact_guide, x, y, num_draws=3)
        assert isinstance(found, Predictions)
        assert list(found) == ["y"]
        assert len(found) == 1
        with pytest.raises(TypeError, match="not called with a DataFrame"):
            _ = found.frame

    def test_leaves_the_store_alone(self):
        x, _ = data(4)

        def guide(x, y=None):
            loc = pyro.param("loc", torch.zeros(2))
            pyro.sample("weights", dist.Normal(loc, 1.0).to_event(1))

        predict(regression, guide, x, num_draws=3)
        assert "loc" not in pyro.get_param_store()

    @pytest.mark.parametrize("num_draws", [0, 1.5, True])
    def test_number_of_draws(self, num_draws):
        with pytest.raises(ValueError, match="num_draws must be an integer of at least 1"):
            predict(regression, None, data(3)[0], num_draws=num_draws)

    def test_latents_that_do_not_fit_are_refused(self):
        guide = TestLocal().guide(6)
        with pytest.raises(ValueError, match=r"'own' has shape \(6,\).*\(5,\).*plates="):
            predict(groups, guide, torch.zeros(5), torch.zeros(5, dtype=torch.long), plates=["groups"])


def test_a_variable_of_the_guide_alone_is_no_draw_of_the_model():
    pair = build("auxiliary")
    drawn = ph.predict(pair.model, pair.guide, *pair.args, num_draws=400)
    assert list(drawn) == ["x"]
    assert list(drawn.latents) == ["z"]
    check(drawn["x"], 0.7 * pair.args[0], torch.full((4,), 0.36 + 0.25))


class TestTree:
    def test_predictions_share_the_draws_of_the_posterior(self):
        x, y = data(12)
        new, _ = data(5, seed=1)
        tree = ph.to_datatree(regression, exact_guide, x, y, num_draws=DRAWS, predictions=(new,))
        mean, covariance = posterior(x, y)
        found = torch.as_tensor(tree["predictions"]["y"].values[0])
        assert tree["predictions"]["y"].dims == ("chain", "draw", "data")
        check(found, new @ mean, ((new @ covariance) * new).sum(-1) + NOISE**2)
        at_draws = torch.as_tensor(tree["posterior"]["weights"].values[0]) @ new.T
        check(found - at_draws, torch.zeros(5), torch.full((5,), NOISE**2))
        constant = tree["predictions_constant_data"]["x"]
        assert constant.dims == ("data", "x_dim_1")
        assert torch.equal(torch.as_tensor(constant.values), new)
        assert tree["observed_data"].sizes["data"] == 12

    def test_in_a_file(self, tmp_path):
        x, y = data(12)
        tree = ph.to_datatree(
            regression, exact_guide, x, y, num_draws=7, chunk_size=3, predictions={"x": x[:4]}, path=tmp_path / "a.nc"
        )
        assert tree["predictions"]["y"].shape == (1, 7, 4)
        assert bool(tree["predictions"]["y"].notnull().all())

    def test_needs_data(self):
        x, y = data(3)
        with pytest.raises(ValueError, match="pass predictions="):
            ph.to_datatree(regression, exact_guide, x, y, num_draws=2, groups=["predictions"])
