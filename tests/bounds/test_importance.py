"""Multi-sample bounds: population values on Gaussian pairs, their order, chunks, and what they refuse.

The pair of most tests has posterior N(m, v) and evidence one, so that every weight is p(z|x)/q(z): a model that
draws z and observes nothing.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.bounds import log_spacing
from tests.programs import build, data

MEAN, VARIANCE, LOC = 0.7, 0.5, 0.4


def gaussian_pair(size, guide_variance=0.8):
    def model():
        with data(size):
            pyro.sample("z", dist.Normal(torch.tensor(MEAN), VARIANCE**0.5))

    def guide():
        with data(size):
            pyro.sample("z", dist.Normal(torch.tensor(LOC), guide_variance**0.5))

    return model, guide


def chi_square(s2=0.8):
    spread = 2 * s2 - VARIANCE
    return s2 / math.sqrt(VARIANCE * spread) * math.exp((MEAN - LOC) ** 2 / spread) - 1


def mean_and_error(values):
    return values.mean().item(), (values.std() / values.numel() ** 0.5).item()


@pytest.mark.parametrize("num_particles", [10, 40])
def test_gap_falls_as_chi_square_over_2k(num_particles):
    model, guide = gaussian_pair(100_000)
    value, error = mean_and_error(ph.IWELBO(num_particles).per_datum(model, guide))
    leading = chi_square() / (2 * num_particles)
    if num_particles == 10:
        assert round(leading, 6) == 0.008534
        assert abs(-value - 0.00897) < 4 * error + 0.0002 * 4
    assert abs(-value - leading) < 4 * error + 0.6 / num_particles**2


def test_bounds_are_ordered_at_equal_particles_only():
    """VR(.5) of 4096 particles is looser, or tighter, than IWELBO of two: they are no scale of each other."""
    model, guide = gaussian_pair(1500, 2.0)
    two, error = mean_and_error(ph.IWELBO(2).per_datum(*gaussian_pair(400_000, 2.0)))
    assert abs(two + 0.262) < 4 * error + 0.0005
    many, error = mean_and_error(ph.VRBound(0.5, 4096).per_datum(model, guide))
    assert abs(many + 0.241) < 4 * error + 0.0005
    assert many > two


def on_same_draws(bound, model, guide, *args, **kwargs):
    pyro.set_rng_seed(5)
    return bound.per_datum(model, guide, *args, **kwargs)


@pytest.mark.parametrize("name", ["chain_2", "vae", "ladder", "nested_all", "masked", "discrete_chain", "mixed"])
def test_order_on_the_same_draws(name):
    pair = build(name)
    ladder = [
        ph.VRBound(3.0, 8),
        ph.VRBound(1.001, 8),
        ph.TraceELBO(8),
        ph.VRBound(0.999, 8),
        ph.VRBound(0.5, 8),
        ph.IWELBO(8),
        ph.EUBO(8),
    ]
    values = [on_same_draws(bound, pair.model, pair.guide, *pair.args) for bound in ladder]
    for lower, higher in itertools.pairwise(values):
        assert (lower <= higher + 1e-9).all()
    importance, chi = values[5], on_same_draws(ph.CUBO(2, 8), pair.model, pair.guide, *pair.args)
    assert (importance <= chi + 1e-12).all()
    assert (values[0] < chi - 1e-3).any()
    between = on_same_draws(ph.ThermodynamicBound(8, 3), pair.model, pair.guide, *pair.args)
    finer = on_same_draws(ph.ThermodynamicBound(8, 6), pair.model, pair.guide, *pair.args)
    assert (values[2] <= between + 1e-12).all()
    assert (between <= finer + 1e-12).all()
    assert (finer <= importance + 1e-12).all()


def test_limits_of_the_families():
    pair = build("by_hand")
    importance, elbo = (on_same_draws(b, pair.model, pair.guide, *pair.args) for b in (ph.IWELBO(6), ph.TraceELBO(6)))
    for alpha in (1 - 1e-6, 1 + 1e-6):
        value = on_same_draws(ph.VRBound(alpha, 6), pair.model, pair.guide, *pair.args)
        torch.testing.assert_close(value, elbo, rtol=0, atol=1e-5)
    value = on_same_draws(ph.VRBound(0.0, 6), pair.model, pair.guide, *pair.args)
    torch.testing.assert_close(value, importance)
    # the integral over temperatures of the self-normalised mean of log w is the logarithm of the mean of w
    value = on_same_draws(ph.ThermodynamicBound(6, 4000), pair.model, pair.guide, *pair.args)
    torch.testing.assert_close(value, importance, rtol=0, atol=2e-3)
    value = on_same_draws(ph.ThermodynamicBound(6, 1), pair.model, pair.guide, *pair.args)
    torch.testing.assert_close(value, elbo)
    one = on_same_draws(ph.IWELBO(1), pair.model, pair.guide, *pair.args)
    torch.testing.assert_close(one, on_same_draws(ph.TraceELBO(1), pair.model, pair.guide, *pair.args))


@pytest.mark.parametrize("name", ["chain_5", "hvae", "global_latent", "mixed"])
def test_more_particles_are_tighter_in_expectation(name):
    pair = build(name)
    means, errors = [], []
    for num_particles in (1, 2, 4, 8, 16):
        bound = ph.IWELBO(num_particles, "pathwise", num_repeats=20)
        values = torch.stack([bound.per_datum(pair.model, pair.guide, *pair.args).sum() for _ in range(20)])
        value, error = mean_and_error(values)
        means.append(value)
        errors.append(error)
    for i in range(4):
        assert means[i] <= means[i + 1] + 4 * math.hypot(errors[i], errors[i + 1])
        assert means[i] <= pair.log_evidence.sum() + 4 * errors[i]
    assert means[0] < means[-1] - 4 * math.hypot(errors[0], errors[-1])


def test_repeats_average_independent_bounds():
    model, guide = gaussian_pair(50_000)
    one, few = (ph.IWELBO(5, num_repeats=m).per_datum(model, guide) for m in (1, 4))
    value, error = mean_and_error(one)
    again, smaller = mean_and_error(few)
    assert abs(value - again) < 4 * math.hypot(error, smaller)
    assert abs(few.var() / one.var() - 0.25) < 0.02
    all_in_one, _ = mean_and_error(ph.IWELBO(20).per_datum(model, guide))
    assert all_in_one > again + 4 * smaller


def test_betas():
    assert ph.ThermodynamicBound(4, 4).betas == (0.0, 0.25, 0.5, 0.75)
    assert ph.ThermodynamicBound(4, (0.0, 0.5, 1.0)).betas == (0.0, 0.5)
    spaced = log_spacing(5, 0.01)
    assert spaced[:2] == (0.0, 0.01)
    ratios = [b / a for a, b in zip(spaced[1:], (*spaced[2:], 1.0), strict=True)]
    assert max(ratios) - min(ratios) < 1e-12


def test_terms_say_how_far_to_trust_the_bound():
    pair = build("chain_2")
    bound = ph.IWELBO(6)
    pyro.set_rng_seed(5)
    terms = bound.terms(pair.model, pair.guide, *pair.args)
    assert set(terms) == {"bound", "reconstruction", "rate_z1", "rate_z2", "ess", "log_weight_variance"}
    assert all(term.shape == pair.log_evidence.shape and not term.requires_grad for term in terms.values())
    torch.testing.assert_close(terms["bound"], on_same_draws(bound, pair.model, pair.guide, *pair.args))
    elbo = on_same_draws(ph.TraceELBO(6), pair.model, pair.guide, *pair.args)
    torch.testing.assert_close(terms["reconstruction"] - terms["rate_z1"] - terms["rate_z2"], elbo)
    assert ((terms["ess"] >= 1) & (terms["ess"] <= 6)).all()
    exact = build("chain_exact")
    terms = bound.terms(exact.model, exact.guide, *exact.args)
    torch.testing.assert_close(terms["ess"], torch.full_like(terms["ess"], 6.0))
    assert (terms["log_weight_variance"] < 1e-20).all()


def test_effective_sample_size_and_variance_by_hand():
    model, guide = gaussian_pair(5000)
    terms = ph.IWELBO(400).terms(model, guide)
    # ESS / K tends to 1 / (1 + chi2); the variance of log w is that of a quadratic in a normal variate
    assert abs(terms["ess"].mean() / 400 - 1 / (1 + chi_square())) < 0.01
    a, b = 0.5 * (1 - 0.8 / VARIANCE), 0.8**0.5 * (MEAN - LOC) / VARIANCE
    assert abs(terms["log_weight_variance"].mean() - (2 * a**2 + b**2)) < 0.01


@pytest.mark.parametrize(
    "make", [ph.IWELBO, lambda k, **kw: ph.VRBound(0.5, k, **kw), lambda k, **kw: ph.CUBO(2, k, **kw)]
)
def test_chunks_change_memory_only(make):
    """Values in chunks have the distribution of the whole: equal at the exact posterior, close elsewhere."""
    exact = build("chain_exact")
    value = make(1000, chunk_size=7).per_datum(exact.model, exact.guide, *exact.args)
    torch.testing.assert_close(value, exact.log_evidence)
    model, guide = gaussian_pair(500)
    small, large = (make(300, chunk_size=size).per_datum(model, guide) for size in (32, 300))
    (a, da), (b, db) = mean_and_error(small), mean_and_error(large)
    assert abs(a - b) < 4 * math.hypot(da, db)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ph.IWELBO(0), "num_particles.*0"),
        (lambda: ph.IWELBO(4, num_repeats=0), "num_repeats.*0"),
        (lambda: ph.IWELBO(4, chunk_size=0), "chunk_size.*0"),
        (lambda: ph.IWELBO(4, "score"), "IWELBO has no gradient 'score'.*pathwise, stl, dreg, vimco"),
        (lambda: ph.IWELBO(4, "dreg", share_globals=True), "share_globals.*dreg"),
        (lambda: ph.VRBound(1.0, 4), "alpha = 1.*TraceELBO"),
        (lambda: ph.VRBound(-0.5, 4), "alpha.*-0.5.*CUBO"),
        (lambda: ph.VRBound(float("nan"), 4), "alpha.*nan"),
        (lambda: ph.VRBound(0.5, 4, "dreg"), "VRBound has no gradient 'dreg'.*pathwise, score"),
        (lambda: ph.ThermodynamicBound(4, (0.0, 0.6, 0.3)), "0.6.*0.3|increas"),
        (lambda: ph.ThermodynamicBound(4, (0.1, 0.3)), "0.1"),
        (lambda: ph.ThermodynamicBound(4, (0.0, 1.3)), "1.3"),
        (lambda: ph.ThermodynamicBound(4, 0), "0"),
        (lambda: ph.ThermodynamicBound(4, 2, "stl"), "ThermodynamicBound has no gradient 'stl'.*pathwise, score"),
        (lambda: log_spacing(1), "1"),
        (lambda: log_spacing(4, 1.0), "1.0"),
        (lambda: ph.CUBO(1.0, 4), "order.*1.0"),
        (lambda: ph.CUBO(2, 0), "num_particles.*0"),
        (lambda: ph.EUBO(0), "num_particles.*0"),
    ],
)
def test_refusals_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()
