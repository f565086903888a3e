"""Conditioned diffusions: what is refused, and that programs are left as they are."""

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.evidence import condition, reconstruction_guidance
from tests.diffusion.test_conditioned import MODES, SIDE, Counts, linear


class Dropped(nn.Module):
    """A denoiser with noise in training mode."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, z, gamma):
        joined = torch.cat([z, gamma.unsqueeze(-1) / 5], -1)
        return self.net(joined.reshape(-1, 3)).reshape(z.shape)


def test_programs_are_left_as_they_are():
    model, _ = ph.vdm(Dropped(), event_shape=2, num_layers=5)
    likelihood = ph.LinearGaussian(2, 1)
    y = torch.tensor([[0.5]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states_before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(condition(model, y=y, likelihood=likelihood, num_particles=4, num_filters=5).x)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.manual_seed(3)
    quiet = condition(model.eval(), y=y, likelihood=likelihood, num_particles=4, num_filters=5)
    torch.testing.assert_close(results[0], quiet.x, rtol=0, atol=0)
    assert not model.training
    model.train()
    assert not torch.equal(condition(model, y=y, likelihood=likelihood, num_particles=4, num_filters=5).x, results[0])
    assert all(module.training for module in (*model.modules(), *likelihood.modules()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in (*model.parameters(), *likelihood.parameters()))
    assert (np.random.get_state()[1] == states_before[0]).all()  # noqa: NPY002
    assert random.getstate() == states_before[1]
    assert not list(pyro.get_param_store().keys())
    assert not results[0].requires_grad


class Flat(nn.Module):
    def forward(self, x, context=None):
        return dist.Normal(x, 1.0)


class Detached(nn.Module):
    def forward(self, x, context=None):
        return dist.Normal(x.detach(), 1.0).to_event(1)


Y = torch.tensor([[0.5]])
BAD = {
    "no likelihood": ({"likelihood": None}, TypeError, r"likelihood must be a kernel p\(y\|x\).*NoneType"),
    "a function": ({"likelihood": lambda x: x}, TypeError, "likelihood must be a kernel.*got function"),
    "another width": ({"likelihood": linear(torch.ones(1, 3), 1.0)}, ValueError, r"failed on x of shape \(1, 2\)"),
    "no event": ({"likelihood": Flat(), "y": torch.zeros(1, 2)}, ValueError, r"got \(1, 2\) and \(\): .*to_event"),
    "another y": ({"y": torch.zeros(1, 3)}, ValueError, r"event shape of y \(3,\), got \(1,\) and \(1,\)"),
    "one datum without its dim": ({"y": torch.zeros(())}, ValueError, "at least one datum.*unsqueeze"),
    "no data": ({"y": torch.zeros(0, 1)}, ValueError, "at least one datum"),
    "y is a list": ({"y": [0.5]}, TypeError, "y must be a torch.Tensor, got list"),
    "NaN": ({"y": torch.tensor([[math.nan]])}, ValueError, r"y is nan at index \(0, 0\)"),
    "infinite": ({"y": torch.tensor([[math.inf]])}, ValueError, r"y is inf at index \(0, 0\)"),
    "no count": (
        {"likelihood": Counts(), "y": torch.tensor([[1.0, -2.0]])},
        ValueError,
        r"lie outside of the support of Poisson; the first is -2.0 at index \(0, 1\)",
    ),
    "no gradient": ({"likelihood": Detached(), "y": torch.zeros(1, 2)}, ValueError, "no gradient with respect to x"),
    "another model": ({"model": ph.LinearGaussian(2, 1)}, TypeError, "needs a diffusion.*got LinearGaussian"),
    "particles": ({"num_particles": 0}, ValueError, "num_particles must be at least 1, got 0"),
    "filters": ({"num_filters": 2}, ValueError, "num_filters must be at least 5, got 2"),
    "threshold": ({"ess_threshold": 1.5}, ValueError, "ess_threshold must be a number in"),
    "scheme": ({"resample": "sytematic"}, ValueError, "did you mean 'systematic'"),
    "iterations": ({"cg_iterations": -1}, ValueError, "cg_iterations must be at least 0"),
    "error": ({"denoiser_error": -0.1}, ValueError, "denoiser_error must be a number of at least 0"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    "unknown": ({"particles": 3}, TypeError, "no option 'particles'; there are .*num_particles"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_refused(name):
    wrong, error, message = BAD[name]
    arguments = {"model": MODES.model(5), "y": Y, "likelihood": linear(SIDE, 1.0)} | wrong
    with pytest.raises(error, match=message):
        condition(arguments.pop("model"), **arguments)


def test_continuous_time_and_a_denoiser_without_gradient_are_refused():
    with pytest.raises(ValueError, match="continuous time has no layers to condition"):
        condition(MODES.model(None), y=Y, likelihood=linear(SIDE, 1.0))

    class Cut(nn.Module):
        def forward(self, z, gamma):
            return z.detach()

    model, _ = ph.vdm(Cut(), event_shape=2, num_layers=3, parameterisation="x0")
    with pytest.raises(ValueError, match="denoiser Cut has no gradient with respect to z"):
        condition(model, y=Y, likelihood=linear(SIDE, 1.0))


def test_a_datum_that_no_particle_explains_is_refused():
    class Never(nn.Module):
        def forward(self, x, context=None):
            return dist.Normal(x - torch.tensor(math.inf), 1.0, validate_args=False).to_event(1)

    with pytest.raises(ValueError, match="log-weight that is NaN"):
        condition(MODES.model(3), y=torch.zeros(1, 2), likelihood=Never())


def test_context_reaches_the_denoiser_and_images_keep_their_shape():
    """Each datum's own context; networks are called with dims for particles, filters and data."""
    torch.manual_seed(0)
    unet = ph.nn.UNet(1, channels=(4, 8), context_features=3)
    model, _ = ph.vdm(unet, event_shape=(1, 4, 4), num_layers=4, parameterisation="v")

    class Top(nn.Module):
        def forward(self, x, context=None):
            return dist.Normal(x[..., :2, :], 0.3).to_event(3)

    y, options = torch.zeros(2, 1, 2, 4), {"likelihood": Top(), "num_particles": 3, "num_filters": 5}
    results = []
    for context in (torch.zeros(2, 3), torch.eye(3)[:2]):
        torch.manual_seed(1)
        results.append(condition(model, y=y, context=context, **options))
    assert results[0].x.shape == (15, 2, 1, 4, 4)
    assert not torch.allclose(results[0].value, results[1].value)
    drawn = reconstruction_guidance(model, y=y, likelihood=Top(), context=torch.zeros(2, 3), num_draws=2)
    assert drawn.shape == (2, 2, 1, 4, 4)
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        reconstruction_guidance(model, y=y, likelihood=Top(), num_draws=0)
