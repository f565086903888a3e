"""Statistics of log-weights: k-hat and smoothing against ArviZ and against laws; means, errors, checks and chunks."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_hvae.weights.pareto as pareto
from pyro_hvae.weights import (
    check_weights,
    chunks,
    default_chunk,
    effective_sample_size,
    good_khat,
    joined,
    log_mean_exp,
    log_mean_exp_stderr,
    pareto_khat,
    psis,
)

ROWS = {  # log-weights of shape (S, R): light, medium and heavy tails, bounded weights, and a few weights of zero
    "normal, sd 0.1": lambda shape: 0.1 * torch.randn(shape),
    "normal, sd 1": torch.randn,
    "normal, sd 10": lambda shape: 10 * torch.randn(shape) - 5000,
    "normal, sd 100": lambda shape: 100 * torch.randn(shape),
    "k = 0.3": lambda shape: torch.distributions.Exponential(1 / 0.3).sample(shape),
    "k = 1.5": lambda shape: torch.distributions.Exponential(1 / 1.5).sample(shape),
    "k = -1": lambda shape: torch.rand(shape).log(),
    "k = -0.5": lambda shape: -torch.rand(shape).sqrt(),
    "zeros": lambda shape: torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -torch.inf),
}


@pytest.mark.parametrize("draws", [25, 26, 100, 225, 226, 1000, 10_000])
@pytest.mark.parametrize("kind", ROWS)
def test_fit_and_smoothing_are_those_of_arviz(kind, draws):
    log_weights = ROWS[kind]((draws, 8))
    smoothed, khat = psis(log_weights)
    expected, shape = array_stats.psislw(-log_weights.numpy(), axis=0)
    if draws < 50 and np.isnan(shape).all():
        pytest.skip("ArviZ fits no tail of so few draws from version 1 on")
    torch.testing.assert_close(khat, torch.as_tensor(shape), atol=1e-6, rtol=0)
    torch.testing.assert_close(smoothed, torch.as_tensor(expected).T, atol=1e-6, rtol=0)
    torch.testing.assert_close(pareto_khat(log_weights), khat, atol=0, rtol=0)


def test_chunks_of_rows_change_nothing(monkeypatch):
    """Rows of every kind side by side: fitted, equal, tied, without a tail."""
    log_weights = torch.randn(300, 40)
    log_weights[:, ::5] = 0.0
    log_weights[:, 1::5] = log_weights[:, 1::5].round()
    log_weights[:280, 2::10] = -torch.inf
    log_weights[:, 3::10] = log_weights[:, 3::10].clamp(max=1.0)
    whole = psis(log_weights)
    monkeypatch.setattr(pareto, "_CHUNK_BYTES", 3 * 8 * (4 * 300 + 37 * 51))
    for got, expected in zip(psis(log_weights), whole, strict=True):
        torch.testing.assert_close(got, expected)
    assert all((whole[1] == end).any() for end in (torch.inf, -torch.inf))
    assert whole[1].isfinite().sum() > 10
    for column in range(40):
        alone = psis(log_weights[:, column])
        torch.testing.assert_close(alone[0], whole[0][:, column])
        torch.testing.assert_close(alone[1], whole[1][column])


LAWS = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10**6)


@LAWS
@given(seeds, st.sampled_from([25, 60, 300]), st.floats(0.01, 20.0), st.floats(-1e4, 1e4), st.booleans())
def test_khat_depends_neither_on_the_scale_nor_on_the_order_of_weights(seed, draws, sd, constant, discrete):
    generator = torch.Generator().manual_seed(seed)
    log_weights = sd * torch.randn(draws, generator=generator, dtype=torch.float64)
    log_weights, constant = (log_weights.round(), round(constant)) if discrete else (log_weights, constant)
    order = torch.randperm(draws, generator=generator)
    smoothed, khat = psis(log_weights)
    moved, same = psis((log_weights + constant)[order])
    torch.testing.assert_close(same, khat, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moved, smoothed[order], atol=1e-6, rtol=1e-6)


@LAWS
@given(seeds, st.sampled_from([5, 25, 60, 300]), st.floats(0.0, 400.0), st.floats(0.0, 0.99), st.booleans())
def test_smoothed_weights_sum_to_one_and_keep_their_order(seed, draws, sd, zeros, discrete):
    generator = torch.Generator().manual_seed(seed)
    log_weights = sd * torch.randn(draws, generator=generator, dtype=torch.float64)
    log_weights = log_weights.round() if discrete else log_weights
    empty = torch.rand(draws, generator=generator, dtype=torch.float64) < zeros
    empty[0] = False
    log_weights = log_weights.masked_fill(empty, -torch.inf)
    smoothed, khat = psis(log_weights)
    assert not khat.isnan()
    assert abs(float(smoothed.exp().sum()) - 1) < 1e-9
    assert ((smoothed == -torch.inf) == empty).all()
    order = log_weights[~empty].argsort()
    steps = smoothed[~empty][order].diff()
    assert (steps > -1e-12).all()
    assert (steps[log_weights[~empty][order].diff() == 0].abs() < 1e-12).all()
    assert 1 <= effective_sample_size(log_weights) <= draws
    assert 1 <= effective_sample_size(smoothed) <= draws


def test_one_draw_with_all_the_weight_is_never_trusted():
    """The others' weights underflow; a fit that divides by them gave a k-hat near 0."""
    for sd in (20, 100, 1000, 1e5):
        assert (pareto_khat(sd * torch.randn(1000, 20)) > 2).all()


