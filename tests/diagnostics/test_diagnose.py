"""One set of draws, judged as it is and once weighted; from programs, a bound problem, a tree or a file."""

import importlib
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS

import pyro_hvae as ph
from pyro_hvae.diagnostics import (
    active_units,
    calibrate,
    diagnose,
    held_out,
    khats,
    layers,
    mean_variances,
    resample,
    to_datatree,
)
from pyro_hvae.diagnostics.moments import _of_site, compare_moments
from pyro_hvae.problem import Problem


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(factor=1.0, shift=0.0):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, factor * 0.5**0.5))

    return guide


def shared(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_guide(factor=1.0, shift=0.0):
    def guide(x):
        sd = (1 + len(x)) ** -0.5
        pyro.sample("z", dist.Normal(x.sum() / (1 + len(x)) + shift * sd, factor * sd))

    return guide


def whats(report, level=None):
    return [finding.what for finding in report.findings if level is None or finding.level == level]


# --- the draws as they are


@pytest.mark.parametrize("factor", [0.8, 0.92, 1.0, 1.08, 1.25, 1.6, 4.0])
def test_ratio_of_the_sds_is_the_guides(factor):
    x = torch.randn(1)
    tree = to_datatree(shared, shared_guide(factor), x, num_draws=20_000)
    found = compare_moments(tree)["z"]
    assert abs(found.ratio / factor - 1) < 0.05
    assert abs(found.shift) < 0.1
    assert (found.off, found.severe) == (int(not 1 / 1.15 < factor < 1.15), int(factor >= 4.0))
    assert found.undecided == 0


def test_shift_of_the_means_is_the_guides():
    found = compare_moments(to_datatree(shared, shared_guide(1.5, 0.8), torch.randn(3), num_draws=20_000))["z"]
    assert abs(found.shift - 0.8) < 0.1
    assert found.off == 1


@pytest.mark.parametrize(("model", "make"), [(local, local_guide), (shared, shared_guide)])
def test_a_guide_four_times_too_wide_has_good_weights_and_wrong_draws(model, make):
    x = 2**0.5 * torch.randn(30) if model is local else torch.randn(()) + torch.randn(30)  # as the model makes them
    report = diagnose(model, make(4.0), x)
    (wrong,) = whats(report, "wrong")
    assert wrong.startswith("the draws: sd of z 4")
    assert any(what.startswith("the draws once weighted: k-hat of ") for what in whats(report, "good"))
    assert report.numbers["draws"]["z"]["off"] == (30 if model is local else 1)
    exact = diagnose(model, make(1.0), x)
    assert not whats(exact, "wrong") + whats(exact, "doubtful"), str(exact)
    assert any(what.startswith("the draws: means within") for what in whats(exact, "good"))


@pytest.mark.parametrize(("freedom", "scale"), [(1.0, 1.3), (3.0, 1.13)])
def test_scatter_of_heavy_tails_is_no_difference(freedom, scale):
    """Sds of 300 draws scatter beyond the limit where tails are heavy, or where there is no sd; their errors say so."""

    def program(width):
        def run():
            with pyro.plate("data", 400):
                pyro.sample("z", dist.StudentT(freedom, torch.zeros(400), width))

        return run

    found = compare_moments(to_datatree(program(1.0), program(scale), num_draws=300))["z"]
    assert found.entries > 350
    assert found.off == 0
    if freedom == 3.0:
        assert found.ratio > 1.15


def test_one_dominating_weight_tells_nothing():
    """The paired error of a mean is nearly 0 where one draw has the weight of all."""
    rest = 0.01 / 999
    weights = xr.Dataset(
        {
            "weight": (("chain", "draw"), np.array([[0.99, *[rest] * 999]])),
            "ess": ((), 1 / (0.99**2 + 999 * rest**2)),
        }
    )
    draws = xr.DataArray(np.array([[3.0, *np.random.default_rng(0).normal(size=999)]]), dims=("chain", "draw"))
    found = _of_site(draws, weights, xr.DataArray(True))
    assert abs(found.shift) > 1
    assert (found.off, found.severe, found.undecided) == (0, 0, 1)


def exact_pair(shift=0.0, factor=1.0, size=3):
    """Draws of a Gaussian whose guide is off by known amounts in each entry."""

    def program(mean, scale):
        return lambda: pyro.sample("z", dist.Normal(torch.full((size,), mean), scale).to_event(1))

    return program(0.0, 1.0), program(shift, factor)


@pytest.mark.parametrize(
    ("shift", "factor", "level"),
    [(0.04, 1.0, "good"), (0.2, 1.0, "doubtful"), (0.0, 1.06, "good"), (0.0, 1.25, "doubtful"), (1.5, 2.0, "wrong")],
)
def test_verdict_on_draws_on_both_sides_of_the_accuracy(shift, factor, level):
    report = diagnose(*exact_pair(shift, factor), num_draws=4000)
    (found,) = [f for f in report.findings if f.what.startswith("the draws: ")]
    assert found.level == level, found


def test_the_report_has_the_sd_of_the_draws_against_that_of_the_weighted_draws():
    torch.manual_seed(0)
    report = diagnose(*exact_pair(0.3, 1.5), num_draws=4000)
    table = report.tables()["the draws against the draws once weighted"]
    assert abs(table.loc["z", "sd / weighted sd"] - 1.5) < 0.1
    assert abs(table.loc["z", "mean off by (sd)"] - 0.3) < 0.15
    assert table.loc["z", ["entries off", "entries"]].tolist() == [3, 3]
    assert "the draws against the draws once weighted" in str(report)


def test_draws_are_not_judged_by_bad_weights():
    report = diagnose(shared, shared_guide(0.1), torch.randn(40), num_draws=1000)
    assert report.worst in ("wrong", "doubtful")
    assert any(what.startswith("the draws: not compared") for what in whats(report, "note")), str(report)
    assert list(report.tables()) == []


def test_advice_on_leave_one_out_is_about_its_cause():
    """A guide that is too narrow has bad weights for all data; an exact one has them for an outlier alone."""
    x = torch.randn(20)
    (poor,) = [f for f in diagnose(shared, shared_guide(0.1), x).findings if f.what.startswith("leave-one-out")]
    assert "k-hat above" in poor.what
    assert poor.advice == "first a better guide, as above"
    (good,) = [f for f in diagnose(shared, shared_guide(1.0), x).findings if f.what.startswith("leave-one-out")]
    assert "k-hat above" not in good.what
    x = torch.cat([torch.zeros(20), torch.tensor([20.0])])
    (outlier,) = [f for f in diagnose(shared, shared_guide(1.0), x).findings if f.what.startswith("leave-one-out")]
    assert "for 1 of 21 data" in outlier.what, outlier
    assert "longer tails" in outlier.advice


def test_too_few_draws_to_tell_are_said():
    """The guide is off by just the accuracy, which no number of draws decides."""
    (found,) = [f for f in diagnose(*exact_pair(0.1), num_draws=400).findings if f.what.startswith("the draws: ")]
    assert found.level == "note"
    assert "400 draws do not tell" in found.meaning


def test_points_that_a_guide_computes_may_differ_by_round_off():
    """As sums over particles may, on some processors: a point's density is -inf at the value of another run."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        e = pyro.sample("e", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        z = x / 2 + e * 0.5**0.5 * (1 + 1e-15 * e.numel())
        pyro.sample("z", dist.Delta(z, log_density=torch.full_like(z, math.log(2) / 2)))

    assert diagnose(model, guide, torch.tensor(0.3)).findings


def test_words_for_the_whole_posterior():
    report = str(diagnose(shared, shared_guide(0.3), torch.randn(40), num_draws=2000))
    assert "k-hat of the whole posterior" in report
    assert "of 1 data" not in report
    lone = diagnose(shared, shared_guide(1.0, 12.0), torch.randn(40), num_draws=2000)
    assert any("the whole posterior rests on fewer than 1% of 2000 draws" in what for what in whats(lone))


def test_a_global_latent_is_judged_beside_the_data():
    """z given g is exact, g far too narrow: each datum is good, the whole posterior is not."""

    def model(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        g = pyro.sample("g", dist.Normal(x.sum() / (len(x) + 2), 0.2 * (1 + len(x) / 2) ** -0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((g + x) / 2, 0.5**0.5))

    report = diagnose(model, guide, torch.randn(6))
    assert any("weighted: k-hat of each datum given g: 0 of 6" in what for what in whats(report, "good"))
    bad = whats(report, "wrong") + whats(report, "doubtful")
    assert any(what.startswith("the draws once weighted: k-hat of the whole posterior") for what in bad)


# --- trees


def test_a_tree_is_judged_as_its_programs_are(tmp_path):
    x = torch.randn(20)
    tree = to_datatree(local, local_guide(0.35), x, num_draws=400, path=tmp_path / "draws.nc")
    tree.close()
    with xr.open_datatree(tmp_path / "draws.nc") as again:
        report = diagnose(again)
    assert report.worst == "wrong"
    assert report.findings[0].what.startswith("the draws once weighted: k-hat of each datum")
    assert set(report.numbers) >= {"khat", "elbo", "ess", "draws", "predictive"}
    sets = {tuple(finding.what.split(" ")[:3]) for finding in report.findings}
    assert sets <= {tuple(f.what.split(" ")[:3]) for f in diagnose(local, local_guide(0.35), x).findings}


def test_one_set_of_draws():
    """A guide whose latents are all shared by the data has no layers to look at: it runs as often as for a tree."""
    calls = []

    def guide(x):
        calls.append(1)
        shared_guide()(x)

    x = torch.randn(5)
    report = diagnose(shared, guide, x, num_draws=300)  # and learn the structure
    counts = []
    for verb in (diagnose, to_datatree):
        calls.clear()
        verb(shared, guide, x, num_draws=300)
        counts.append(len(calls))
    assert counts[0] == counts[1]
    assert float(report.numbers["khat"]["joint"]) == -np.inf


def test_chains_of_restarts_and_of_a_sampler():
    x = torch.randn(6)
    tree = to_datatree(shared, [shared_guide(1.0, -6.0), shared_guide(1.0, 6.0)], x, num_draws=200)
    report = diagnose(tree)
    assert any(what.startswith("R-hat across restarts: z") for what in whats(report, "wrong"))
    assert len(report.numbers["elbos"]) == 2
    sampler = MCMC(NUTS(shared), num_samples=200, warmup_steps=100, num_chains=1, disable_progbar=True)
    sampler.run(x)
    report = diagnose(to_datatree(shared, sampler, x))
    assert whats(report, "note")[0].startswith("no weights: the draws are of kind mcmc")
    assert not whats(report, "wrong")
    report = diagnose(resample(to_datatree(shared, shared_guide(2.0), x, num_draws=500)))
    assert any(what.startswith("no weights: the draws are of kind resampled, k-hat ") for what in whats(report))


def test_a_minibatch_with_global_latents():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 50, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    (finding,) = [f for f in diagnose(to_datatree(model, shared_guide(), x)).findings if f.level == "note"]
    assert "stands for 10 times as many data" in finding.what
    for verb in (diagnose, khats):
        with pytest.raises(ValueError, match=r"plate 'data' shows 5 of 50 .* k-hat of a part of the data"):
            verb(model, shared_guide(), x)


def test_what_a_tree_can_not_say():
    tree = to_datatree(local, local_guide(), torch.randn(4), num_draws=50)
    with pytest.raises(ValueError, match="draw from the programs, which a tree does not hold"):
        diagnose(tree, calibration=True)
    with pytest.raises(TypeError, match="call diagnose with the tree alone"):
        diagnose(tree, local_guide())


def test_predictive_checks_are_read():
    heavy = 3 * torch.distributions.StudentT(2.0).sample((200,))
    report = diagnose(shared, shared_guide(), heavy)
    (finding,) = [what for what in whats(report, "doubtful") if what.startswith("predictive checks")]
    assert "sd of x (p = 0.000)" in finding
    assert any("replicates look like" in what for what in whats(diagnose(shared, shared_guide(), torch.randn(200))))


# --- bound problems, and nothing changed by looking

VERBS = {
    "to_datatree": lambda *a: to_datatree(*a, num_draws=5),
    "khats": lambda *a: khats(*a, num_draws=40),
    "layers": lambda *a: layers(*a),
    "mean_variances": lambda *a: mean_variances(*a),
    "active_units": lambda *a: active_units(*a),
    "calibrate": lambda *a: calibrate(*a, num_draws=19),
    "held_out": lambda *a: held_out(*a, num_draws=30),
    "diagnose": lambda *a: diagnose(*a, num_draws=100, calibration=True, evidence={"num_chains": 4, "betas": 5}),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_bound_problem_in_the_place_of_programs(verb):
    x = torch.randn(24)
    assert type(VERBS[verb](Problem(local, local_guide())(x))) is type(VERBS[verb](local, local_guide(), x))
    with pytest.raises(TypeError, match="has its guide and its data bound already"):
        VERBS[verb](Problem(local, local_guide())(x), local_guide())


@pytest.mark.parametrize("fails_at", [None, 1, 3, 5])
@pytest.mark.parametrize("verb", VERBS)
def test_looking_changes_nothing_also_after_an_error(verb, fails_at):
    model, guide = ph.vae(3, 2, hidden=(4,), likelihood="gaussian")
    norm = torch.nn.BatchNorm1d(3)
    calls = []

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = guide, norm

        def forward(self, x):
            calls.append(1)
            if fails_at is not None and len(calls) >= fails_at:
                raise RuntimeError("stop here")
            self.inner(self.norm(x))

    pair = model, Guide()
    pair[0].train()

    def state():
        tensors = [t.clone() for p in pair for t in (*p.parameters(), *p.buffers())]
        flags = [m.training for p in pair for m in p.modules()]
        generators = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        return tensors, (flags, generators, torch.get_default_dtype(), torch.is_grad_enabled())

    before, switches = state()
    try:
        VERBS[verb](*pair, torch.randn(24, 3))
    except RuntimeError as error:
        assert "stop here" in str(error)  # noqa: PT017
    after, found = state()
    assert found == switches
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_conditional_pair_is_judged_with_its_context():
    """Pyro's handlers take the keyword ``context`` for their own when they wrap a program."""
    model, guide = ph.vae(6, 2, hidden=(4,), context_dim=3)
    x, context = torch.bernoulli(torch.full((20, 6), 0.5)), torch.eye(3).repeat(7, 1)[:20]
    report = diagnose(model, guide, x, context=context, num_draws=100, calibration=True)
    assert "layers" in report.numbers
    found = ph.log_evidence(model, None, x, context=context, method="prior", num_samples=2000)
    by_guide = ph.log_evidence(model, guide, x, context=context, num_samples=2000)
    assert ((found.value - by_guide.value).abs() < 5 * (found.stderr**2 + by_guide.stderr**2).sqrt()).all()


def test_of_many_data_weights_alone_are_kept(monkeypatch):
    trees, x = [], torch.linspace(-1.0, 1.0, 40)
    module = importlib.import_module("pyro_hvae.diagnostics.diagnose")
    collect = module.collect
    monkeypatch.setattr(module, "collect", lambda *args, **more: trees.append(collect(*args, **more)) or trees[-1])
    reports = []
    for memory in (2**28, 0):
        monkeypatch.setattr(module, "_GROUP_BYTES", memory)
        torch.manual_seed(0)
        reports.append(diagnose(local, local_guide(0.5), x, num_draws=2000))
    whole, alone = reports
    assert {name: set(node.data_vars) for name, node in trees[1].children.items()} == {
        "sample_stats": {"lp", "log_q", "log_weight"}
    }
    assert "log_q_z" in trees[0]["sample_stats"]
    assert alone.numbers["elbo"] == pytest.approx(whole.numbers["elbo"], abs=0.01)
    medians = [float(report.numbers["khat"]["per_datum"].median()) for report in reports]
    assert medians[1] == pytest.approx(medians[0], abs=0.1)
    assert medians[1] > 0.3
    assert alone.worst == whole.worst
    assert set(alone.numbers) == set(whole.numbers) - {"draws", "predictive"}


@pytest.mark.filterwarnings("ignore:Encountered .inf:UserWarning")
def test_of_many_data_a_broken_site_has_its_name(monkeypatch):
    monkeypatch.setattr(importlib.import_module("pyro_hvae.diagnostics.diagnose"), "_GROUP_BYTES", 0)

    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("cliff", torch.where(z > 0, torch.inf, 0.0))

    (finding,) = diagnose(broken, local_guide(), torch.zeros(20)).findings
    assert finding.level == "wrong"
    assert "cliff (" in finding.what


def test_of_wide_data_the_draws_of_latents_are_compared_all_the_same(monkeypatch):
    """Replicates of 30 entries a datum are too many to keep, draws of one latent are not."""

    def wide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 30.0**0.5).expand([*z.shape, 30]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1) / 2, 1.2 * 0.5**0.5))

    x = torch.zeros(20, 30)
    monkeypatch.setattr(importlib.import_module("pyro_hvae.diagnostics.diagnose"), "_GROUP_BYTES", 2**20)
    numbers = diagnose(wide, [guide, guide], x, num_draws=2000).numbers
    assert "predictive" not in numbers
    assert numbers["draws"]["z"]["ratio"] == pytest.approx(1.2, abs=0.1)  # of the entry that is furthest off
    assert numbers["rhat"]["z"] < 1.02
