"""The bound from a few layers against the whole chain, the closed form, and the routes that train it."""

import math

import pyro
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.bounds import DiffusionELBO, SimpleDiffusionLoss
from pyro_hvae.diffusion import CosineSchedule, LearnedSchedule, LinearSchedule, Noising
from pyro_hvae.models import vdm
from pyro_hvae.nn import DenoisingMLP

EIGENVALUES = torch.tensor([4.0, 1.0, 0.3, 0.05, 0.01], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 0.0, 0.2, 0.0], dtype=torch.float64)


class ExactDenoiser(nn.Module):
    """E[x | z] of Gaussian data."""

    def forward(self, z, gamma):
        level = Noising(gamma.unsqueeze(-1))
        gain = level.alpha * EIGENVALUES / (level.alpha**2 * EIGENVALUES + level.sigma**2)
        return MEAN + gain * (z - level.alpha * MEAN)


class Linear(nn.Module):
    """A small denoiser that is wrong on purpose."""

    def __init__(self, dim=2):
        super().__init__()
        self.layer = nn.Linear(dim + 1, dim)

    def forward(self, z, gamma):
        return self.layer(torch.cat([z, gamma.unsqueeze(-1) / 10], -1))


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


SAMPLERS = [("uniform", 1), ("antithetic", 1), ("antithetic", 4), ("importance", 2), ("exact", 1)]


@pytest.mark.parametrize(("sampling", "layers"), SAMPLERS)
@pytest.mark.parametrize("data_size", [None, 30])
def test_same_expectation_as_the_whole_chain(sampling, layers, data_size):
    schedule = CosineSchedule(-9.0, 3.0) if sampling == "importance" else LinearSchedule(-5.0, 3.0)
    model, guide = vdm(Linear(), event_shape=2, num_layers=20, schedule=schedule)
    datum = torch.tensor([0.4, -1.1])
    many = 6000
    x = datum.expand(many, 2)
    options = {} if data_size is None else {"data_size": data_size * many}
    whole, whole_error = mean_and_error(ph.TraceELBO().per_datum(model, guide, x, **options))
    bound = DiffusionELBO(layers, sampling)
    if sampling == "importance":
        for _ in range(60):
            bound.differentiable_loss(model, guide, x[:200])  # learns in training alone
        weights = bound._weights(x)
        assert weights.max() > 2 * weights.min()  # a history, so that the times are not uniform
    few, few_error = mean_and_error(bound.per_datum(model, guide, x, **options))
    assert abs(whole - few) < 4 * (whole_error**2 + few_error**2).sqrt()
    if data_size is not None:
        torch.manual_seed(1)
        scaled = bound.loss(model, guide, x, **options)
        assert abs(scaled / (data_size * many) + whole) < 5 * (whole_error**2 + few_error**2).sqrt()


def test_one_layer_is_the_vae():
    model, guide = vdm(Linear(), event_shape=2, num_layers=1, schedule=LinearSchedule(-5.0, 1.0))
    x = torch.tensor([0.4, -1.1]).expand(4000, 2)
    one, error = mean_and_error(DiffusionELBO().per_datum(model, guide, x))
    other, other_error = mean_and_error(ph.LayerwiseELBO().per_datum(model, guide, x))
    assert abs(one - other) < 4 * (error**2 + other_error**2).sqrt()
    assert set(ph.LayerwiseELBO().terms(model, guide, x)) == {"reconstruction", "kl_z1"}


@pytest.mark.parametrize("schedule", [LinearSchedule(-10.0, 4.0), CosineSchedule(-10.0, 4.0)])
def test_continuous_time_in_closed_form_whatever_the_schedule(schedule):
    model, guide = vdm(ExactDenoiser(), event_shape=5, num_layers=None, schedule=schedule, parameterisation="x0")
    x = MEAN + EIGENVALUES.sqrt() * torch.randn(20_000, 5)
    found, error = mean_and_error(DiffusionELBO(16).per_datum(model, guide, x))
    assert abs(-found - 3.400723) < 4 * error
    assert error < 0.2


def test_exact_sum_over_layers_of_the_gaussian():
    """0.5 sum (SNR_{i-1} - SNR_i) mmse(SNR_i), in expectation over data and noise."""
    model, guide = vdm(
        ExactDenoiser(), event_shape=5, num_layers=50, schedule=LinearSchedule(-10.0, 4.0), parameterisation="x0"
    )
    x = MEAN + EIGENVALUES.sqrt() * torch.randn(4000, 5)
    found, error = mean_and_error(DiffusionELBO(sampling="exact").terms(model, guide, x)["denoising_matching"])
    snr = torch.exp(-torch.linspace(-10.0, 4.0, 50))
    mmse = (EIGENVALUES / (1 + snr[1:, None] * EIGENVALUES)).sum(-1)
    assert abs(found - 0.5 * ((snr[:-1] - snr[1:]) * mmse).sum()) < 4 * error