@pytest.mark.parametrize("mean", [0.2, 0.93])
def test_float32_keeps_the_tail_of_large_log_weights(mean):
    """At a size of 1e6 numbers are 1/16 apart, which is less than the tail spans."""
    log_weights = torch.distributions.Exponential(1 / mean).sample((1000, 200))
    rounded = (log_weights - 1e6).float()
    smoothed, khat = psis(rounded)
    assert khat.dtype == smoothed.dtype == torch.float32
    expected = pareto_khat(log_weights)
    assert abs(khat.double() - expected).mean() < 0.15
    assert abs(khat.double().mean() - expected.mean()) < 0.02
    torch.testing.assert_close(khat, pareto_khat(rounded.double()).float())


def test_round_off_of_large_float32_log_weights_is_a_light_tail():
    for level, unit in ((1e4, 2**-10), (1e6, 2**-4)):
        noise = (level + 4 * unit * torch.randn(1000, 100)).float()
        assert (pareto_khat(noise) < 0.5).all()


def test_every_dtype_is_computed_in_float64():
    log_weights = 4 * torch.randn(1000, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low = log_weights.to(dtype)
        smoothed, khat = psis(low)
        assert smoothed.dtype == khat.dtype == dtype
        expected = psis(low.double())
        torch.testing.assert_close(khat, expected[1].to(dtype))
        torch.testing.assert_close(smoothed, expected[0].to(dtype))
    with pytest.raises(TypeError, match=r"log_weights are torch\.int64"):
        psis(torch.arange(100))


def test_tensors_are_made_on_the_device_of_the_weights():
    """Where the default device is another one, a tensor made without a device would not mix with the weights."""
    log_weights = torch.randn(300, 12)
    log_weights[:, ::4] = log_weights[:, ::4].round()
    log_weights[:, 1::4] = 5 * log_weights[:, 1::4].round(decimals=1)
    expected = psis(log_weights), log_mean_exp_stderr(log_weights), effective_sample_size(log_weights)
    with torch.device("meta"):
        got = psis(log_weights), log_mean_exp_stderr(log_weights), effective_sample_size(log_weights)
    torch.testing.assert_close(got, expected)


def test_gradients_are_dropped():
    smoothed, khat = psis(torch.randn(100, requires_grad=True))
    assert not smoothed.requires_grad
    assert not khat.requires_grad


def test_shapes():
    log_weights = torch.randn(2, 60, 3)
    smoothed, khat = psis(log_weights, dim=1)
    assert (smoothed.shape, khat.shape) == ((2, 60, 3), (2, 3))
    torch.testing.assert_close(smoothed[1, :, 2], psis(log_weights[1, :, 2])[0])
    torch.testing.assert_close(khat, pareto_khat(log_weights, dim=-2))
    smoothed, khat = psis(torch.randn(60, 0))
    assert (smoothed.shape, khat.shape) == ((60, 0), (0,))


def test_exponential_log_weights_have_their_mean_as_shape():
    """If log w is exponential with mean .6, w is Pareto with shape .6; the wrong sign gives something negative."""
    log_weights = torch.distributions.Exponential(1 / 0.6).sample((4000, 25))
    khat = pareto_khat(log_weights)
    assert khat.shape == (25,)
    assert abs(khat.mean() - 0.6) < 4 * khat.std() / 5
    assert khat.std() < 1.3 * 1.6 / 190**0.5  # a fit to the M = 3 sqrt(4000) largest has a sd near (1 + k) / sqrt(M)


def test_equal_weights_are_exact():
    noise = 1e-12 * torch.randn(100, 3)
    log_weights = torch.stack([noise[:, 0], 5 + noise[:, 1], torch.randn(100)], -1)
    smoothed, khat = psis(log_weights)
    assert khat[0] == khat[1] == -torch.inf
    assert khat[2].isfinite()
    torch.testing.assert_close(smoothed.exp().sum(0), torch.ones(3))
    torch.testing.assert_close(smoothed[:, 0].exp(), torch.full((100,), 0.01))


def test_smoothing_keeps_the_bulk_and_the_order():
    log_weights = torch.distributions.Exponential(1 / 0.8).sample((500,))
    smoothed, _ = psis(log_weights)
    raw = log_weights - log_weights.logsumexp(0)
    assert (smoothed.argsort() == raw.argsort()).all()
    bulk = raw.argsort()[:300]
    gap = smoothed[bulk] - raw[bulk]
    torch.testing.assert_close(gap, gap.mean().expand(300))
    assert smoothed.max() - gap.mean() <= raw.max() + 1e-9  # no smoothed weight exceeds the largest raw one


def test_dim_is_the_draws():
    log_weights = torch.randn(50, 4)
    torch.testing.assert_close(pareto_khat(log_weights.T, dim=1), pareto_khat(log_weights))
    torch.testing.assert_close(psis(log_weights.T, dim=1)[0], psis(log_weights)[0].T)


def test_zero_weights_are_allowed():
    log_weights = torch.randn(200)
    log_weights[:50] = -torch.inf
    smoothed, khat = psis(log_weights)
    assert khat.isfinite()
    torch.testing.assert_close(smoothed.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (torch.zeros(4), "can't be fitted to 4 draw"),
        (torch.tensor([0.0, 1, 2, 3, torch.nan]), "the whole posterior has a log-weight that is NaN .*; at draw 4"),
        (torch.full((9,), -torch.inf), "no draw with a positive weight"),
    ],
)
def test_what_cannot_be_diagnosed(log_weights, message):
    with pytest.raises(ValueError, match=message):
        psis(log_weights)


