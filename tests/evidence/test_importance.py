"""Two ways to the evidence (seed eq. 1, 2), their errors' coverage, and the diagnostics that speak up."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hvae.evidence import log_evidence, posterior_gap


def gaussian(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def exact_gaussian(x):
    return dist.Normal(0.0, 1.25**0.5).log_prob(x)


def guide(width, shift=0.0):
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + shift, width))

    return program


EXACT_GUIDE = guide(0.2**0.5)


def discrete(x):
    """z2 -> z1 -> x, all in {0, 1, 2}, each datum its own chain."""
    transition = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    emission = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        z1 = pyro.sample("z1", dist.Categorical(transition[z2.long()]))
        pyro.sample("x", dist.Categorical(emission[z1.long()]), obs=x)


def exact_discrete(x):
    initial = torch.tensor([0.5, 0.3, 0.2])
    transition = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    emission = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    return (initial @ transition @ emission).log()[x.long()]


def discrete_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z1", dist.Categorical(torch.full((3,), 1 / 3)))
        pyro.sample("z2", dist.Categorical(torch.full((3,), 1 / 3)))


X = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
STATES = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("method", ["importance", "prior", "bayes"])
def test_both_equations_on_the_gaussian(method):
    found = log_evidence(gaussian, guide(0.6), X, method=method, num_samples=40_000, chunk_size=40_000)
    assert ((found.value - exact_gaussian(X)).abs() < 4 * found.stderr).all()
    assert (found.stderr < 0.02).all()


@pytest.mark.parametrize("method", ["importance", "bayes"])
def test_both_equations_with_the_exact_posterior(method):
    found = log_evidence(gaussian, EXACT_GUIDE, X, method=method, num_samples=30)
    torch.testing.assert_close(found.value, exact_gaussian(X), atol=1e-12, rtol=0.0)
    assert (found.khat == -torch.inf).all()
    assert (found.stderr < 1e-7).all()


@pytest.mark.parametrize("method", ["importance", "prior", "bayes"])
def test_both_equations_on_the_discrete_chain(method):
    found = log_evidence(discrete, discrete_guide, STATES, method=method, num_samples=60_000, chunk_size=60_000)
    assert ((found.value - exact_discrete(STATES)).abs() < 4 * found.stderr).all()


def test_summing_over_discrete_latents_is_exact():
    found = log_evidence(discrete, None, STATES, method="enumerate")
    torch.testing.assert_close(found.value, exact_discrete(STATES), atol=1e-12, rtol=0.0)
    assert (found.stderr == 0).all()


@pytest.mark.parametrize("method", ["importance", "bayes"])
def test_standard_errors_cover(method):
    """200 repeats, each a datum with the same value: 95 % intervals contain the truth in 90 to 99 % of them."""
    x = torch.full((200,), 1.0)
    found = log_evidence(gaussian, guide(0.6, 0.1), x, method=method, num_samples=600, chunk_size=600)
    covered = ((found.value - exact_gaussian(x)).abs() < 1.96 * found.stderr).double().mean()
    assert 0.90 <= covered <= 0.99


def test_khat_flags_where_errors_cannot_be_trusted():
    x = torch.full((200,), 1.0)
    narrow = log_evidence(gaussian, guide(0.15, 0.4), x, num_samples=2000, chunk_size=2000)
    covered = ((narrow.value - exact_gaussian(x)).abs() < 1.96 * narrow.stderr).double().mean()
    assert covered < 0.8
    assert (narrow.khat > 0.7).double().mean() > 0.8
    sound = log_evidence(gaussian, guide(0.6), x, num_samples=2000, chunk_size=2000)
    assert (sound.khat < 0.7).all()


def test_chunks_shapes_and_units():
    torch.manual_seed(0)
    found = log_evidence(gaussian, guide(0.6), X, num_samples=105, chunk_size=10)
    assert found.value.shape == found.stderr.shape == found.ess.shape == found.khat.shape == (3,)
    torch.testing.assert_close(found.bits_per_dim(2), -found.value / (2 * math.log(2)))
    assert "105 draws" in str(found)
    few = log_evidence(gaussian, guide(0.6), X, num_samples=12)
    assert "k-hat above 0.07 for 3 (largest inf)" in str(few)  # too few draws to tell


def improper(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.factor("explosion", torch.full_like(z, math.inf))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (gaussian, {"method": "magic"}, "method must be one of .*, got 'magic'"),
        (gaussian, {"num_samples": 3}, "num_samples >= 10"),
        (lambda x: pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x), {}, "no latent|same latent"),
        (improper, {}, "NaN or \\+inf|improper"),
    ],
)
def test_bad_input(model, options, message):
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        log_evidence(model, guide(0.6), X, **options)


def test_impossible_data_are_counted():
    def impossible(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("wall", torch.where(x > 0, z.new_zeros(()), -math.inf))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"1 of 3 data have no draw .* index \(1,\)"):
        log_evidence(impossible, guide(0.6), X)


def test_a_part_of_the_data_is_not_the_whole():
    def model(x):
        g = pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 10, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    with pytest.raises(ValueError, match="'data' shows 3 of 10 indices"):
        log_evidence(model, None, X, method="prior")


@pytest.mark.parametrize("method", ["bayes", "importance"])
def test_draws_without_weight(method):
    """Nine in ten draws of the guide are impossible: the point of Bayes' rule must not be one of them."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))
            pyro.factor("wall", torch.where(z < 0.1, torch.zeros_like(z), -math.inf))
            pyro.sample("x", dist.Normal(20 * z, 1.0), obs=x)

    def everywhere(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros_like(x), 1.0))

    x = torch.tensor([0.0, 1.0])
    exact = torch.log((dist.Normal(0.0, 1.0).cdf(2.0 - x) - dist.Normal(0.0, 1.0).cdf(-x)) / 20)
    found = log_evidence(model, everywhere, x, method=method, num_samples=20_000)
    assert ((found.value - exact).abs() < 4 * found.stderr).all()
    assert (found.stderr < 0.1).all()


def test_annealing_starts_at_the_prior_where_there_is_no_guide():
    found = log_evidence(gaussian, None, X, method="annealed", num_samples=100)
    assert ((found.value - exact_gaussian(X)).abs() < 4 * found.stderr).all()
    assert found.method == "annealed"


def flat(x):
    """The likelihood does not depend on z, whose prior is flat on the real line: p(x) is infinite."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.ImproperUniform(dist.constraints.real, torch.Size(), torch.Size()))
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


def test_an_improper_posterior_is_flagged_or_refused():
    found = log_evidence(flat, guide(1.0), X, num_samples=4000)
    assert (found.khat > 0.7).all()
    gap = posterior_gap(flat, guide(1.0), X, num_steps=5, num_samples=4000)
    assert "not to be trusted for 3, where log p(x) has k-hat above 0.70" in str(gap)
    with pytest.raises(ValueError, match=r"'z' can't be drawn from its prior \(ImproperUniform\).* a guide instead"):
        log_evidence(flat, None, X, method="prior")
