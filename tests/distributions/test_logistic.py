"""Discretised logistic: a law of total probability, the textbook difference of sigmoids, and safe tails."""

import math

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_hvae.distributions import DiscretizedLogistic, DiscretizedLogisticMixture, Levels

locs = st.floats(-3.0, 4.0)
log_scales = st.floats(-8.0, 4.0)


@given(locs, log_scales, st.integers(2, 300), st.floats(-2.0, 0.5), st.floats(0.1, 5.0))
def test_masses_sum_to_one(loc, log_scale, num_bins, low, span):
    p = DiscretizedLogistic(loc, log_scale, num_bins, low, low + span)
    total = p.log_prob(p.enumerate_support()).logsumexp(0)
    assert abs(float(total)) < 1e-11


@given(st.lists(st.tuples(st.floats(-4, 4), locs, log_scales), min_size=1, max_size=4))
def test_mixture_masses_sum_to_one(components):
    logits, loc, log_scale = (torch.tensor(values) for values in zip(*components, strict=True))
    p = DiscretizedLogisticMixture(logits, loc, log_scale)
    total = p.log_prob(p.enumerate_support()).logsumexp(0)
    assert abs(float(total)) < 1e-11


def test_256_levels_sum_to_one_in_float32():
    p = DiscretizedLogistic(torch.linspace(-1, 2, 7, dtype=torch.float32), torch.tensor(-3.0, dtype=torch.float32))
    total = p.log_prob(p.enumerate_support()).double().logsumexp(0)
    assert p.log_prob(p.enumerate_support()).dtype == torch.float32
    assert float(total.abs().max()) < 2e-6


def test_masses_are_differences_of_the_logistic_cdf():
    loc, scale, step = 0.3, 0.07, 1 / 255
    index = torch.arange(256.0)
    upper = torch.sigmoid(((index + 0.5) * step - loc) / scale)
    lower = torch.sigmoid(((index - 0.5) * step - loc) / scale)
    upper[-1], lower[0] = 1.0, 0.0
    p = DiscretizedLogistic(loc, math.log(scale))
    torch.testing.assert_close(p.log_prob(index * step).exp(), upper - lower, rtol=1e-10, atol=0)
    torch.testing.assert_close(p.cdf(index * step), upper, rtol=1e-12, atol=0)


@pytest.mark.parametrize("log_scale", [-40.0, -30.0, -12.0, -5.0, 0.0, 12.0, 30.0, 40.0])
@pytest.mark.parametrize("loc", [-1e4, -3.0, 0.0, 0.5, 1.0, 3.0, 1e4])
def test_float32_tails_are_finite_with_finite_gradients(loc, log_scale):
    mean = torch.tensor(loc, dtype=torch.float32, requires_grad=True)
    log_s = torch.tensor(log_scale, dtype=torch.float32, requires_grad=True)
    p = DiscretizedLogistic(mean, log_s)
    log_prob = p.log_prob(p.enumerate_support())
    assert torch.isfinite(log_prob).all()
    assert (log_prob <= 0).all()
    gradients = torch.autograd.grad(log_prob.sum(), (mean, log_s))
    assert all(torch.isfinite(g) for g in gradients)


def test_far_tail_keeps_the_slope_of_the_logistic():
    """600 scales away the log mass is -(distance)/s + log(1 - e^{-step/s}) + step/(2s), where float32 masses are 0."""
    scale, loc = 0.001, 0.0
    p = DiscretizedLogistic(torch.tensor(loc, dtype=torch.float32), torch.tensor(math.log(scale), dtype=torch.float32))
    x, step = 153 / 255, 1 / 255
    expected = -(x - loc) / scale + math.log1p(-math.exp(-step / scale)) + step / 2 / scale
    assert float(p.log_prob(torch.tensor(x, dtype=torch.float32))) == pytest.approx(expected, rel=1e-5)