def test_the_threshold_falls_with_few_draws():
    assert good_khat(10**6) == 0.7
    assert good_khat(100) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="num_draws must be at least 2, got 1"):
        good_khat(1)


@pytest.mark.parametrize("draws", [5, 21, 24])
def test_too_few_draws_to_tell_are_not_smoothed(draws):
    log_weights = torch.randn(draws, 3)
    smoothed, khat = psis(log_weights)
    assert (khat == torch.inf).all()
    torch.testing.assert_close(smoothed, log_weights.log_softmax(0))
    assert psis(torch.randn(40, 3))[1].isfinite().all()  # ArviZ's releases differ in where they begin


def test_weights_on_a_lattice():
    """Geometric draws of parameter 1/2 with weights 1.6^z: P(w > t) falls with the power log 2 / log 1.6."""
    z = torch.distributions.Geometric(0.5).sample((4000, 20))
    log_weights = z * torch.tensor(1.6).log()
    smoothed, khat = psis(log_weights)
    torch.testing.assert_close(smoothed.exp().sum(0), torch.ones(20))
    assert abs(float(khat.mean()) - math.log(1.6) / math.log(2.0)) < 0.15, khat
    two = torch.zeros(1000)
    two[:30] = 2.0
    assert pareto_khat(two) == -torch.inf  # bounded


