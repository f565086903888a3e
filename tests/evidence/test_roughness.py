"""Pairs whose scores jump are told from smooth ones, and warned of where gradients pass through steps."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae import conjugate
from pyro_hvae.evidence import RoughDensityWarning
from pyro_hvae.evidence.path import Path
from pyro_hvae.evidence.roughness import roughness, warn_if_rough


def images(count=40, pixels=30):
    return torch.bernoulli(torch.full((count, pixels), 0.3))


def path_of(model, guide, *args):
    return Path(ph.Problem(model, guide)(*args), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("activation", ["tanh", "silu", "elu"])
def test_smooth_networks_miss_next_to_nothing(activation, layers, dtype):
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    model, guide = ph.hvae(30, (5, 3)[:layers], hidden=(20,), activation=activation)
    assert roughness(path_of(model, guide, images())) < 0.03


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_kinks_make_a_good_part_of_the_curvature_of_piecewise_linear_networks(activation):
    torch.manual_seed(0)
    model, guide = ph.hvae(30, (5, 3), hidden=(20,), activation=activation)
    assert roughness(path_of(model, guide, images())) > 0.25


def test_gaussians_and_a_prior_with_a_kink():
    x = torch.tensor([0.0, 1.0])
    assert roughness(path_of(conjugate.model, conjugate.guide(), x)) < 1e-8

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    # Along a step v = .01 eps the guide's score changes by 2 v, that of the likelihood by 8 v, and the prior's by 2 if
    # |z| < |v|, with probability .8 |v|; shorter steps miss more, so that this is the least share.
    square, jump = 0.01**2, 0.8 * 0.01 * 0.8
    expected = (4 * jump / (4 * square + 64 * square + 4 * jump + 32 * 0.8 * square)) ** 0.5
    assert 0.8 < expected < 0.9
    assert abs(roughness(path_of(model, guide, torch.zeros(2000))) - expected) < 0.02


def test_preparing_the_bound_warns_and_draws_nothing():
    torch.manual_seed(0)
    model, guide = ph.vae(30, 3, hidden=(20,), activation="relu")
    with pytest.warns(RoughDensityWarning, match="smooth activations"):
        ph.AnnealedBound(2).prepare(model, guide, images())
    path, before = path_of(model, guide, images()), torch.get_rng_state()
    with pytest.warns(RoughDensityWarning, match="second derivatives miss"):
        warn_if_rough(path)
    assert torch.equal(torch.get_rng_state(), before)
    model, guide = ph.vae(30, 3, hidden=(20,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ph.AnnealedBound(2).prepare(model, guide, images())


def test_gradients_are_those_of_the_value_where_the_scores_are_smooth():
    """Slopes along one direction, under the same noise; with kinks they differ by more than their noise."""
    found = {}
    for activation in ("silu", "relu"):
        torch.manual_seed(1)
        model, guide = ph.vae(30, 4, hidden=(40,), activation=activation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RoughDensityWarning)
            bound = ph.AnnealedBound(6, correction=False).prepare(model, guide, images())
        with torch.no_grad():
            bound.kernels.log_step.fill_(-0.2)
            for parameter in model.parameters():
                parameter.mul_(3.0)
        x, parameters, differences = images(200), list(guide.parameters()), []
        direction = [torch.randn_like(p) / 30 for p in parameters]
        for seed in range(12):
            torch.manual_seed(seed)
            gradient = torch.autograd.grad(bound.differentiable_loss(model, guide, x), parameters)
            slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
            ends = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    for parameter, d in zip(parameters, direction, strict=True):
                        parameter.add_(0.01 * sign * d)
                    torch.manual_seed(seed)
                    ends.append(float(bound.loss(model, guide, x)))
                    for parameter, d in zip(parameters, direction, strict=True):
                        parameter.sub_(0.01 * sign * d)
            differences.append((ends[0] - ends[1]) / 0.02 - slope)
        found[activation] = torch.tensor(differences)
    assert float(found["silu"].abs().median()) < 0.02 * float(found["relu"].abs().median())
