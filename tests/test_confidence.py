"""Bounds of log Z with a stated probability, on Gaussian weights whose Z is one (oracle 13): coverage and widths."""

import math

import pytest
import torch
from torch.distributions import Normal

from pyro_hvae.weights import log_mean_exp
from pyro_hvae.weights.confidence import markov_lower, median_lower, product_lower, relative_variance, variance_upper

SETS = 1000
LOWER = {"markov": markov_lower, "median": median_lower, "product": product_lower}
VARIANCES = (0.3, 0.6, 1.0, 2.0)
"""Of the guide N(0.4, .); weights have a finite variance above .25."""


def normal(mean, variance):
    return Normal(torch.tensor(mean), variance**0.5)


def weights(variance, *shape, posterior=False):
    """Log-weights whose mean weight is 1; those of posterior draws inverted."""
    p, q = normal(0.7, 0.5), normal(0.4, variance)
    z = (p if posterior else q).sample(shape)
    ratio = p.log_prob(z) - q.log_prob(z)
    return -ratio if posterior else ratio


def exact_variance(variance):
    """Oracle 3: 1 + chi2 = s2 / sqrt(v (2 s2 - v)) exp((m - m')^2 / (2 s2 - v))."""
    v = 0.5
    return variance / math.sqrt(v * (2 * variance - v)) * math.exp(0.09 / (2 * variance - v)) - 1


def missed(held, delta):
    """Whether bounds of many sets hold too seldom: by three standard errors below 1 - delta."""
    share = held.double().mean()
    return share < 1 - delta - 3 * math.sqrt(delta * (1 - delta) / held.numel())


@pytest.mark.parametrize("delta", [0.05, 0.01])
@pytest.mark.parametrize("method", LOWER)
@pytest.mark.parametrize("posterior", [False, True], ids=["below", "above"])
def test_sides_without_assumption_hold(method, delta, posterior):
    """By draws of the guide from below, by exact posterior draws from above; never below 1 - delta."""
    for variance in VARIANCES:
        held = LOWER[method](weights(variance, 200, SETS, posterior=posterior), delta) <= 0
        assert held.double().mean() >= 1 - delta


@pytest.mark.parametrize("delta", [0.05, 0.01])
@pytest.mark.parametrize("method", LOWER)
def test_sums_without_assumption_hold(method, delta):
    for variance in (0.3, 1.0):
        bound = LOWER[method](weights(variance, 100, SETS, 20), delta, sum_dims=1)
        assert bound.shape == (SETS,)
        assert (bound <= 0).double().mean() >= 1 - delta


@pytest.mark.parametrize("method", LOWER)
def test_one_draw_is_enough_for_a_bound(method):
    """From a single draw of the exact posterior: Markov's inequality."""
    draws = weights(1.0, 1, 20_000, posterior=True)
    torch.testing.assert_close(LOWER[method](draws, 0.05), draws[0] + math.log(0.05))
    assert (LOWER[method](draws, 0.05) > 0).double().mean() < 0.05


def test_delta_of_markov_is_attained():
    """A weight of 1/delta with probability delta, else 0: no bound can be larger by a factor."""
    hits = torch.rand(1, 20_000) < 0.05
    draws = torch.where(hits, math.log(20) + 1e-9, -math.inf)[:, hits[0]]
    assert (markov_lower(draws, 0.05) > 0).all()  # a 20th of all sets
    assert (product_lower(draws, 0.05) > 0).all()
    assert (median_lower(draws, 0.05) > 0).all()


@pytest.mark.parametrize("delta", [0.05, 0.01])
def test_upper_side_holds_with_the_variance_of_the_weights(delta):
    for variance in VARIANCES:
        draws = weights(variance, 200, SETS)
        spread = torch.tensor(exact_variance(variance))
        bound = variance_upper(log_mean_exp(draws), spread.expand(SETS), 200, delta)
        assert not missed(bound >= 0, delta)
        rows = log_mean_exp(draws).reshape(50, 20)
        assert not missed(variance_upper(rows, spread.expand(50, 20), 200, delta, sum_dims=1) >= 0, delta)