@pytest.mark.parametrize("rare", [0.01, 0.02, 0.05])
def test_ties_are_spread_over_the_gap_below_them(rare):
    """With rare values above the common one, the tail reaches into the lowest group, which has the gap above it."""
    z = torch.distributions.Bernoulli(rare).sample((1000, 10)) * torch.distributions.Geometric(0.4).sample((1000, 10))
    log_weights = 0.3 * z + 0.1 * z**2
    for column, khat in zip(log_weights.numpy().T, pareto_khat(log_weights), strict=True):
        values, counts = np.unique(column, return_counts=True)
        gaps = np.diff(values)
        gaps = np.concatenate([gaps[:1], gaps])
        spread = [v - g * (1 - (np.arange(n) + 0.5) / n) for v, g, n in zip(values, gaps, counts, strict=True)]
        expected = -np.inf if counts[-1] >= 10 else array_stats.psislw(-np.concatenate(spread))[1]
        assert float(khat) == pytest.approx(float(expected), abs=1e-6)


def test_a_constant_tail_is_a_bound():
    log_weights = torch.randn(1000, 2).clamp(max=1.0)
    log_weights[:94] = torch.tensor([2.0, 1e5])  # the fit takes the 94 largest of 1000
    smoothed, khat = psis(log_weights)
    assert (khat == -torch.inf).all()
    torch.testing.assert_close(smoothed, log_weights.log_softmax(0))


def test_a_small_spread_has_the_shape_of_a_large_one():
    """w = 1 + s u has excesses s (u - cutoff), whose shape does not depend on s."""
    u = torch.distributions.Exponential(1.0).sample((1000, 20))
    torch.testing.assert_close(pareto_khat((1e-7 * u).log1p()), pareto_khat((0.1 * u).log1p()), atol=1e-10, rtol=0)


def test_most_weights_zero():
    log_weights = torch.full((1000,), -torch.inf)
    log_weights[:50] = torch.distributions.Exponential(1 / 0.9).sample((50,))
    assert pareto_khat(log_weights).isfinite()
    log_weights[3:] = -torch.inf
    assert pareto_khat(log_weights) == torch.inf


def test_weights_that_vanish_beside_the_largest():
    assert pareto_khat(-1000.0 * torch.arange(100.0)) == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, -1.5, -800.0])
def test_round_off_is_no_tail_in_either_precision(dtype, level):
    """An exact guide's log-weights are sums of terms that cancel but for a few units of the last place."""
    noise = torch.randn(400, dtype=dtype) * torch.finfo(dtype).eps * max(1.0, abs(level)) * 4
    assert pareto_khat(level + noise) == -torch.inf
    spread = torch.distributions.Exponential(torch.tensor(1 / 0.6, dtype=dtype)).sample((4000,))
    assert 0.25 < pareto_khat(level + spread) < 0.95


def test_mean_of_gaussian_weights():
    """log w ~ N(-s^2/2, s^2) has E w = 1, and the mean of S weights a variance of (exp(s^2) - 1) / S."""
    sd, draws = 0.5, 4000
    log_weights = sd * torch.randn(draws, 500) - sd**2 / 2
    value, stderr = log_mean_exp(log_weights), log_mean_exp_stderr(log_weights)
    exact = (math.expm1(sd**2) / draws) ** 0.5
    assert abs(float(value.mean())) < 4 * exact / 500**0.5
    assert float(value.std()) == pytest.approx(exact, rel=4 / 1000**0.5)
    torch.testing.assert_close(stderr, torch.full((500,), exact), rtol=0.15, atol=0)
    assert float(effective_sample_size(log_weights).mean()) == pytest.approx(draws * math.exp(-(sd**2)), rel=0.01)


@pytest.mark.parametrize("shift", [0.0, -1e5, 1e5])
def test_means_against_numpy_at_any_size(shift):
    weights = np.random.default_rng(0).gamma(0.7, size=(3, 40))
    weights[:, 0] = 0.0
    log_weights = torch.as_tensor(weights).log() + shift
    torch.testing.assert_close(log_mean_exp(log_weights, 1) - shift, torch.as_tensor(np.log(weights.mean(1))))
    stderr = weights.std(1, ddof=1) / weights.mean(1) / 40**0.5
    torch.testing.assert_close(log_mean_exp_stderr(log_weights, 1), torch.as_tensor(stderr))
    ess = weights.sum(1) ** 2 / (weights**2).sum(1)
    torch.testing.assert_close(effective_sample_size(log_weights, 1), torch.as_tensor(ess))


