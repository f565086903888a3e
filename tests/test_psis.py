"""The sign, the scale and the ends of k-hat."""

import math

import pytest
import torch

from pyro_hvae.psis import good_khat, pareto_khat, psis


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
        (torch.tensor([0.0, 1, 2, 3, torch.nan]), "1 log-weights are NaN or \\+inf; the first has index \\(4,\\)"),
        (torch.full((9,), -torch.inf), "no draw with a positive weight"),
    ],
)
def test_what_cannot_be_diagnosed(log_weights, message):
    with pytest.raises(ValueError, match=message):
        psis(log_weights)


def test_the_threshold_falls_with_few_draws():
    assert good_khat(10**6) == 0.7
    assert good_khat(100) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
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
