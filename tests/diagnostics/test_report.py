"""The report says what is wrong, the worst first, and is silent where nothing is."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import pyro_hvae as ph
from pyro_hvae.diagnostics import LEVELS, Report, khats, layers
from tests.linear_gaussian import linear_gaussian


def whats(report, level=None):
    return [finding.what for finding in report.findings if level is None or finding.level == level]


def test_an_exact_guide_has_nothing_wrong():
    case = linear_gaussian(2)
    report = ph.diagnose(case.model, case.exact, case.x.repeat(20, 1), calibration=True, num_draws=300)
    assert report.worst in ("note", "good"), str(report)
    assert any("0 of 100 above" in what and "exact" in what for what in whats(report, "good"))
    assert any(what.startswith("calibration: ranks") for what in whats(report, "good"))


def test_a_narrow_guide_is_wrong_in_words():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.25))

    report = ph.diagnose(model, narrow, torch.randn(60), calibration=True, evidence={"num_chains": 8, "betas": 30})
    assert report.worst == "wrong"
    assert report.findings[0].what.startswith("the draws once weighted: k-hat of each datum")
    assert "posterior_gap" in report.findings[0].advice
    assert "z draws too narrow" in next(what for what in whats(report) if what.startswith("calibration"))
    bracket = next(finding for finding in report.findings if finding.what.startswith("log p(x) between"))
    kl = 0.5 * (0.25**2 / 0.5 - 1 - torch.tensor(0.25**2 / 0.5).log())
    assert 0.1 < float(bracket.meaning.split("least ")[1].split(" nats")[0]) < float(kl) + 0.05
    levels = [LEVELS.index(finding.level) for finding in report.findings]
    assert levels == sorted(levels)


def test_collapsed_layers_are_named():
    model, guide = ph.hvae(12, (4, 2), hidden=(8,))
    with torch.no_grad():
        for parameter in guide.z1.parameters():  # the guide does not look at x
            parameter.zero_()
    report = ph.diagnose(model, guide, torch.bernoulli(torch.full((40, 12), 0.4)), num_draws=200)
    assert any(what.startswith("collapsed layers: z1, z2") for what in whats(report, "doubtful"))
    assert list(report.table().index) == ["z1", "z2"]


def test_nan_and_impossible_values_are_named_by_site():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("limit", torch.where(z > 1, -torch.inf, 0.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    report = ph.diagnose(model, guide, torch.zeros(30))
    assert report.worst == "wrong"
    assert report.findings[0].what.startswith("densities that are no finite number: limit (")
    assert len(report.findings) == 1


def test_restarts_that_disagree():
    def model(y):
        pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=y)

    def at(loc):
        return lambda y: pyro.sample("m", dist.Normal(loc, 1.0))

    y = torch.tensor(0.3)
    apart = ph.diagnose(model, [at(-3.0), at(3.0)], y)
    assert apart.worst == "wrong"
    assert any(what.startswith("R-hat across restarts: m") for what in whats(apart, "wrong"))
    together = ph.diagnose(model, [at(0.0), at(0.0)], y)
    assert any("R-hat across restarts below" in what for what in whats(together, "good"))
    assert together.numbers["rhat"]["m"] < 1.01


def test_a_users_regression():
    """A plain program with an AutoGuide: correlated coefficients are missed by the factorised one."""
    covariates = torch.randn(40, 1) + 0.15 * torch.randn(40, 2)
    y = covariates.sum(1) + 0.5 * torch.randn(40)

    def model(covariates, y):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((weights * covariates).sum(-1), 0.5), obs=y)

    def trained(guide, steps=1500):
        optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.05 ** (1 / steps)})
        svi = pyro.infer.SVI(model, guide, optimizer, ph.TraceELBO(8))
        for _ in range(steps):
            svi.step(covariates, y)
        return guide

    factorised = ph.diagnose(model, trained(AutoNormal(model)), covariates, y)
    pyro.clear_param_store()
    full = ph.diagnose(model, trained(AutoMultivariateNormal(model, init_scale=0.3), steps=4000), covariates, y)
    khat = [float(report.numbers["khat"]["joint"]) for report in (factorised, full)]
    assert khat[1] < khat[0]
    assert full.worst in ("good", "note"), str(full)


def test_forms_of_the_report():
    case = linear_gaussian(1)
    report = ph.diagnose(case.model, case.other, case.x.repeat(6, 1), num_draws=100)
    assert isinstance(report, Report)
    found = json.loads(report.to_json())
    assert found["findings"][0]["level"] in LEVELS
    assert len(found["numbers"]["khat"]["per_datum"]) == 30
    page = report._repr_html_()
    assert page.startswith("<table>")
    assert "&lt;" not in str(report)
    assert "layers" in str(report)
    with pytest.raises(ValueError, match="num_draws must be at least 100"):
        ph.diagnose(case.model, case.other, case.x, num_draws=10)


def test_a_point_estimate_is_no_posterior():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.zeros(3)
    report = ph.diagnose(model, AutoDelta(model), y)
    assert report.worst == "wrong"
    assert whats(report) == ["a point estimate: the guide puts all its mass at one value of mean"]
    with pytest.raises(ValueError, match="point estimate"):
        khats(model, AutoDelta(model), y)


def test_rare_draws_that_are_impossible():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("limit", torch.where(z > 3.2, torch.nan, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pyro.validation_enabled(False):
        report = ph.diagnose(model, guide, torch.zeros(2), num_draws=5000)
    assert report.worst == "wrong"
    assert "that are no finite number" in report.findings[0].what


def test_one_datum_has_no_layers_that_vary():
    case = linear_gaussian(1)
    report = ph.diagnose(case.model, case.exact, case.x[:1], num_draws=100)
    assert report.worst == "good", str(report)
    with pytest.raises(ValueError, match="there is one datum"):
        layers(case.model, case.exact, case.x[:1])


def test_the_bracket_of_an_auto_guide_is_in_nats_of_all_data():
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(())))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    guide = AutoNormal(model, init_scale=0.4)
    report = ph.diagnose(model, guide, torch.tensor([0.5, -1.0, 0.8]), evidence={"num_chains": 8, "betas": 20})
    (bracket,) = [finding for finding in report.findings if finding.what.startswith("log p(x) between")]
    assert "nats (estimate above)" in bracket.what
    with pytest.raises(ValueError, match="empty list"):
        ph.diagnose(model, [], torch.zeros(3))
    with pytest.raises(ValueError, match=r"2 models and 1 guide"):
        ph.diagnose([model, model], guide, torch.zeros(3))
    alone = ph.diagnose(model, [guide], torch.tensor([0.5, -1.0, 0.8]))
    assert not any("restarts" in what for what in whats(alone))


def test_a_sampler_is_judged_otherwise():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    sampler = pyro.infer.MCMC(pyro.infer.NUTS(model), num_samples=10, disable_progbar=True)
    with pytest.raises(ValueError, match="guide is a sampler"):
        ph.diagnose(model, sampler)
