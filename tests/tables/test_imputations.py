"""Imputations of a frame: values, intervals, pooled estimates; exact ones of a linear-Gaussian model."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.chains.autoencode import weighted_latents
from pyro_hvae.data import table
from pyro_hvae.kernels import Columns
from pyro_hvae.tables import Imputations
from tests.linear_gaussian import linear_gaussian


def rows():
    frame = pd.DataFrame(
        {
            "height": [1.5, np.nan, 1.75, np.nan],
            "children": [0, 1, 2, np.nan],
            "grade": pd.Categorical(["b", None, "a", "c"], categories=["a", "b", "c"], ordered=True),
            "region": ["n", "s", None, "w"],
        },
        index=["p", "q", "r", "s"],
    )
    return frame, table(frame)


def draws(rows):
    """Three draws, of which the observed entries are nonsense."""
    x = torch.full((3, 4, 4), 7.0)
    x[:, 1, 0] = torch.tensor([-1.0, 0.0, 4.0])
    x[:, 3, 0] = torch.tensor([1.0, 1.0, 1.0])
    x[:, 3, 1] = torch.tensor([2.0, 5.0, 3.0])
    x[:, 1, 2] = torch.tensor([0.0, 1.0, 2.0])
    x[:, 2, 3] = torch.tensor([2.0, 0.0, 2.0])
    return Imputations(rows, x)


class TestFrames:
    def test_each_draw_is_a_completed_frame(self):
        frame, numbers = rows()
        imputed = draws(numbers)
        assert len(imputed) == 3
        assert len(list(imputed)) == 3
        first = imputed[0]
        seen = frame.notna()
        pd.testing.assert_frame_equal(first.where(seen), frame)  # bit for bit, with dtypes
        mean, sd = frame.height.mean(), frame.height.std(ddof=0)
        assert first.at["q", "height"] == pytest.approx(mean - sd)
        assert first.at["s", "children"] == 2
        assert first.at["q", "grade"] == "a"
        assert first.at["r", "region"] == "w"
        assert not first.isna().any().any()
        assert first.grade.dtype == frame.grade.dtype

    def test_points_are_means_medians_and_modes(self):
        frame, numbers = rows()
        point = draws(numbers).frame
        mean, sd = frame.height.mean(), frame.height.std(ddof=0)
        assert point.at["q", "height"] == pytest.approx(mean + sd)
        assert point.at["s", "children"] == 3
        assert point.at["q", "grade"] == "b"
        assert point.at["r", "region"] == "w"

    def test_intervals(self):
        frame, numbers = rows()
        found = draws(numbers).intervals(0.5)
        assert list(found.index.get_level_values("row")) == ["q", "q", "r", "s", "s"]
        assert list(found.index.get_level_values("column")) == ["height", "grade", "region", "height", "children"]
        mean, sd = frame.height.mean(), frame.height.std(ddof=0)
        np.testing.assert_allclose(
            found.loc[("q", "height"), ["sd", "lower", "upper"]].astype(float),
            [sd * np.std([-1, 0, 4]), mean - sd / 2, mean + 2 * sd],
        )
        assert found.at[("r", "region"), "share"] == pytest.approx(2 / 3)
        assert np.isnan(found.at[("r", "region"), "lower"])
        assert list(found.loc[("s", "children"), ["lower", "upper"]]) == [2, 4]  # outward to whole numbers
        with pytest.raises(ValueError, match="probability"):
            draws(numbers).intervals(90)

    def test_pool_is_rubins_rule(self):
        _, numbers = rows()
        pooled = draws(numbers).pool(lambda frame: (frame.children.mean(), 0.25))
        means = np.array([5, 8, 6]) / 4
        between = means.var(ddof=1) * 4 / 3
        assert pooled.estimate == pytest.approx(means.mean())
        assert pooled.stderr == pytest.approx(np.sqrt(0.25 + between))
        assert pooled.fraction == pytest.approx(between / (0.25 + between))

    def test_says_missing_at_random(self):
        _, numbers = rows()
        assert "missing at random" in repr(draws(numbers))

    def test_new_rows_with_gaps_get_the_dtypes_of_the_schema(self):
        """Whole numbers without gaps are int64 in the schema, and float64 in new rows with gaps."""
        schema = table(pd.DataFrame({"n": [3, 4, 7, 2**53 + 1], "f": [True, False, True, True]})).schema
        new = pd.DataFrame({"n": [4.0, np.nan], "f": [None, True]}, index=["x", "y"])
        imputed = Imputations(table(new, schema=schema), torch.zeros(2, 2, 2))
        assert imputed.frame.n.dtype == np.int64
        assert imputed.frame.f.dtype == bool
        assert imputed.frame.at["x", "n"] == 4
        assert not imputed.frame.at["x", "f"]

    def test_a_complete_frame_is_returned_as_it_is(self):
        frame = pd.DataFrame({"a": [1.0, 2.5, 3.0], "b": [1, 0, 1]})
        imputed = Imputations(table(frame), torch.zeros(2, 3, 2))
        pd.testing.assert_frame_equal(imputed.frame, frame)
        assert len(imputed.intervals()) == 0


def factor_pair():
    """A linear factor model as a table's pair, with a guide that does not know the posterior."""
    case = linear_gaussian(1)
    width = case.x.shape[-1]
    names = [f"c{j}" for j in range(width)]
    kernel = case.model.kernels["x"]
    model = ph.TopDown(z1=case.model.kernels["z1"], x=Columns(None, {tuple(names): kernel}))
    latent = kernel.weight.shape[-1]
    net = nn.Linear(width, 2 * latent)
    nn.init.zeros_(net.weight)
    with torch.no_grad():  # off in place and width, so that only the weights can make the draws right
        net.bias.copy_(torch.tensor([1.0] * latent + [1.0] * latent))
    return model, ph.BottomUp(z1=ph.Gaussian(net)), kernel


