"""What is counted and said: masked entries, k-hat and its limit, reports of pairs and of trees."""

import re
from importlib.metadata import version

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import xarray

import pyro_hvae as ph
from pyro_hvae import diagnostics
from tests.kinds.outcomes import right_or_refused

T = torch.tensor


def standard():
    return dist.Normal(torch.zeros(()), 1.0)


# --- masked entries

KEEP = torch.arange(12) % 2 == 0


def masked_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12), poutine.mask(mask=KEEP):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked_mean_guide(y):
    pyro.sample("mu", dist.Normal(y[KEEP].sum() / 7, 7**-0.5))


def left_out(y):
    """log p(y_i | the other observed data), in closed form."""
    y = y[KEEP]
    return dist.Normal((y.sum() - y) / 6, (1 + 1 / 6) ** 0.5).log_prob(y)


def standard_error(terms):
    """Standard error of a sum of terms; ArviZ estimates their variance with n - 1 from version 1 on, with n before."""
    corrected = int(version("arviz-stats").split(".")[0]) >= 1
    return float((len(terms) * terms.var(unbiased=corrected)) ** 0.5)


def test_loo_counts_observed_entries():
    y = torch.randn(12)
    found = diagnostics.loo(ph.to_datatree(masked_mean, masked_mean_guide, y, num_draws=4000))
    right = left_out(y)
    assert found.n_data_points == 6
    assert found.elpd == pytest.approx(float(right.sum()), abs=0.05)
    assert found.se == pytest.approx(standard_error(right), abs=0.05)


def test_loo_counts_observed_entries_of_a_mask_on_the_distribution():
    y = torch.randn(12)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12):
            pyro.sample("y", dist.Normal(mu, 1.0).mask(KEEP), obs=y)

    found = diagnostics.loo(ph.to_datatree(model, masked_mean_guide, y, num_draws=4000))
    assert found.n_data_points == 6
    assert found.se == pytest.approx(standard_error(left_out(y)), abs=0.05)


def test_loo_counts_observed_entries_of_two_plates():
    keep = (torch.arange(12).reshape(4, 3) % 3) > 0
    y = torch.randn(4, 3)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1), poutine.mask(mask=keep):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(y[keep].sum() / 9, 9**-0.5))

    found = diagnostics.loo(ph.to_datatree(model, guide, y, num_draws=1000))
    assert found.n_data_points == 8


def test_held_out_counts_observed_entries():
    x = torch.randn(12)

    def model(x):
        with pyro.plate("data", 12):
            z = pyro.sample("z", standard())
            with poutine.mask(mask=KEEP):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 12):
            pyro.sample("z", dist.Normal(torch.where(KEEP, x / 2, 0.0), torch.where(KEEP, 0.5, 1.0).sqrt()))

    found = diagnostics.held_out(model, guide, x, num_draws=100)
    right = dist.Normal(0.0, 2**0.5).log_prob(x[KEEP])
    assert found.n_data_points == 6
    assert found.elpd == pytest.approx(float(right.sum()))
    assert found.se == pytest.approx(standard_error(right))


def test_predictive_check_looks_at_observed_entries():
    y = torch.randn(12)
    y[~KEEP] = 100.0
    table = diagnostics.predictive_check(ph.to_datatree(masked_mean, masked_mean_guide, y, num_draws=200))
    assert table.loc["mean", "observed"] == pytest.approx(float(y[KEEP].mean()))
    assert table.loc["max", "observed"] == pytest.approx(float(y[KEEP].max()))
    assert 0.01 < table.loc["max", "p_value"] < 0.99


# --- k-hat