def test_means_of_large_float32_log_weights():
    log_weights = torch.randint(0, 5, (50, 3)).float()
    for function in (effective_sample_size, log_mean_exp_stderr):
        torch.testing.assert_close(function(log_weights - 1e6), function(log_weights))


def test_the_error_of_nearly_equal_weights_is_not_round_off():
    log_weights = torch.tensor([0.0, 1e-9, 2e-9, 3e-9])
    torch.testing.assert_close(log_mean_exp_stderr(log_weights), log_weights.std() / 2, rtol=1e-6, atol=0)
    assert log_mean_exp_stderr(torch.full((7,), -3.2)) < 1e-15


def test_log_mean_exp_has_normalised_weights_as_gradient():
    log_weights = torch.randn(5, 2, requires_grad=True)
    log_mean_exp(log_weights).sum().backward()
    torch.testing.assert_close(log_weights.grad, log_weights.softmax(0))


def test_counts_that_are_too_small():
    for function, least in ((log_mean_exp, 1), (effective_sample_size, 1), (log_mean_exp_stderr, 2)):
        with pytest.raises(ValueError, match=rf"have {least - 1} draw\(s\) along dim 0; at least {least} are"):
            function(torch.zeros(least - 1, 3))
    with pytest.raises(ValueError, match=r"shape \(\) have 0 draw"):
        log_mean_exp(torch.tensor(0.0))


def test_weights_are_checked():
    log_weights = torch.randn(6, 2, 3)
    log_weights[2, 1, 2] = -torch.inf
    check_weights(log_weights)
    log_weights[:, 1, 0] = -torch.inf
    with pytest.raises(ValueError, match=r"1 of 6 data have no draw with a positive weight .*; .* index \(1, 0\)$"):
        check_weights(log_weights)
    for wrong in (torch.nan, torch.inf):
        log_weights[4, 0, 1] = wrong
        with pytest.raises(ValueError, match=r"1 of 6 data have a log-weight that is NaN or \+inf .* index \(0, 1\)"):
            check_weights(log_weights)
        with pytest.raises(ValueError, match=r"index \(1, 0\), at draw 4"):
            check_weights(log_weights.transpose(1, 2).movedim(0, 1), dim=1)


def test_chunks():
    assert [chunks(10), chunks(10, 10), chunks(10, 11)] == [[10], [10], [10]]
    assert chunks(10, 4) == [4, 4, 2]
    for size in range(1, 30):
        counts = chunks(29, size)
        assert (sum(counts), len(counts)) == (29, -(-29 // size))
        assert max(counts) <= size
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        chunks(10, 0)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        chunks(0, 3)


def test_default_chunk():
    for entries in (1, 7, 360, 20_000):
        size = default_chunk(entries)
        assert size * entries <= 20_000 < (size + 1) * entries
    assert default_chunk(0) == 20_000
    assert default_chunk(10**6) == 1


@pytest.mark.parametrize("statistic", [effective_sample_size, log_mean_exp_stderr])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_no_log_weights_are_refused(statistic, bad):
    """They gave NaN, which a comparison with a limit takes for bad and for good alike."""
    weights = torch.zeros(5, 3)
    weights[4, 1] = bad
    with pytest.raises(ValueError, match=r"1 of 15 log-weights are NaN or \+inf; the first has index \(4, 1\)"):
        statistic(weights)
    weights[4, 1] = -torch.inf
    assert statistic(weights).isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_blocks_of_data_change_nothing(monkeypatch, dim):
    weights = torch.randn(7, 30, 5)
    statistics = log_mean_exp, log_mean_exp_stderr, effective_sample_size
    whole = [statistic(weights, dim) for statistic in statistics]
    monkeypatch.setattr("pyro_hvae.weights.means._BLOCK", 40)
    for statistic, expected in zip(statistics, whole, strict=True):
        torch.testing.assert_close(statistic(weights, dim), expected)


def test_chunks_are_joined_in_their_order():
    whole = torch.randn(10, 3)
    assert torch.equal(joined(iter(whole.split(4)), 10), whole)
    assert torch.equal(joined([whole], 10), whole)