def gaussian_of(*, slope: float, shift: float, scale: float) -> ph.LinearGaussian:
    return ph.LinearGaussian(1, 1, weight=torch.tensor([[slope]]), bias=torch.tensor([shift]), scale=scale)


class TestExact:
    def test_importance_weights_give_the_exact_conditional(self):
        """With many proposals, draws of missing entries have the mean and covariance of the Gaussian conditional."""
        model, guide, kernel = factor_pair()
        prior = model.kernels["z1"](None)
        weight, noise = kernel.weight.detach(), kernel(torch.zeros(1, kernel.weight.shape[-1])).variance.detach()[0]
        bias = kernel(torch.zeros(kernel.weight.shape[-1])).mean.detach()
        mean = bias + weight @ prior.mean.detach()
        covariance = weight @ torch.diag(prior.variance.detach()) @ weight.T + torch.diag(noise)
        width = len(bias)
        x, mask = mean + torch.randn(2, width), torch.ones(2, width, dtype=torch.bool)
        mask[0, 0] = mask[1, -1] = False
        draws = ph.impute(model, guide, x, mask, num_draws=20_000, num_particles=20_000)
        for n in range(2):
            gone, seen = (~mask[n]).nonzero()[:, 0], mask[n].nonzero()[:, 0]
            gain = covariance[gone][:, seen] @ torch.linalg.inv(covariance[seen][:, seen])
            expected = mean[gone] + gain @ (x[n, seen] - mean[seen])
            variance = (covariance[gone][:, gone] - gain @ covariance[seen][:, gone]).diagonal()
            found = draws[:, n, gone]
            # the draws share one pool of proposals, whose effective size is below a tenth of its number
            assert ((found.mean(0) - expected).abs() < 4 * (variance / 1000).sqrt()).all()
            assert ((found.var(0) / variance - 1).abs() < 0.2).all()
            assert torch.equal(draws[:, n, seen], x[n, seen].expand(20_000, -1))

    def test_the_density_of_the_guide_is_in_the_weights(self):
        """z ~ N(0, 1), x | z ~ N(z, 1): the posterior N(x/2, 1/2) is as wide as the guide N(.5, .64), which counts."""
        model = ph.TopDown(z=ph.StandardNormal(1), x=gaussian_of(slope=1.0, shift=0.0, scale=1.0))
        guide = ph.BottomUp(z=gaussian_of(slope=0.0, shift=0.5, scale=0.8))
        x = torch.tensor([[0.4], [1.5]])
        z = weighted_latents(model, guide, x, num_particles=20_000, num_draws=20_000)["z"][..., 0]
        # four standard errors of about 10,000 effective draws
        assert ((z.mean(0) - x[:, 0] / 2).abs() < 4 * 0.01).all()
        assert ((z.var(0) - 0.5).abs() < 4 * 0.01).all()

    def test_one_proposal_is_the_guide(self):
        model, guide, _ = factor_pair()
        x = torch.randn(3, guide.kernels["z1"].net.in_features)
        torch.manual_seed(1)
        one = weighted_latents(model, guide, x, num_particles=1, num_draws=4)["z1"]
        torch.manual_seed(1)
        two = ph.encode(guide, x, num_draws=1)["z1"]
        assert torch.equal(one, two.expand_as(one))

    def test_pieces_of_the_data_are_joined(self, monkeypatch):
        model, guide, _ = factor_pair()
        x = torch.randn(7, guide.kernels["z1"].net.in_features)
        monkeypatch.setattr("pyro_hvae.chains.autoencode._ELEMENTS", 2 * 50 * x.shape[-1])
        found = weighted_latents(model, guide, x, num_particles=50)["z1"]
        assert found.shape == (7, guide.kernels["z1"].net.out_features // 2)

    def test_refusals(self):
        model, guide, _ = factor_pair()
        x = torch.zeros(2, guide.kernels["z1"].net.in_features)
        with pytest.raises(ValueError, match="needs a mask"):
            ph.impute(model, guide, x)
        with pytest.raises(ValueError, match="num_particles must be >= 1"):
            ph.impute(model, guide, x, x == 0, num_particles=0)