def test_antithetic_times_lower_the_variance():
    """With the exact denoiser the layers' terms differ most, and so does what spreading the times is worth."""
    model, guide = vdm(
        ExactDenoiser(), event_shape=5, num_layers=1000, schedule=LinearSchedule(-10.0, 4.0), parameterisation="x0"
    )
    x = (MEAN + EIGENVALUES.sqrt() * torch.randn(5)).expand(64, 5)

    def variance(sampling):
        bound = DiffusionELBO(sampling=sampling)
        return torch.stack([bound.terms(model, guide, x)["denoising_matching"].mean() for _ in range(400)]).var()

    # 400 draws give a variance to 7 %, so a ratio below .8 is four standard errors from one
    assert variance("antithetic") < 0.8 * variance("uniform")


@pytest.mark.parametrize("route", ["svi", "module"])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("num_layers", [10, None])
@pytest.mark.parametrize("bound", [DiffusionELBO(), SimpleDiffusionLoss("min-snr")])
def test_every_parameter_trains(route, local, num_layers, bound):
    torch.set_default_dtype(torch.float64)
    schedule = LearnedSchedule(-6.0, 3.0).double()
    with pyro.settings.context(module_local_params=local):
        model, guide = vdm(DenoisingMLP(2, hidden=16), event_shape=2, num_layers=num_layers, schedule=schedule)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x = torch.randn(16, 2)
        if route == "svi":
            svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), bound)
            for _ in range(5):
                svi.step(x)
        else:
            objective = bound(model, guide)
            optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
            for _ in range(5):
                optimizer.zero_grad()
                objective(x).backward()
                optimizer.step()
    assert any(name.startswith("schedule.") for name in before)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_what_it_refuses():
    model, guide = vdm(Linear(), event_shape=2, num_layers=None)
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="infinitely many"):
        DiffusionELBO(sampling="exact").per_datum(model, guide, x)
    with pytest.raises(ValueError, match="infinitely many sites"):
        model(size=3)
    with pytest.raises(ValueError, match=r"sampling must be one of .*, got 'other'"):
        DiffusionELBO(sampling="other")
    with pytest.raises(ValueError, match="num_layers_sampled"):
        DiffusionELBO(0)
    plain_model, plain_guide = ph.vae(4, 2, hidden=(3,))
    with pytest.raises(TypeError, match="has no marginal, posterior"):
        DiffusionELBO().per_datum(plain_model, plain_guide, torch.zeros(3, 4))
    assert not SimpleDiffusionLoss().is_bound


def test_the_bound_of_missing_entries_leaves_their_likelihood_out():
    model, guide = vdm(Linear(), event_shape=2, num_layers=5, schedule=LinearSchedule(-5.0, 3.0))
    x = torch.tensor([[0.4, math.nan]]).expand(3000, 2)
    mask = ~x.isnan()
    whole, error = mean_and_error(ph.TraceELBO().per_datum(model, guide, x, mask=mask))
    few, few_error = mean_and_error(DiffusionELBO().per_datum(model, guide, x, mask=mask))
    assert abs(whole - few) < 4 * (error**2 + few_error**2).sqrt()


@pytest.mark.parametrize("num_layers", [12, None])
def test_single_layers_add_up(num_layers):
    model, guide = vdm(Linear(), event_shape=2, num_layers=num_layers, schedule=LinearSchedule(-5.0, 3.0))
    x = torch.tensor([0.4, -1.1]).expand(4000, 2)
    times, terms = DiffusionELBO().per_layer(model, guide, x, num_layers=101)
    whole = DiffusionELBO(4).terms(model, guide, x)["denoising_matching"]
    total = terms.sum(0) if num_layers else torch.trapezoid(terms, times, dim=0)
    assert times.shape == ((11,) if num_layers else (101,))
    error = ((whole.var() + total.var()) / 4000).sqrt()
    assert abs(total.mean() - whole.mean()) < 4 * error + (0 if num_layers else 2e-3 * total.mean())


def test_data_that_do_not_fit_are_named():
    parts = {"event_shape": 2, "schedule": LinearSchedule(-5.0, 3.0)}
    model, guide = vdm(Linear(), num_layers=None, **parts)
    with pytest.raises(ValueError, match=r"^x has shape \(4, 3\), .*; the chain's are of shape \(2,\)$"):
        DiffusionELBO().per_datum(model, guide, torch.randn(4, 3))
    x = torch.randn(4, 2)
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^1 of 8 observed values at site 'x' are NaN .* index \(2, 1\)"):
        DiffusionELBO().per_datum(model, guide, x)
    mask = x.isfinite()
    assert DiffusionELBO().per_datum(model, guide, x, mask=mask).isfinite().all()
    model, guide = vdm(Linear(), num_layers=5, likelihood=ph.Bernoulli(torch.nn.Linear(2, 2)), **parts)
    with pytest.raises(ValueError, match=r"^8 of 8 observed values at site 'x' lie outside of the support of Bern"):
        DiffusionELBO().per_datum(model, guide, torch.full((4, 2), 0.5))
