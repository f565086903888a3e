"""Products of bound problems: what they draw from, what they leave alone, and no NaN in silence."""

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

from pyro_hvae.factorized import compare_guides, forward_kl, reverse_kl, total_correlation
from pyro_hvae.factorized.draws import prepare
from pyro_hvae.factorized.sites import latents_of
from pyro_hvae.problem import Problem

X = torch.tensor([0.5, -1.0], dtype=torch.float64)


def lognormal(x):
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.log(), 0.2), obs=x)


def posterior(x):
    """The exact posterior of the model above."""
    with pyro.plate("data", 2):
        pyro.sample("z", dist.LogNormal(x / 1.04, (0.04 / 1.04) ** 0.5))


def close(actual, expected, error=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual), rtol=0.0, atol=error)


def test_a_bound_problem_is_taken_in_the_place_of_model_and_data():
    def linear(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    x = torch.tensor(3.0)
    problem = Problem(linear)(x)
    for fit in (forward_kl, reverse_kl):
        close(fit(problem).distribution("a").variance, fit(linear, x).distribution("a").variance)
    close(total_correlation(problem), -0.5 * math.log(0.75))
    close(compare_guides(problem, num_samples=200).forward, compare_guides(linear, x, num_samples=200).forward)
    for verb in (forward_kl, reverse_kl, compare_guides, total_correlation):
        with pytest.raises(TypeError, match="a problem has its guide and its data bound already"):
            verb(problem, x)


def test_draws_come_from_the_problems_own_guide():
    guide = forward_kl(Problem(lognormal, posterior)(X), num_samples=200)
    close(guide.khat, torch.full((2,), -torch.inf))  # weights of the exact posterior are equal
    assert (forward_kl(lognormal, X, num_samples=20_000).khat > -torch.inf).all()
    with pytest.warns(UserWarning, match="k-hat of the weights"):  # the proposal goes before the problem's guide
        far = forward_kl(Problem(lognormal, posterior)(X), proposal=shifted, num_samples=200)
    assert (far.ess < 150).any()


def shifted(x):
    with pyro.plate("data", 2):
        pyro.sample("z", dist.LogNormal(x + 0.6, 0.1))


class Noisy(nn.Module):
    """A model with dropout and batch norm, a counter, and noise of numpy and Python."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        np.random.rand()  # noqa: NPY002
        random.random()
        shift = pyro.param("shift", torch.tensor(0.3))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            mean = self.net(z.reshape(-1, 1)).reshape(z.shape)
            pyro.sample("x", dist.Normal(mean + shift, 1.0), obs=x)


@pytest.mark.parametrize(
    "verb",
    [
        lambda model: forward_kl(model, X, num_samples=200),
        lambda model: reverse_kl(model, X, num_steps=3),
        lambda model: compare_guides(model, X, num_samples=200),
    ],
    ids=["forward", "reverse", "compare"],
)
@pytest.mark.filterwarnings("ignore:k-hat of the weights")
def test_a_model_is_left_as_it_is(verb):
    model = Noisy().train()
    model.net[2].eval()

    def state():
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        generators = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        flags = [module.training for module in model.modules()]
        grads = [parameter.grad for parameter in model.parameters()]
        return tensors, generators, flags, grads, float(pyro.param("shift", torch.tensor(0.3)).detach())

    before = state()
    with poutine.trace() as outer:
        verb(model)
    after = state()
    assert before[1:] == after[1:]
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    assert set(pyro.get_param_store()) == {"shift"}  # of no product, which share names
    assert not [site for site in outer.trace.nodes.values() if site["type"] == "sample"]


def test_products_are_fitted_in_evaluation_mode():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.9)

        def forward(self):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.drop(z), 1.0).to_event(1), obs=torch.ones(4))

    for fit in (forward_kl, reverse_kl):
        guide = fit(Dropped().train())
        close(guide.distribution("z").mean, torch.full((4,), 0.5))


def test_integer_latents_give_parameters_like_their_densities():
    """The default dtype is float64 here."""
    probs = torch.tensor([0.2, 0.8], dtype=torch.float32)

    def model():
        with pyro.plate("data", 2):
            a = pyro.sample("a", dist.Categorical(probs))
            pyro.sample("b", dist.Categorical(torch.stack([probs, probs.flip(0)])[a]))

    assert latents_of(prepare(Problem(model)())).like.dtype == torch.float32
    for fit in (forward_kl, reverse_kl):
        assert {value.dtype for value in fit(model).parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_integer_latents_give_parameters_on_their_device():
    def model():
        probs = torch.tensor([0.2, 0.8], device="cuda")
        a = pyro.sample("a", dist.Categorical(probs))
        pyro.sample("b", dist.Categorical(torch.stack([probs, probs.flip(0)])[a]))

    for fit in (forward_kl, reverse_kl):
        assert {value.device.type for value in fit(model).parameters()} == {"cuda"}


# Supports


def counted():
    number = pyro.sample("number", dist.Categorical(torch.ones(4) / 4))
    hits = pyro.sample("hits", dist.Binomial(number.to(torch.get_default_dtype()), 0.5))
    pyro.sample("x", dist.Normal(hits, 1.0), obs=torch.tensor(2.0))


def nested_interval():
    outer = pyro.sample("outer", dist.Uniform(0.0, 1.0))
    inner = pyro.sample("inner", dist.Uniform(0.0, outer))
    pyro.sample("x", dist.Normal(inner, 1.0), obs=torch.tensor(0.5))


def fewer_choices():
    first = pyro.sample("first", dist.Categorical(torch.ones(3) / 3))
    pyro.sample("second", dist.Binomial(1 + first, torch.tensor(0.5)))


@pytest.mark.parametrize(
    ("model", "name"), [(counted, "hits"), (nested_interval, "inner"), (fewer_choices, "second")]
)
@pytest.mark.parametrize("verb", [forward_kl, reverse_kl, compare_guides])
def test_a_support_that_depends_on_a_draw_is_refused(verb, model, name):
    with pytest.raises(ValueError, match=f"the support of site '{name}' depends on other draws"):
        verb(model)


def test_a_binomial_of_a_fixed_number_has_a_table():
    def model():
        hits = pyro.sample("hits", dist.Binomial(torch.tensor(3.0), torch.tensor(0.4)))
        pyro.sample("x", dist.Normal(hits, 1.0), obs=torch.tensor(2.0))

    values = torch.arange(4.0)
    log = dist.Binomial(3.0, torch.tensor(0.4)).log_prob(values) + dist.Normal(values, 1.0).log_prob(torch.tensor(2.0))
    close(forward_kl(model).factor("hits").tables().detach(), log.softmax(0))


def test_a_minibatch_that_is_drawn_at_random_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    for verb in (forward_kl, reverse_kl, compare_guides, total_correlation):
        with pytest.raises(ValueError, match=r"plate\(s\) \['data'\] draw another minibatch at each call"):
            verb(model, torch.arange(6.0))


# Numbers that are not finite


def bounded(x):
    """Positive z, and impossible above 3."""
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
        pyro.factor("wall", torch.where(z < 3.0, 0.0, -math.inf))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def narrow(x):
    with pyro.plate("data", 2):
        pyro.sample("z", dist.TransformedDistribution(dist.Uniform(torch.zeros(()), 1.0), []))


@pytest.mark.filterwarnings("ignore:k-hat of the weights")
def test_divergences_without_a_bound_are_infinite_and_never_nan():
    found = compare_guides(bounded, X, guides={"wide": posterior_of_bounded, "narrow": narrow}, num_samples=2000)
    assert (found.reverse[0] == torch.inf).all()  # it draws above 3
    assert (found.forward[1] == torch.inf).all()  # it draws nothing above 1
    for name in ("forward", "forward_stderr", "reverse", "reverse_stderr", "khat", "log_evidence", "stderr", "elbo"):
        assert not getattr(found, name).isnan().any(), name
    assert (found.forward[0].isfinite() & found.reverse[1].isfinite()).all()
    assert (found.reverse_stderr[0] == 0).all()


def posterior_of_bounded(x):
    with pyro.plate("data", 2):
        pyro.sample("z", dist.LogNormal(torch.zeros(()), 0.8))


def test_draws_of_zero_weight_add_nothing_even_on_a_boundary():
    values = torch.tensor([0.0, 1.0, 2.0, torch.inf])
    weights = torch.tensor([0.0, 0.4, 0.6, 0.0])

    def model():
        pyro.sample("rate", dist.Gamma(2.0, torch.tensor(1.0)))

    for family in ("gamma", "normal"):
        factor = forward_kl(model, families={"rate": family}, num_samples=200).factor("rate")
        factor.match(values, weights)
        assert all(parameter.isfinite().all() for parameter in factor.parameters())
        q = factor()
        mean = q.mean if family == "gamma" else q.base_dist.loc
        close(mean.detach(), 1.6 if family == "gamma" else 0.6 * math.log(2.0), 1e-6)


def test_parameters_that_would_be_infinite_are_refused():
    def model():
        small = pyro.sample("small", dist.Gamma(torch.tensor(1e-3), 1.0).mask(False))
        pyro.sample("x", dist.Normal(0.0 * small, 1.0), obs=torch.tensor(0.0))

    def at_the_boundary():
        pyro.sample("small", Underflowing(torch.tensor(1.0), 1.0).mask(False))

    with pytest.raises(ValueError, match="parameters of the factor of site 'small' would be NaN or infinite"):
        forward_kl(model, proposal=at_the_boundary, num_samples=200)


class Underflowing(dist.Gamma):
    """Draws of exactly 0, of a density that is taken for 1."""

    def rsample(self, sample_shape=()):
        return 0.0 * super().rsample(sample_shape)

    def log_prob(self, value):
        return torch.zeros_like(value)


def test_guides_without_a_density_are_refused():
    def point(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Delta(torch.ones(2)))

    def enumerating():
        pyro.sample("a", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})

    def coin():
        pyro.sample("a", dist.Bernoulli(torch.tensor(0.3)))

    with pytest.raises(ValueError, match=r"draws \['z'\] on a part of the model's support alone"):
        forward_kl(bounded, X, proposal=narrow)
    with pytest.raises(ValueError, match=r"point estimate of \['z'\]"):
        compare_guides(lognormal, X, guides={"point": point}, num_samples=200)
    with pytest.raises(ValueError, match=r"the guide enumerates \['a'\]"):
        compare_guides(coin, guides={"enumerating": enumerating}, num_samples=200)
