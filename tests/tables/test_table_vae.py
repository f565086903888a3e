"""From a DataFrame to a trained pair, imputations, latents and a tree."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.chains.ladder import LadderEvidence, gaussian_product
from pyro_hvae.data import table
from pyro_hvae.models import table_vae
from pyro_hvae.nn import TableEncoder
from pyro_hvae.training import load


def mixed(num_rows=120, missing=0.2):
    """A table of one common factor, each column another kind, entries missing at random."""
    generator = np.random.default_rng(0)
    z = generator.normal(size=num_rows)
    frame = pd.DataFrame(
        {
            "age": 40 + 10 * z + 3 * generator.normal(size=num_rows),
            "income": np.exp(z + 0.3 * generator.normal(size=num_rows)),
            "visits": generator.poisson(np.exp(0.5 * z + 1)),
            "smokes": generator.random(num_rows) < 1 / (1 + np.exp(-2 * z)),
            "stage": pd.Categorical(np.digitize(z, [-0.5, 0.5]), ordered=True),
            "region": generator.choice(list("nsew"), num_rows),
        },
        index=[f"p{i}" for i in range(num_rows)],
    )
    return frame.mask(generator.random(frame.shape) < missing)


def test_ten_lines_from_a_frame_to_an_imputed_frame_with_intervals():
    frame = mixed()

    torch.manual_seed(0)
    model, guide = ph.table_vae(table(frame, {"income": "log_normal"}), 2, hidden=(32,))
    ph.fit(model, guide, frame, bound=ph.IWELBO(num_particles=5), steps=300, progress=False)
    imputed = ph.impute(model, guide, frame, num_draws=50, num_particles=50)
    completed, intervals = imputed.frame, imputed.intervals(0.9)

    seen = frame.notna()
    assert not completed.isna().any().any()
    assert completed.index.equals(frame.index)
    pd.testing.assert_frame_equal(completed.where(seen), frame, check_dtype=False)
    assert len(intervals) == int((~seen).sum().sum())
    ages = intervals.xs("age", level="column")
    assert (ages.lower < ages.value).all()
    assert (ages.value < ages.upper).all()
    # the other columns tell of the age: imputations follow them, with errors below those of the mean
    truth = mixed(missing=0.0).age[ages.index]
    assert ((ages.value - truth) ** 2).mean() < 0.6 * ((frame.age.mean() - truth) ** 2).mean()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    frame = mixed(12)
    return frame, *table_vae(table(frame, {"income": "gamma", "visits": "zero_inflated_poisson"}), 2, hidden=(8,))


class TestVerbs:
    def test_encode_gives_a_frame(self, pair):
        frame, _, guide = pair
        latents = ph.encode(guide, frame, mean=True)
        assert list(latents.columns) == ["z1[0]", "z1[1]"]
        assert latents.index.equals(frame.index)
        rows = table(frame, schema=guide.schema)
        expected = ph.encode(guide, rows.x, mask=rows.mask, mean=True)["z1"]
        np.testing.assert_allclose(latents.to_numpy(), expected.numpy())
        drawn = ph.encode(guide, frame, num_draws=3)
        assert drawn.loc[2].index.equals(frame.index)

    def test_verbs_take_frames_as_their_tensors(self, pair):
        frame, model, guide = pair
        rows = table(frame, schema=model.schema)
        for verb in (
            lambda *args, **kwargs: ph.log_evidence(model, guide, *args, num_samples=20, **kwargs).value,
            lambda *args, **kwargs: ph.IWELBO(num_particles=3).per_datum(model, guide, *args, **kwargs),
        ):
            values = []
            for args, kwargs in (((frame,), {}), ((), {"x": frame}), ((rows,), {}), ((rows.x,), {"mask": rows.mask})):
                torch.manual_seed(3)
                values.append(verb(*args, **kwargs))
            assert all(torch.equal(values[0], other) for other in values)

    def test_tree_has_index_names_and_units(self, pair):
        frame, model, guide = pair
        tree = ph.to_datatree(model, guide, frame, num_draws=200)
        observed = tree["observed_data"]["x"]
        assert list(observed.coords["data"].values) == list(frame.index)
        assert list(observed.coords["x_dim_0"].values) == list(frame.columns)
        np.testing.assert_allclose(observed.sel(x_dim_0="age"), frame.age)  # NaN where it is missing
        assert np.array_equal(np.isnan(observed), frame.isna())
        replicates = tree["posterior_predictive"]["x"]
        assert abs(replicates.sel(x_dim_0="age").mean() - frame.age.mean()) < 3 * frame.age.std()
        assert (replicates.sel(x_dim_0="visits") % 1 == 0).all()
        assert set(np.unique(tree["prior_predictive"]["x"].sel(x_dim_0="stage"))) <= {0.0, 1.0, 2.0}

    def test_predict_gives_frames(self, pair):
        frame, model, guide = pair
        torch.manual_seed(0)
        found = ph.predict(model, guide, frame, num_draws=50)
        assert found.frame.index.equals(frame.index)
        assert list(found.frame.columns) == list(frame.columns)
        assert found["x"].shape == (50, 12, 6)
        assert len(found.frames.intervals()) == frame.size  # of every entry, whether it is missing or not
        new = ph.predict(ph.Problem(model, guide)(frame), frame.iloc[:3], num_draws=4)
        assert new.drawn_from == {"z1": "prior"}
        tree = ph.to_datatree(model, guide, frame, num_draws=5, predictions=frame.iloc[:3])
        assert list(tree["predictions"]["x"].coords["data"].values) == list(frame.index[:3])

    def test_index_of_two_levels(self, pair):
        frame, model, guide = pair
        frame = frame.set_index(pd.MultiIndex.from_product([["a", "b", "c"], [1, 2, 3, 4]]))
        tree = ph.to_datatree(model, guide, frame, num_draws=3)
        assert str(tree["posterior"].coords["data"].values[5]) == "b, 2"
        assert ph.impute(model, guide, frame, num_draws=2).frame.index.equals(frame.index)

    def test_diagnose(self, pair):
        frame, model, guide = pair
        assert "k-hat" in str(ph.diagnose(model, guide, frame, num_draws=100))

    def test_validation_and_batches(self, pair):
        frame, model, guide = pair
        result = ph.fit(
            model, guide, frame, validation=frame.iloc[:4], bound=ph.IWELBO(num_particles=3), epochs=2, batch_size=5,
            progress=False,
        )  # fmt: skip
        assert result.steps == 6
        with pytest.raises(ValueError, match="lacks"):
            ph.fit(model, guide, frame[["age"]], bound=ph.IWELBO(num_particles=3), steps=1, progress=False)

    def test_load_restores_the_schema(self, pair, tmp_path):
        frame, model, guide = pair
        ph.fit(model, guide, frame, bound=ph.IWELBO(num_particles=2), steps=2, run_dir=tmp_path, progress=False)
        again, guide_again = load(tmp_path)
        assert again.schema == model.schema
        pd.testing.assert_frame_equal(ph.encode(guide_again, frame, mean=True), ph.encode(guide, frame, mean=True))

    def test_own_columns_read_a_table_or_frames_with_a_schema(self):
        frame = pd.DataFrame({"a": [0.5, -1.0, np.nan], "b": [1, 0, 1]})
        rows = table(frame)
        model = ph.TopDown(
            z=ph.StandardNormal(2),
            x=ph.Columns(None, {"a": ph.Gaussian(nn.Linear(2, 2)), "b": ph.Bernoulli(nn.Linear(2, 1))}),
        )
        guide = ph.BottomUp(z=ph.Gaussian(nn.Linear(2, 4)))
        assert ph.impute(model, guide, rows).frame.notna().all().all()
        with pytest.raises(TypeError, match="has no schema"):
            ph.impute(model, guide, frame)
        model.schema = guide.schema = rows.schema
        assert len(ph.encode(guide, frame)) == 3

    def test_refusals(self, pair):
        frame, model, guide = pair
        with pytest.raises(TypeError, match=r"brings \['mask'\] along"):
            ph.log_evidence(model, guide, frame, mask=torch.ones(12, 6, dtype=torch.bool), num_samples=2)
        with pytest.raises(ValueError, match="leave mask out"):
            ph.impute(model, guide, frame, torch.ones(12, 6, dtype=torch.bool))
        with pytest.raises(ValueError, match="no mean"):
            ph.reconstruct(model, guide, **table(frame, schema=model.schema).arguments)
        with pytest.raises(ValueError, match="activation"):
            table_vae(frame, 2, activation="swish")
        with pytest.raises(ValueError, match="latent_dim"):
            table_vae(frame, 0)
        with pytest.raises(TypeError, match="DataFrame or a description"):
            table_vae(np.zeros((3, 2)), 2)


class TestMissing:
    def test_masked_entries_change_nothing(self, pair):
        """Neither value nor gradient depends on what stands in a missing entry, in model and guide."""
        frame, model, guide = pair
        rows = table(frame, schema=model.schema)
        results = []
        for rubbish in (0.0, 3.0, math.nan):
            torch.manual_seed(1)
            x = torch.where(rows.mask, rows.x, rubbish)
            loss = ph.IWELBO(num_particles=3).differentiable_loss(model, guide, x, mask=rows.mask)
            results.append([loss, *torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])])
        for first, *others in zip(*results):
            assert first.isfinite().all()
            assert all(torch.equal(first, other) for other in others)

    def test_encoder_features(self):
        """Missing entries are zeros, and not the first label or the smallest grade."""
        frame = pd.DataFrame(
            {"a": [0.0, 1.0, 5.5], "c": ["x", "y", "z"], "s": [0, 1, 1], "n": [1, 2, 9], "p": [0.5, 2.0, 4.0]}
        )
        rows = table(frame, {"p": "gamma"})
        encoder = TableEncoder(rows.schema.columns, 1, ())
        encoder.layers = nn.Identity()
        x = torch.cat([rows.x, torch.full((1, 5), math.nan)])
        found = encoder(x)
        assert not found[3].any()
        expected = torch.cat(
            [
                rows.x[:, :1], 2 * rows.x[:, 2:3] - 1, rows.x[:, 3:4].log1p() - math.log1p(4.0), rows.x[:, 4:].log(),
                torch.eye(3),
            ],
            -1,
        )  # fmt: skip
        torch.testing.assert_close(found[:3], expected)

    @pytest.mark.parametrize("rows", [1, 12])
    def test_the_guide_sees_missing_entries_as_missing(self, pair, rows):
        """In a bottom-up guide and in a ladder: not as zeros, which are values of their own."""
        frame, model, guide = pair
        numbers = table(frame.iloc[:rows], schema=model.schema)
        x = torch.where(numbers.mask, numbers.x, math.nan)
        expected = guide.z1(x)
        torch.manual_seed(0)
        drawn = ph.encode(guide, numbers.x, mask=numbers.mask)["z1"]
        torch.manual_seed(0)
        assert torch.equal(drawn, expected.sample())
        features = TableEncoder(model.schema.columns, 5, ())
        ladder = ph.Ladder(model, z1=LadderEvidence(features, nn.Linear(5, 4)))
        evidence = ladder.z1(x)[1]
        product = gaussian_product("z1", model.z1(None), evidence)
        torch.testing.assert_close(ph.encode(ladder, numbers.x, mask=numbers.mask, mean=True)["z1"], product.mean)

    def test_compiled_steps_are_the_eager_ones(self, pair):
        frame, model, guide = pair
        start = {name: value.clone() for name, value in model.state_dict().items()}, {
            name: value.clone() for name, value in guide.state_dict().items()
        }
        results = []
        for compiled in (False, {"backend": "eager"}):
            model.load_state_dict(start[0])
            guide.load_state_dict(start[1])
            torch.manual_seed(5)
            ph.fit(model, guide, frame, bound=ph.IWELBO(num_particles=2), steps=3, seed=0, compile=compiled,
                   progress=False)  # fmt: skip
            results.append([value.clone() for value in model.parameters()])
        for one, other in zip(*results):
            torch.testing.assert_close(one, other)


def test_counts_start_at_the_moments_of_the_data():
    """Before the first step the mean of each count column is near the data's, whatever the scale of the counts."""
    generator = np.random.default_rng(0)
    for family in ("poisson", "negative_binomial"):
        for rate in (0.3, 5.0, 400.0):
            frame = pd.DataFrame({"n": generator.poisson(rate * generator.gamma(3.0, 1 / 3, 300))})
            torch.manual_seed(0)
            model, _ = table_vae(table(frame, {"n": family}), 2)
            mean = model.kernels["x"](torch.zeros(1, 2)).mean.detach()
            assert abs(float(mean) / frame.n.mean() - 1) < 0.25
