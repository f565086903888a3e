"""Intervals of log p(x) that hold with a stated probability, over many conjugate data sets (oracle 13)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_hvae import Problem, conjugate
from pyro_hvae.evidence import evidence_interval
from pyro_hvae.evidence.sides import smoothed_mean
from pyro_hvae.weights import log_mean_exp


def exact(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def simulated(count, scale):
    """Data of the conjugate model, each with an exact posterior draw, and a guide of another scale."""
    latents, problem = Problem(conjugate.model, conjugate.guide(slope=0.4, scale=scale))(torch.zeros(count)).simulate()
    return latents, problem, exact(problem.args[0])


def assert_covers(interval, log_p):
    """Each side holds for all but delta/2 of the data, and both for all but delta."""
    below, above = interval.lower <= log_p, log_p <= interval.upper
    assert below.double().mean() >= 1 - interval.delta / 2
    assert above.double().mean() >= 1 - interval.delta / 2
    assert (below & above).double().mean() >= 1 - interval.delta


@pytest.mark.parametrize("delta", [0.05, 0.01])
@pytest.mark.parametrize("scale", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("draws", [False, True], ids=["moment", "posterior draws"])
def test_coverage_of_importance_sampling(delta, scale, draws):
    """1000 data sets of one datum each."""
    latents, problem, log_p = simulated(1000, scale)
    interval = evidence_interval(problem, delta=delta, budget=600, posterior_samples=latents if draws else None)
    assert_covers(interval, log_p)
    assert interval.total.lower <= log_p.sum() <= interval.total.upper
    assert (interval.total.width < 0.1 * interval.width.sum()) | ~interval.total.upper.isfinite()


@pytest.mark.parametrize("draws", [False, True], ids=["moment", "posterior draws"])
def test_coverage_of_annealing(draws):
    """A guide so narrow that its weights have no variance: data with a high k-hat are annealed."""
    latents, problem, log_p = simulated(200, 0.25)
    samples = latents if draws else None
    interval = evidence_interval(problem, budget=20_000, posterior_samples=samples)
    assert interval.method in ("importance, annealed", "annealed")
    assert_covers(interval, log_p)
    assert interval.total.lower <= log_p.sum() <= interval.total.upper
    assert [stage.name for stage in interval.stages] == ["pilot", "importance", "annealed"]
    if draws:  # chains from one draw are a single estimate, for which log(2/delta) is paid
        assert ((interval.upper - log_p).median() > 3) & interval.upper.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.05, 0.01])
@pytest.mark.parametrize("draws", [False, True], ids=["moment", "posterior draws"])
def test_coverage_of_sums_over_1000_data_sets(delta, draws):
    """Data sets of 20 data each."""
    held = []
    for _ in range(1000):
        latents, problem, log_p = simulated(20, 0.9)
        interval = evidence_interval(
            problem, delta=delta, budget=400, posterior_samples=latents if draws else None
        ).total
        held.append(bool(interval.lower <= log_p.sum() <= interval.upper))
    assert sum(held) >= 1000 * (1 - delta)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.05, 0.01])
@pytest.mark.parametrize("draws", [False, True], ids=["moment", "posterior draws"])
def test_coverage_of_annealing_over_1000_data_sets(delta, draws):
    latents, problem, log_p = simulated(1000, 0.25)
    samples = latents if draws else None
    assert_covers(evidence_interval(problem, delta=delta, budget=20_000, posterior_samples=samples), log_p)


def test_moment_assumption_fails_where_other_sides_hold():
    """Two modes of which the guide has one: half of p(x) is missed with a perfect k-hat, and only that side fails."""

    def model(x):
        with pyro.plate("data", len(x)):
            mode = pyro.sample("mode", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(mode.abs(), 0.05), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("mode", dist.Normal(x, 0.05))

    latents, problem = Problem(model, guide)(torch.zeros(300)).simulate()
    (x,) = problem.args
    grid = torch.linspace(-6, 6, 20_001)
    log_f = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid.abs(), 0.05).log_prob(x[:, None])
    log_p = log_f.logsumexp(-1) + math.log(float(grid[1] - grid[0]))
    by_moment = evidence_interval(problem, budget=1000)
    assert (by_moment.lower <= log_p).all()
    assert (by_moment.upper >= log_p).double().mean() < 0.5
    assert by_moment.assumptions["upper"].startswith("a moment")
    by_draws = evidence_interval(problem, budget=1000, posterior_samples=latents)
    assert (by_draws.lower <= log_p).all()
    assert (by_draws.upper >= log_p).double().mean() >= 0.975
    assert by_draws.total.upper >= log_p.sum()
    assert "posterior_samples are exact" in by_draws.assumptions["upper"]


def test_many_posterior_draws_narrow_the_upper_side():
    """A latent that all data share: no plates, and 400 independent draws of its posterior."""

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x.sum() / (len(x) + 1), 0.6))

    x = torch.tensor([0.5, -0.2, 1.4])
    log_p = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    draws = {"z": x.sum() / 4 + 0.5 * torch.randn(400)}
    interval = evidence_interval(model, guide, x, budget=5000, posterior_samples=draws)
    assert interval.lower.shape == ()
    assert interval.lower <= log_p <= interval.upper
    assert interval.width < 0.1
    assert (interval.total.lower, interval.total.upper) == (interval.lower, interval.upper)
    single = evidence_interval(model, guide, x, budget=5000, posterior_samples={"z": draws["z"][0]})
    assert single.upper - log_p > 3  # log(2/delta) is the price of one draw


def test_discrete_latents_are_summed_exactly():
    @pyro.infer.config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    x = torch.tensor([0.0, 1.0, 3.0])
    modes = torch.tensor([0.0, 2.0])
    log_p = (torch.tensor([0.3, 0.7]).log() + dist.Normal(modes, 1.0).log_prob(x[:, None])).logsumexp(-1)
    interval = evidence_interval(model, None, x)
    torch.testing.assert_close(interval.lower, log_p)
    torch.testing.assert_close(interval.upper, log_p)
    torch.testing.assert_close(interval.total.upper, log_p.sum())
    assert interval.method == "enumerate"


def test_rounds_stop_at_the_tolerance_and_report_what_they_spent():
    x = torch.tensor([0.0, 2.0])
    interval = evidence_interval(conjugate.model, conjugate.guide(scale=1.0), x, tolerance=0.03)
    assert (interval.width <= 0.03).all()
    assert not interval.notes
    spent = sum(stage.evaluations for stage in interval.stages)
    assert spent < 100_000
    assert (interval.lower <= exact(x)).all()
    assert (exact(x) <= interval.upper).all()
    short = evidence_interval(conjugate.model, conjugate.guide(scale=1.0), x, tolerance=1e-3, budget=2000)
    assert "budget is spent at a largest width" in str(short)
    assert sum(stage.evaluations for stage in short.stages) <= 2000


def test_annealing_reaches_a_tolerance_that_importance_sampling_can_not():
    """A guide so narrow that its weights have no variance."""
    x = torch.tensor([0.0, 2.0])
    interval = evidence_interval(conjugate.model, conjugate.guide(scale=0.3), x, tolerance=0.3, budget=60_000)
    assert interval.stages[-1].name == "annealed"
    assert (interval.width <= 0.3).all()
    assert ((interval.lower <= exact(x)) & (exact(x) <= interval.upper)).all()


def test_estimate_is_between_and_is_no_side():
    x = torch.tensor([0.0, 2.0])
    interval = evidence_interval(conjugate.model, conjugate.guide(scale=1.0), x)
    assert ((interval.lower < interval.estimate) & (interval.estimate < interval.upper)).all()
    assert (interval.estimate - exact(x)).abs().max() < 0.02


def test_smoothed_mean_is_the_mean_of_light_tails_and_larger_than_that_of_few_heavy_ones():
    light, heavy = 0.3 * torch.randn(4000, 50), 2.0 * torch.randn(400, 400)
    torch.testing.assert_close(smoothed_mean(light), log_mean_exp(light), atol=2e-3, rtol=0.0)
    torch.testing.assert_close(smoothed_mean(torch.zeros(100, 2)), torch.zeros(2))
    assert (smoothed_mean(heavy) - 2.0).abs().mean() < (log_mean_exp(heavy) - 2.0).abs().mean()


def test_prior_draws_auto_guides_and_float32():
    x = torch.tensor([0.3, -1.2])
    prior = evidence_interval(conjugate.model, None, x)
    assert ((prior.lower <= exact(x)) & (exact(x) <= prior.upper)).all()
    guide = AutoNormal(conjugate.model)
    auto = evidence_interval(conjugate.model, guide, x.float())
    assert ((auto.lower <= exact(x)) & (exact(x) <= auto.upper)).all()
    with pytest.raises(ValueError, match=r"no site \['z_unconstrained'\], .* guide=None"):
        evidence_interval(conjugate.model, guide, x.float(), posterior_samples={"z": torch.zeros(2)})


def test_what_can_not_be_annealed_is_said():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(x.new_tensor(3.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(x.new_tensor(0.2)))

    interval = evidence_interval(model, guide, torch.tensor([4.0, 5.0]), budget=2000)
    assert interval.method == "importance"
    assert "not possible: site 'z' is discrete" in str(interval)
    assert "no upper side for" in str(evidence_interval(conjugate.model, conjugate.guide(scale=0.1), torch.zeros(20)))
    small = evidence_interval(conjugate.model, conjugate.guide(scale=0.1), torch.zeros(20), budget=1000)
    assert "it needs a budget of" in str(small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, r"lies in \(0, 1\), got 0.0"),
        ({"delta": 1.5}, r"lies in \(0, 1\), got 1.5"),
        ({"tolerance": -1.0}, "tolerance is a width in nats, above 0, got -1.0"),
        ({"budget": 10}, "at least 250, got 10"),
        ({"posterior_samples": {"y": torch.zeros(2)}}, r"no site \['z'\], which the guide draws; it has \['y'\]"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        evidence_interval(conjugate.model, conjugate.guide(), torch.zeros(2), **options)
