"""What a layer knows of the data, against Gaussian closed forms; collapse is no matter of the layer's term."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae import conjugate
from pyro_hvae.diagnostics import layers

N = 1500


def pair(a=1.5, s=0.8, c=0.7, r=0.5):
    """q(z1|x) = N(a x, s^2), q(z2|z1) = N(c z1, r^2); p(z2) = N(0, 1), p(z1|z2) = N(z2, 1), for x ~ N(0, 1)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, s))
            pyro.sample("z2", dist.Normal(c * z1, r))

    return model, guide


def divergence(variance, prior):
    return 0.5 * (variance / prior - 1 - math.log(variance / prior))


def test_information_and_aggregate_posterior():
    a, s, c, r = 1.5, 0.8, 0.7, 0.5
    found = layers(*pair(), torch.randn(N), num_draws=8)
    assert list(found.layer.values) == ["z1", "z2"]
    information = [0.5 * math.log(1 + a**2 / s**2), 0.5 * math.log(1 + (c * a) ** 2 / (c**2 * s**2 + r**2))]
    aggregate = [divergence(a**2 + s**2, 2.0), divergence(c**2 * (a**2 + s**2) + r**2, 1.0)]
    assert torch.allclose(torch.tensor(found.mutual_information.values), torch.tensor(information), atol=0.05)
    assert torch.allclose(torch.tensor(found.aggregate_kl.values), torch.tensor(aggregate), atol=0.08)
    assert found.active_units.values.tolist() == [1, 1]
    assert found.analytic.values.tolist() == [False, True]
    assert found.attrs["information_limit"] == math.log(N)
    assert abs(found.attrs["elbo"] - float(found.attrs["reconstruction"] - found.term.sum())) < 1e-9


def test_collapse_is_not_read_off_the_layer_s_term():
    """Neither layer knows x; z2 repeats z1 and costs much for it, z1 is negative."""
    found = layers(*pair(a=0.0, s=3.0), torch.randn(400))
    assert float(found.term.sel(layer="z1")) < -0.5
    assert float(found.term.sel(layer="z2")) > 1.5
    assert found.collapsed.values.tolist() == [True, True]
    assert layers(*pair(), torch.randn(400)).collapsed.values.tolist() == [False, False]


def test_information_in_the_spread_alone_is_no_collapse():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0.0, torch.exp(z)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, torch.where(x > 0, 0.1, 3.0)))

    found = layers(model, guide, torch.randn(400))
    assert found.active_units.item() == 0
    assert found.mutual_information.item() > 0.3
    assert not found.collapsed.item()


def test_the_chain_of_an_image_model():
    model, guide = ph.hvae(20, (6, 3), hidden=(10,))
    found = layers(model, guide, torch.bernoulli(torch.full((60, 20), 0.3)))
    assert found.units.values.tolist() == [6, 3]
    assert bool((found.mutual_information > -0.2).all())
    with pytest.raises(ValueError, match="num_draws must be at least 2"):
        layers(model, guide, torch.zeros(30, 20), num_draws=1)


def test_many_data_are_looked_at_through_some(monkeypatch):
    """Divergences are averages over so many of the data, against the mixture over all of them."""
    x = 1.4 * torch.randn(1500)
    problem = ph.Problem(conjugate.model, conjugate.guide())(x)
    some = layers(problem)
    assert some.attrs["num_data"] == 1500
    monkeypatch.setattr("pyro_hvae.diagnostics.information._POINTS", 1500)
    everything = layers(problem)
    for name in ("mutual_information", "aggregate_kl"):
        assert abs(float(some[name].sel(layer="z") - everything[name].sel(layer="z"))) < 0.05
    assert abs(float(some.mutual_information.sel(layer="z")) - 0.5 * math.log(2)) < 0.05  # x and z are Gaussian


def test_densities_are_computed_for_so_many_entries_at_once(monkeypatch):
    """Points times draws times data: all data are components of the mixtures, also where some are points."""
    from pyro_hvae.diagnostics import information

    largest = []
    per_datum = information._Layer._per_datum

    def recorded(self, run, points):
        found = per_datum(self, run, points)
        largest.append(found.numel())
        return found

    monkeypatch.setattr(information, "_POINTS", 10)
    monkeypatch.setattr(information, "_ENTRIES_AT_ONCE", 3 * 4 * 50)
    monkeypatch.setattr(information._Layer, "_per_datum", recorded)
    layers(conjugate.model, conjugate.guide(), torch.randn(50), num_draws=4)
    assert max(largest) == 3 * 4 * 50


@pytest.mark.parametrize(("components", "draws"), [(1, 2), (5 * N, 5), (10**9, 16)])
def test_many_data_have_fewer_draws(monkeypatch, components, draws):
    """The information is that of the closed form also from two draws a datum."""
    from pyro_hvae.diagnostics import information

    a, s, c, r = 1.5, 0.8, 0.7, 0.5
    counts = []
    terms = information._terms
    monkeypatch.setattr(information, "_COMPONENTS", components)
    monkeypatch.setattr(information, "_terms", lambda pair, run: counts.append(run.num_particles) or terms(pair, run))
    found = layers(*pair(), torch.randn(N))
    assert counts == [draws]
    expected = [0.5 * math.log(1 + a**2 / s**2), 0.5 * math.log(1 + (c * a) ** 2 / (c**2 * s**2 + r**2))]
    assert torch.allclose(torch.tensor(found.mutual_information.values), torch.tensor(expected), atol=0.05)
