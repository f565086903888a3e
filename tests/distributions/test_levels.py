"""Grey levels: the support holds them and nothing between, and the Gaussian confined to them is its definition."""

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_hvae.distributions import BinnedGaussian, DiscretizedLogistic, DiscretizedLogisticMixture, Levels

LIKELIHOODS = {
    "logistic": lambda low, high: DiscretizedLogistic(torch.zeros(6), -1.0, 256, low, high),
    "mixture": lambda low, high: DiscretizedLogisticMixture(*torch.zeros(3, 6, 2), 256, low, high),
    "gaussian": lambda low, high: BinnedGaussian(torch.zeros(6), 0.3, 256, low, high),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ends", [(2, 0.0, 1.0), (256, 0.0, 1.0), (256, -1.0, 1.0), (17, 3.0, 11.0)])
def test_levels_computed_in_any_order_are_levels(ends, dtype):
    num_bins, low, high = ends
    k = torch.arange(num_bins, dtype=dtype)
    levels = Levels(num_bins, low, high)
    assert levels.check(low + k * ((high - low) / (num_bins - 1))).all()
    assert levels.check(low + k / (num_bins - 1) * (high - low)).all()
    assert levels.check(torch.linspace(low, high, num_bins, dtype=dtype)).all()


@given(st.floats(0.001, 0.999), st.integers(0, 254))
def test_nothing_between_two_levels_is_a_level(share, k):
    for dtype in (torch.float32, torch.float64):
        assert not Levels(256, 0.0, 1.0).check(torch.tensor((k + share) / 255, dtype=dtype))


def test_integers_are_levels_of_integers():
    assert Levels(256, 0.0, 255.0).check(torch.arange(256, dtype=torch.uint8)).all()
    assert not Levels(3, 0.0, 1.0).check(torch.tensor([2, -1])).any()


def test_wrong_ranges_are_off_the_levels():
    """Data in [0, 1] where [-1, 1] was said, steps of 1/256 for 1/255, and pixels with uniform noise."""
    k = torch.arange(256.0)
    levels = Levels(256, -1.0, 1.0)
    assert torch.equal(levels.check(k / 255), k % 2 == 1)  # every second one is: black, 0, is not
    assert not Levels(256, 0.0, 1.0).check(k[1:] / 256).any()
    assert not levels.check((k[:-1] + torch.rand(255).clamp(0.01, 0.99)) / 127.5 - 1).any()
    assert not levels.check(torch.tensor([-1.01, 1.01, torch.nan, torch.inf])).any()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_refuse_data_between_the_levels(name):
    p = LIKELIHOODS[name](-1.0, 1.0)
    assert p.support.check(p.sample((100,))).all()
    x = torch.rand(4, 6)
    assert not p.support.check(x).any()

    def model(x):
        with pyro.plate("data", 4):
            pyro.sample("x", p.to_event(1), obs=x)

    with pytest.raises(ValueError, match="support"):
        pyro.poutine.trace(model).get_trace(x).compute_log_prob()
    with pytest.raises(ValueError, match="support"):
        p.expand((4, 6)).log_prob(x)


class TestBinnedGaussian:
    def test_is_the_softmax_of_the_density(self):
        loc, scale = torch.randn(3, 1), torch.rand(5) + 0.1
        p = BinnedGaussian(loc, scale, 9, -1.0, 1.0)
        levels = p.enumerate_support(expand=False)
        density = torch.distributions.Normal(loc, scale).log_prob(levels)
        assert p.batch_shape == (3, 5)
        assert levels.shape == (9, 1, 1)
        assert p.enumerate_support().shape == (9, 3, 5)
        torch.testing.assert_close(p.log_prob(levels), density - density.logsumexp(0))

    def test_moments_and_draws_follow_the_masses(self):
        p = BinnedGaussian(torch.tensor([0.2, -1.5]), torch.tensor([0.4, 0.7]), 5)
        levels, masses = p.enumerate_support(), p.log_prob(p.enumerate_support()).exp()
        torch.testing.assert_close(p.mean, (masses * levels).sum(0))
        torch.testing.assert_close(p.variance, (masses * (levels - p.mean) ** 2).sum(0))
        drawn = p.sample((40_000,))
        torch.testing.assert_close((drawn == levels[:, None]).double().mean(1), masses, rtol=0, atol=0.01)

    def test_gradient(self):
        loc, scale = torch.tensor([0.2, 0.9], requires_grad=True), torch.tensor([0.1, 2.0], requires_grad=True)
        x = torch.tensor([-1.0, 0.5])
        assert torch.autograd.gradcheck(lambda m, s: BinnedGaussian(m, s, 5).log_prob(x), (loc, scale))

    def test_refuses(self):
        with pytest.raises(ValueError, match="num_bins must be >= 2, got 1"):
            BinnedGaussian(0.0, 1.0, 1)
        with pytest.raises(ValueError, match=r"num_bins must be >= 2, got 2\.5: give an integer"):
            BinnedGaussian(0.0, 1.0, 2.5)
        with pytest.raises(ValueError, match=r"high must be greater than low, got low=-1\.0, high=nan"):
            BinnedGaussian(0.0, 1.0, 8, high=float("nan"))
        with pytest.raises(ValueError, match="scale"):
            BinnedGaussian(0.0, torch.tensor(-1.0), 8, validate_args=True)


def test_variance_of_a_narrow_distribution_in_float32():
    """Two levels near the top of the range: the difference of E x^2 and (E x)^2 has no digit left in float32."""
    step, k = 1 / 255, 250
    loc, log_scale = (k + 0.5) * step, -8.0
    wide = DiscretizedLogistic(loc, log_scale)
    narrow = DiscretizedLogistic(torch.tensor(loc, dtype=torch.float32), torch.tensor(log_scale, dtype=torch.float32))
    x = wide.enumerate_support()
    masses = wide.log_prob(x).exp()
    expected = (masses * (x - (masses * x).sum()) ** 2).sum()
    torch.testing.assert_close(wide.variance, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(narrow.variance.double(), expected, rtol=1e-3, atol=0)
