"""Diagnostics of programs that are not laid out as the simplest ones are."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae import diagnostics
from tests.kinds.outcomes import outcome, right_or_refused

T = torch.tensor
N = 300


def standard():
    return dist.Normal(torch.zeros(()), 1.0)


# --- calibration over simulated data: the exact guides of models that can't be simulated in the simplest way


def gaussian(mean, precision):
    with pyro.plate("data", N):
        pyro.sample("z", dist.Normal(mean, precision**-0.5))


def two_vector_sites(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", standard()).unsqueeze(-1)
        pyro.sample("a", dist.Normal(z, T([1.0, 1.0])).to_event(1), obs=x)
        pyro.sample("b", dist.Normal(z, T([1.0, 1.0])).to_event(1), obs=x)


def three_sites_in_a_loop(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", standard())
        for name in "abc":
            pyro.sample(name, dist.Normal(z, 1.0), obs=x)


def factor(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", standard())
        pyro.factor("prior", -(z**2) / 2)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def factor_of_the_data(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", standard())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("again", dist.Normal(z, 1.0).log_prob(x))


def scaled(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", standard())
        with poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled_prior(x):
    with pyro.plate("data", N):
        with poutine.scale(scale=3.0):
            z = pyro.sample("z", standard())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def reads_its_observation(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(x.detach(), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Remembers(pyro.nn.PyroModule):
    """A second observation, in a buffer."""

    def __init__(self, y):
        super().__init__()
        self.register_buffer("y", y)

    def forward(self, x):
        with pyro.plate("data", N):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 0.7), obs=self.y)


Y = torch.linspace(-2, 2, N, dtype=torch.float64)
SIMULATED = {  # model, the mean and precision of its exact posterior
    "one argument at two sites": (two_vector_sites, lambda x: (2 * x.sum(-1) / 5, 5.0)),
    "one argument at three sites": (three_sites_in_a_loop, lambda x: (3 * x / 4, 4.0)),
    "a factor": (factor, lambda x: (x / 3, 3.0)),
    "a factor of the data": (factor_of_the_data, lambda x: (2 * x / 3, 3.0)),
    "a scaled likelihood": (scaled, lambda x: (2 * x / 3, 3.0)),
    "a scaled prior": (scaled_prior, lambda x: (x / 4, 4.0)),
    "a model that reads its observation": (reads_its_observation, lambda x: (x, 2.0)),
    "an observation in a buffer": (None, lambda x: ((x + Y / 0.49) / (2 + 1 / 0.49), 2 + 1 / 0.49)),
    "an observation in a condition": (None, lambda x: ((x + Y) / 3, 3.0)),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_calibration_never_calls_an_exact_guide_wrong(name):
    model, posterior = SIMULATED[name]
    if name == "an observation in a buffer":
        model = Remembers(Y)
    elif name == "an observation in a condition":

        def both(x):
            with pyro.plate("data", N):
                z = pyro.sample("z", standard())
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                pyro.sample("y", dist.Normal(z, 1.0))

        model = poutine.condition(both, data={"y": Y})

    def guide(x):
        mean, precision = posterior(x)
        gaussian(mean, torch.as_tensor(precision))

    x = torch.randn(N, 2) if name == "one argument at two sites" else torch.randn(N)
    found = outcome(lambda: diagnostics.calibrate(model, guide, x), names=[r"\bx\b", r"\by\b", r"\ba\b"])
    assert found is None or found.failures() == {}


def left_units(x):
    """Two latents a datum in a plate to the left of the data's: the data come last."""
    with pyro.plate("data", N, dim=-1):
        with pyro.plate("units", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(T([[0.0], [10.0]]), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-2, keepdim=True), 1.0), obs=x)