def shifted_exponential(offset, dtype):
    """Weights with a tail of shape 1 - 1/2.2 = .55, times exp(offset)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(torch.ones((), dtype=dtype)))
            pyro.factor("constant", torch.full(z.shape, offset, dtype=dtype))
            pyro.sample("x", dist.Normal(torch.zeros((), dtype=dtype), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Exponential(torch.full((len(x),), 2.2, dtype=dtype)))

    return model, guide, torch.zeros(2, dtype=dtype)


@pytest.mark.parametrize("offset", [-1e6, 1e6])
@pytest.mark.parametrize("call", ["evidence", "khats"])
def test_khat_of_large_float32_log_weights(call, offset):
    def khat(dtype, offset):
        model, guide, x = shifted_exponential(offset, dtype)
        torch.manual_seed(1)
        if call == "evidence":
            return ph.log_evidence(model, guide, x, num_samples=4000).khat
        return diagnostics.khats(model, guide, x, num_draws=4000).per_datum

    right = khat(torch.float32, 0.0)
    right_or_refused(lambda: khat(torch.float32, offset), right, 0.25, names=["float32", "precision", "float64"])


def test_evidence_is_told_by_the_limit_of_its_number_of_draws():
    """With 100 draws k-hat is to be trusted up to 1 - 1/log10(100) = .5."""
    x = torch.randn(40)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.42))

    evidence = ph.log_evidence(model, guide, x, num_samples=100)
    above = int((evidence.khat > 0.5).sum())
    assert above > int((evidence.khat > 0.7).sum())
    assert re.search(rf"(?<![\d.]){above}(?![\d.])", str(evidence)), str(evidence)
    assert re.search(r"(?<!\d)0?\.50?\b", str(evidence)), str(evidence)


# --- what `diagnose` says


def wide_joint(x):
    pyro.sample("z", dist.Normal(x / 2, 4 * 0.5**0.5))


def joint(x):
    z = pyro.sample("z", standard())
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", standard())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(factor):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, factor * 0.5**0.5))

    return guide


def vector(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def vector_guide(x):
    pyro.sample("z", dist.Normal(x / 2, 0.5**0.5 * T([1.0, 1.0, 4.0])).to_event(1))


def shifted_and_wide(x):
    pyro.sample("z", dist.StudentT(3.0, x / 2 + 1.5, 2.5))


TOO_WIDE = {
    "one latent": (joint, wide_joint, lambda: T(1.0)),
    "each datum": (local, local_guide(4.0), lambda: torch.randn(30)),
    "a batch of one": (local, local_guide(4.0), lambda: torch.randn(1)),
    "one of three elements": (vector, vector_guide, lambda: torch.randn(3)),
    "shifted, with heavy tails": (joint, shifted_and_wide, lambda: T(0.4)),
}


@pytest.mark.parametrize("name", TOO_WIDE)
def test_a_guide_that_weights_can_mend_is_not_simply_good(name):
    model, guide, x = TOO_WIDE[name]
    report = ph.diagnose(model, guide, x(), num_draws=1000)
    assert report.worst != "good"
    assert "draws" in str(report)
    assert "weighted" in str(report)


@pytest.mark.parametrize("name", ["joint", "local"])
def test_an_exact_guide_is_good(name):
    """A guard."""
    if name == "joint":
        report = ph.diagnose(joint, lambda x: pyro.sample("z", dist.Normal(x / 2, 0.5**0.5)), T(1.0))
    else:
        report = ph.diagnose(local, local_guide(1.0), torch.randn(30))
    assert report.worst == "good"


# --- a report of a tree


def trees(tmp_path, how, guide):
    x = torch.randn(20)
    if how == "in memory":
        return ph.to_datatree(local, guide, x, num_draws=500)
    path = tmp_path / "draws.nc"
    if how == "written by chunks":
        return ph.to_datatree(local, guide, x, num_draws=500, path=path)
    ph.to_datatree(local, guide, x, num_draws=500).to_netcdf(path)
    return xarray.open_datatree(path)


@pytest.mark.parametrize("how", ["in memory", "reopened", "written by chunks"])
def test_diagnose_of_a_tree_finds_a_narrow_guide(tmp_path, how):
    report = ph.diagnose(trees(tmp_path, how, local_guide(0.35)))
    assert report.worst == "wrong"
    assert "k-hat" in str(report)


@pytest.mark.parametrize("how", ["in memory", "reopened", "written by chunks"])
def test_diagnose_of_a_tree_finds_an_exact_guide_good(tmp_path, how):
    assert ph.diagnose(trees(tmp_path, how, local_guide(1.0))).worst == "good"


def test_diagnose_of_a_tree_has_the_khats_of_its_weights():
    tree = ph.to_datatree(local, local_guide(0.6), torch.randn(8), num_draws=500)
    right = diagnostics.smoothed_weights(tree)["khat"].values
    found = ph.diagnose(tree).numbers["khat"]
    found = found["per_datum"].values if hasattr(found, "data_vars") else np.asarray(found)
    assert np.allclose(np.sort(found.ravel()), np.sort(right.ravel()))


def test_diagnose_of_a_tree_without_weights_is_refused_in_words():
    tree = ph.to_datatree(local, local_guide(1.0), torch.randn(8), num_draws=100, groups=["posterior"])
    with pytest.raises(ValueError, match=r"sample_stats|log_weight"):
        ph.diagnose(tree)


def test_diagnose_of_a_tree_of_networks():
    model, guide = ph.vae(4, 2, hidden=(8,), likelihood="gaussian")
    report = ph.diagnose(ph.to_datatree(model, guide, torch.randn(6, 4), num_draws=200))
    assert report.worst in diagnostics.LEVELS