def test_upper_side_is_infinite_with_too_few_draws():
    assert variance_upper(torch.tensor(0.0), torch.tensor(10.0), 10, 0.05) == math.inf
    assert variance_upper(torch.zeros(3), torch.tensor([0.1, 1000.0, 0.1]), 100, 0.05, sum_dims=1) == math.inf


def test_variance_assumption_can_fail_where_the_other_sides_hold():
    """A guide of a tenth of the posterior's variance: the weights have no variance, and that of draws is too small."""
    below, above = weights(0.05, 200, SETS), weights(0.05, 200, SETS, posterior=True)
    bound = variance_upper(log_mean_exp(below), 2 * relative_variance(below), 200, 0.05)
    assert (bound >= 0).double().mean() < 0.9
    for method in LOWER.values():
        assert (method(below, 0.05) <= 0).double().mean() >= 0.95
        assert (method(above, 0.05) <= 0).double().mean() >= 0.95


def test_widths():
    """Within a factor of 4 of the error of the mean for the product; Markov's log(1/delta) does not shrink."""
    draws = weights(1.0, 10_000, 200)
    error = math.sqrt(exact_variance(1.0) / 10_000)
    assert -product_lower(draws, 0.05).mean() < 4 * error
    assert -markov_lower(draws, 0.05).mean() > 2.9
    assert -median_lower(draws, 0.05).mean() < 1.2
    upper = variance_upper(log_mean_exp(draws), relative_variance(draws), 10_000, 0.05)
    assert upper.mean() < 3 * error


def test_sum_is_narrower_than_the_sum_of_bounds():
    draws = weights(1.0, 200, 1000)
    variance = relative_variance(draws)
    assert -product_lower(draws, 0.05, sum_dims=1) < -0.1 * product_lower(draws, 0.05).sum()
    upper = variance_upper(log_mean_exp(draws), variance, 200, 0.05)
    total = variance_upper(log_mean_exp(draws), variance, 200, 0.05, sum_dims=1)
    assert 0 < total < 0.1 * upper.sum()


def test_equal_weights_leave_the_price_of_markov_alone():
    """All weights are Z, as with the exact posterior: log(2/delta)/G below, and almost nothing above."""
    draws = torch.full((1000, 3), -7.0)
    lower = product_lower(draws, 0.05)
    assert ((lower < -7.0) & (lower > -7.0 - 0.006)).all()
    upper = variance_upper(log_mean_exp(draws), relative_variance(draws), 1000, 0.05)
    assert ((upper >= -7.0) & (upper < -7.0 + 1e-3)).all()


def test_float32_and_zero_weights():
    draws = weights(1.0, 400, 5).float()
    draws[::2] = -math.inf  # half of the draws have no weight: Z is 1/2
    for method in LOWER.values():
        bound = method(draws, 0.05)
        assert bound.dtype == torch.float64
        assert (bound <= math.log(0.5) + 0.3).all()
        assert bound.isfinite().all()


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_delta_is_a_probability(delta):
    for method in LOWER.values():
        with pytest.raises(ValueError, match=r"delta .* lies in \(0, 1\), got"):
            method(torch.zeros(10), delta)
    with pytest.raises(ValueError, match="delta"):
        variance_upper(torch.zeros(()), torch.zeros(()), 10, delta)


def test_what_bounds_nothing():
    with pytest.raises(ValueError, match="no draws"):
        product_lower(torch.zeros(0, 3), 0.05)
    with pytest.raises(ValueError, match="NaN"):
        product_lower(torch.tensor([0.0, math.nan]), 0.05)
    with pytest.raises(ValueError, match="odd number of groups, got 4"):
        median_lower(torch.zeros(10), 0.05, num_groups=4)


@pytest.mark.parametrize("num_draws", [10, 100, 1000])
@pytest.mark.parametrize("delta", [0.05, 0.01])
def test_coverage_over_more_guides_and_numbers_of_draws(num_draws, delta):
    for variance in (0.1, *VARIANCES, 4.0):
        for posterior in (False, True):
            draws = weights(variance, num_draws, SETS, posterior=posterior)
            for method in LOWER.values():
                assert (method(draws, delta) <= 0).double().mean() >= 1 - delta
                sums = draws.reshape(num_draws, 50, 20)
                assert (method(sums, delta, sum_dims=1) <= 0).double().mean() >= 1 - delta