@given(locs, st.floats(-4.0, 1.0), st.integers(2, 40))
def test_moments_are_those_of_the_masses(loc, log_scale, num_bins):
    p = DiscretizedLogistic(loc, log_scale, num_bins, -1.0, 1.0)
    levels = p.enumerate_support()
    mass = p.log_prob(levels).exp()
    mean = (mass * levels).sum()
    assert float(p.mean) == pytest.approx(float(mean), abs=1e-12)
    assert float(p.variance) == pytest.approx(float((mass * (levels - mean) ** 2).sum()), abs=1e-11)


def test_samples_follow_the_masses():
    n = 200_000
    p = DiscretizedLogistic(0.6, -1.5, 9)
    counts = torch.bincount((p.sample((n,)) * 8).round().long(), minlength=9) / n
    mass = p.log_prob(p.enumerate_support()).exp()
    assert ((counts - mass).abs() < 4.5 * (mass * (1 - mass) / n).sqrt()).all()


def test_mixture_samples_and_moments_follow_the_masses():
    n = 200_000
    p = DiscretizedLogisticMixture(torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.8]), torch.tensor([-3.0, -2.0]), 9)
    levels = p.enumerate_support()
    mass = p.log_prob(levels).exp()
    counts = torch.bincount((p.sample((n,)) * 8).round().long(), minlength=9) / n
    assert ((counts - mass).abs() < 4.5 * (mass * (1 - mass) / n).sqrt()).all()
    mean = (mass * levels).sum()
    assert float(p.mean) == pytest.approx(float(mean), abs=1e-12)
    assert float(p.variance) == pytest.approx(float((mass * (levels - mean) ** 2).sum()), abs=1e-12)


def test_one_component_mixture_is_the_component():
    loc, log_scale = torch.randn(4, 3), torch.randn(4, 3)
    single = DiscretizedLogistic(loc, log_scale)
    mixture = DiscretizedLogisticMixture(torch.zeros(4, 3, 1), loc.unsqueeze(-1), log_scale.unsqueeze(-1))
    x = single.sample()
    torch.testing.assert_close(mixture.log_prob(x), single.log_prob(x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    loc = torch.tensor([0.2, 0.9, -0.3], requires_grad=True)
    log_scale = torch.tensor([-3.0, 0.5, -1.0], requires_grad=True)
    x = torch.tensor([0.0, 128 / 255, 1.0])
    assert torch.autograd.gradcheck(lambda m, s: DiscretizedLogistic(m, s).log_prob(x), (loc, log_scale))


def test_shapes_and_expand():
    p = DiscretizedLogistic(torch.zeros(3, 1), torch.zeros(4))
    assert p.batch_shape == (3, 4)
    assert p.sample((2,)).shape == (2, 3, 4)
    wide = p.expand((5, 3, 4))
    assert wide.batch_shape == (5, 3, 4)
    assert wide.log_prob(p.sample()).shape == (5, 3, 4)
    assert wide.to_event(2).event_shape == (3, 4)
    assert p.enumerate_support(expand=False).shape == (256, 1, 1)
    m = DiscretizedLogisticMixture(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)).expand((7, 3))
    assert m.sample((2,)).shape == (2, 7, 3)
    assert m.log_prob(m.sample()).shape == (7, 3)


def test_is_a_pyro_site():
    def model(x=None):
        with pyro.plate("data", 5):
            return pyro.sample("x", DiscretizedLogistic(torch.zeros(5, 3), torch.zeros(3)).to_event(1), obs=x)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (5,)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="num_bins must be >= 2, got 1"):
        DiscretizedLogistic(0.0, 0.0, 1)
    with pytest.raises(ValueError, match="high must be greater than low, got low=1"):
        DiscretizedLogistic(0.0, 0.0, 8, 1.0, 1.0)
    with pytest.raises(ValueError, match="support"):
        DiscretizedLogistic(0.0, 0.0, 8, validate_args=True).log_prob(torch.tensor(0.4))
    with pytest.raises(ValueError, match="need a last dim"):
        DiscretizedLogisticMixture(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0))


def test_eight_bit_data_is_in_the_support():
    x = torch.arange(256, dtype=torch.float32) / 255
    assert Levels(256, 0.0, 1.0).check(x).all()
    assert not Levels(256, 0.0, 1.0).check(torch.tensor([-0.004, 1.004, 0.002, float("nan")])).any()