def right_units(x):
    with pyro.plate("data", N, dim=-2):
        with pyro.plate("units", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(T([0.0, 10.0]), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x)


def unit_guide(left, slope, variance):
    loc = T([[0.0], [10.0]]) if left else T([0.0, 10.0])
    data, units = (-1, -2) if left else (-2, -1)

    def guide(x):
        with pyro.plate("data", N, dim=data), pyro.plate("units", 2, dim=units):
            pyro.sample("z", dist.Normal(loc + slope * (x - 10), variance**0.5))

    return guide


def unit_data(left):
    x = 10 + 3**0.5 * torch.randn(N)
    return x if left else x[:, None]


def correlated(x):
    """The exact posterior of `left_units`: z1 given x, then z2 given both."""
    with pyro.plate("data", N, dim=-1):
        a = pyro.sample("a", dist.Normal((x - 10) / 3, (2 / 3) ** 0.5))
        pyro.sample("b", dist.Normal(10 + (x - 10 - a) / 2, 0.5**0.5))


def correlated_model(x):
    with pyro.plate("data", N, dim=-1):
        a = pyro.sample("a", standard())
        b = pyro.sample("b", dist.Normal(torch.full((), 10.0), 1.0))
        with pyro.plate("repeats", 3, dim=-2):
            pyro.sample("x", dist.Normal(a + b, 3**0.5), obs=x)


def test_calibration_of_data_that_come_last():
    """x has shape (3, N): three repeats of variance 3 are one of variance 1, of their mean."""

    def guide(x):
        correlated(x.mean(0))

    found = diagnostics.calibrate(correlated_model, guide, torch.zeros(3, N))
    assert {len(ranks) for ranks in found.ranks.values()} == {N}
    assert found.failures() == {}


def test_calibration_of_a_wide_guide_of_data_that_come_last():
    """A guard: what is wrong is still found."""

    def guide(x):
        with pyro.plate("data", N, dim=-1):
            pyro.sample("a", dist.Normal((x.mean(0) - 10) / 3, 2.0))
            pyro.sample("b", dist.Normal(10 + (x.mean(0) - 10) / 3, 2.0))

    assert diagnostics.calibrate(correlated_model, guide, torch.zeros(3, N)).failures()


@pytest.mark.parametrize("left", [True, False])
def test_calibration_names_the_unit_that_is_wrong(left):
    """Units in a plate on either side of the data's; the guide is exact for the first, too narrow for the second."""
    data, units = (-1, -2) if left else (-2, -1)
    scale = 0.5**0.5 * (T([[1.0], [0.2]]) if left else T([1.0, 0.2]))

    def model(x, y):
        with pyro.plate("data", N, dim=data):
            with pyro.plate("units", 2, dim=units):
                z = pyro.sample("z", standard())
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", standard(), obs=y)

    def guide(x, y):
        with pyro.plate("data", N, dim=data), pyro.plate("units", 2, dim=units):
            pyro.sample("z", dist.Normal(x / 2, scale))

    shapes = ((2, N), (N,)) if left else ((N, 2), (N, 1))
    found = diagnostics.calibrate(model, guide, *(torch.zeros(shape) for shape in shapes))
    assert found.ranks["z"].shape == (N, 2)
    assert "z[1]" in found.failures()
    assert "z[0]" not in found.failures()


# --- layers: units in inner plates, draws without a mean


@pytest.mark.parametrize("left", [True, False])
def test_dead_units_of_an_inner_plate(left):
    model, guide, x = (left_units if left else right_units), unit_guide(left, 0.0, T(1.0)), unit_data(left)
    found = diagnostics.layers(model, guide, x).sel(layer="z")
    assert found.attrs.get("num_data", N) == N
    assert int(found.active_units) == 0
    assert float(found.mutual_information) == pytest.approx(0.0, abs=1e-6)
    assert float(found.term) == pytest.approx(0.0, abs=1e-6)
    assert bool(found.collapsed)


@pytest.mark.parametrize("left", [True, False])
def test_active_units_counts_the_units_of_an_inner_plate(left):
    model, x = (left_units if left else right_units), unit_data(left)
    assert diagnostics.active_units(model, unit_guide(left, 0.0, T(1.0)), x) == {"z": 0}
    assert diagnostics.active_units(model, unit_guide(left, 1 / 3, T(2 / 3)), x) == {"z": 2}


@pytest.mark.parametrize("left", [True, False])
def test_information_of_units_of_an_inner_plate(left):
    """Two units with variance 2/3, whose means share one of variance 1/3: log(2) / 2 nats of information a datum."""
    model, guide, x = (left_units if left else right_units), unit_guide(left, 1 / 3, T(2 / 3)), unit_data(left)
    found = diagnostics.layers(model, guide, x, num_draws=64).sel(layer="z")
    assert float(found.mutual_information) == pytest.approx(0.5 * math.log(2), abs=0.1)
    kl = 2 * 0.5 * (2 / 3 + float(((x - 10) ** 2).mean()) / 9 - 1 - math.log(2 / 3))
    assert float(found.term) == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("left", [True, False])
def test_diagnose_of_dead_units_of_an_inner_plate(left):
    model, guide, x = (left_units if left else right_units), unit_guide(left, 0.0, T(1.0)), unit_data(left)
    report = ph.diagnose(model, guide, x, num_draws=100)
    assert "collapse" in str(report).lower() or "prior" in str(report).lower()


MEANS = T([-4.0, 0.0, 4.0])


def without_mean(name):
    """Model and exact, or in the case of Cauchy good, guide; and data that move the latent."""
    k = torch.arange(90) % 3
    x = MEANS[k] + 0.3 * torch.randn(90)

    def log_odds(x):
        return dist.Normal(MEANS, 1.0).log_prob(x[:, None])

    families = {
        "categorical": (
            lambda: dist.Categorical(torch.ones(3)),
            lambda x: dist.Categorical(logits=log_odds(x)),
            lambda c: dist.Normal(MEANS[c], 1.0),
        ),
        "one-hot": (
            lambda: dist.OneHotCategorical(torch.ones(3)),
            lambda x: dist.OneHotCategorical(logits=log_odds(x)),
            lambda c: dist.Normal(c @ MEANS, 1.0),
        ),
        "cauchy": (
            lambda: dist.Cauchy(torch.zeros(()), 4.0),
            lambda x: dist.Cauchy(x, 0.6),
            lambda c: dist.Normal(c, 1.0),
        ),
        "student": (
            lambda: dist.StudentT(1.0, torch.zeros(()), 4.0),
            lambda x: dist.StudentT(1.0, x, 0.6),
            lambda c: dist.Normal(c, 1.0),
        ),
        "half-cauchy": (
            lambda: dist.HalfCauchy(torch.full((), 4.0)),
            lambda x: dist.HalfCauchy(x.abs() + 0.5),
            lambda c: dist.Normal(c, 3.0),
        ),
    }
    prior, posterior, likelihood = families[name]

    def model(x):
        with pyro.plate("data", 90):
            c = pyro.sample("c", prior())
            pyro.sample("x", likelihood(c), obs=x)

    def guide(x):
        with pyro.plate("data", 90):
            pyro.sample("c", posterior(x))

    return model, guide, x


@pytest.mark.parametrize("name", ["categorical", "cauchy", "student", "half-cauchy"])
def test_draws_without_a_mean_are_not_called_inactive(name):
    model, guide, x = without_mean(name)

    def active():
        value = float(diagnostics.layers(model, guide, x).active_units.sel(layer="c"))
        return 1.0 if math.isnan(value) else value  # "not known" is right too

    right_or_refused(active, T(1.0), 0.0, names=[r"\bc\b"])


@pytest.mark.parametrize("name", ["categorical", "cauchy", "student", "half-cauchy"])
def test_diagnose_does_not_say_that_draws_without_a_mean_repeat_the_prior(name):
    model, guide, x = without_mean(name)
    report = ph.diagnose(model, guide, x, num_draws=100)
    assert "repeat the prior" not in str(report)
    assert "0 of 1" not in str(report)
