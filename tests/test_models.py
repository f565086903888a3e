"""The ready-made pairs."""

import importlib
import inspect
import json

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_hvae import IWELBO, LayerwiseELBO, TraceELBO
from pyro_hvae.chains import Ladder
from pyro_hvae.models import hvae, ladder_vae, vae, vdm
from pyro_hvae.nn import DenoisingMLP

FACTORIES = {
    "vae": lambda shape=6, **options: vae(shape, 3, hidden=(8,), **options),
    "hvae": lambda shape=6, **options: hvae(shape, (3, 2), hidden=(8,), **options),
    "ladder": lambda shape=6, **options: ladder_vae(shape, (3, 2), hidden=(8,), **options),
}
LIKELIHOODS = {
    "bernoulli": {},
    "gaussian": {"min_scale": 0.01},
    "discretized_logistic": {"num_bins": 4},
    "poisson": {},
    "negative_binomial": {},
    "categorical": {"num_categories": 4},
}


def gradients(model, guide, x, *context, **options):
    loss = Trace_ELBO()(model, guide)(x, *context, **options)
    assert loss.isfinite()
    return torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("shape", [6, (6,), (1, 3, 2), (2, 3)])
def test_every_pair_samples_scores_and_has_a_gradient_in_every_parameter(factory, likelihood, shape):
    model, guide = FACTORIES[factory](shape, likelihood=likelihood, **LIKELIHOODS[likelihood])
    x = model(size=5)
    event = (shape,) if isinstance(shape, int) else shape
    assert x.shape == (5, *event)
    if x.dtype != torch.get_default_dtype():
        x = x.to(torch.get_default_dtype())
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model, guide, x))


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("shape", [6, (1, 3, 2)])
def test_context(factory, shape):
    model, guide = FACTORIES[factory](shape, context_dim=4)
    context = torch.randn(5, 4)
    x = model(context=context)
    found = gradients(model, guide, x, context)
    assert all(gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("bound", [TraceELBO(2), LayerwiseELBO(), IWELBO(3)])
def test_bounds_take_the_context_by_position_and_by_name(factory, bound):
    model, guide = FACTORIES[factory](context_dim=4)
    x, context = torch.zeros(5, 6), torch.randn(5, 4)
    torch.manual_seed(1)
    by_position = bound.per_datum(model, guide, x, context)
    torch.manual_seed(1)
    torch.testing.assert_close(bound.per_datum(model, guide, x, context=context), by_position)
    bound(model, guide)(x, context=context).backward()


def test_only_a_guide_in_the_models_direction_has_a_true_kl_below_the_top():
    x = torch.zeros(5, 6)
    terms = {name: set(LayerwiseELBO().terms(*make(), x)) for name, make in FACTORIES.items()}
    assert terms["vae"] == {"reconstruction", "kl_z1"}
    assert terms["hvae"] == {"reconstruction", "kl_z2", "rate_z1"}
    assert terms["ladder"] == {"reconstruction", "kl_z2", "kl_z1"}


@pytest.mark.parametrize("factory", FACTORIES)
def test_mask(factory):
    model, guide = FACTORIES[factory]((1, 3, 2))
    x = model(size=5)
    mask = torch.rand(x.shape) < 0.5
    gradients(model, guide, torch.where(mask, x, torch.nan), mask=mask)


def test_one_layer_is_the_vae_parameter_for_parameter():
    torch.manual_seed(4)
    model, guide = vae(6, 3, hidden=(8, 7))
    torch.manual_seed(4)
    model1, guide1 = hvae(6, (3,), hidden=(8, 7))
    for ours, theirs in ((model, model1), (guide, guide1)):
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
    x = model(size=5)
    torch.manual_seed(5)
    first = poutine.trace(guide).get_trace(x)
    torch.manual_seed(5)
    second = poutine.trace(guide1).get_trace(x)
    assert torch.equal(first.nodes["z1"]["value"], second.nodes["z1"]["value"])
    scored = [
        poutine.trace(poutine.replay(program, trace=trace)).get_trace(x)
        for program, trace in ((model, first), (model1, second))
    ]
    assert scored[0].log_prob_sum() == scored[1].log_prob_sum()


def test_ladder_has_the_model_of_hvae():
    torch.manual_seed(4)
    model, _ = hvae(6, (3, 2))
    torch.manual_seed(4)
    other, guide = ladder_vae(6, (3, 2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert isinstance(guide, Ladder)


def widths(net):
    return [layer.out_features for layer in net.modules() if isinstance(layer, nn.Linear)]


def test_hidden_a_layer_is_mirrored_in_the_decoder():
    """The two-layer architecture of Importance Weighted Autoencoders (Burda et al., 2016)."""
    model, guide = hvae(784, (100, 50), hidden=[(200, 150), (100, 80)])
    assert widths(guide.z1) == [200, 150, 200]
    assert widths(guide.z2) == [100, 80, 100]
    assert widths(model.z1) == [80, 100, 200]
    assert widths(model.x) == [150, 200, 784]
    _, ladder = ladder_vae(784, (100, 50), hidden=[(200, 150), (100, 80)])
    assert widths(ladder.z1) == [200, 150, 200]
    assert widths(ladder.z2) == [100, 80, 100]


@pytest.mark.parametrize("factory", FACTORIES)
def test_record_makes_the_same_programs_again(factory):
    model, guide = FACTORIES[factory]((2, 3), likelihood="discretized_logistic", num_bins=4, activation="relu")
    record = json.loads(json.dumps(model.factory))
    assert record == model.factory == guide.factory
    module, _, name = record["factory"].rpartition(".")
    again = getattr(importlib.import_module(module), name)(**record["args"])
    for made, other in zip((model, guide), again):
        made.load_state_dict(other.state_dict())
    assert again[0].factory == record


def test_factories_share_their_options():
    assert list(inspect.signature(hvae).parameters) == list(inspect.signature(ladder_vae).parameters)
    assert list(inspect.signature(hvae).parameters)[2:] == list(inspect.signature(vae).parameters)[2:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "bernouli"}, r"likelihood must be one of .*'bernoulli'.*got 'bernouli'"),
        ({"activation": "sine"}, "activation must be one of"),
        ({"scale": "log"}, "'softplus' or 'exp', got 'log'"),
        ({"likelihood": "categorical"}, "needs num_categories="),
        ({"hidden": [(8,), (8,), (8,)]}, "a sequence a layer, 2 of them"),
        ({"latent_dims": ()}, "at least one; got none"),
        ({"latent_dims": (3, 0)}, "latent_dims must be at least 1, got 0"),
        ({"event_shape": ()}, "event_shape must hold at least one size"),
        ({"event_shape": 0}, "event_shape must be at least 1, got 0"),
        ({"context_dim": -1}, "context_dim must be at least 0, got -1"),
    ],
)
@pytest.mark.parametrize("factory", [hvae, ladder_vae])
def test_refuses(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**{"event_shape": 6, "latent_dims": (3, 2), **options})


@pytest.mark.parametrize("shape", [0, (), (3, -1)])
def test_a_diffusion_refuses_events_without_size(shape):
    with pytest.raises(ValueError, match=r"event_shape must (hold|be) at least (one size|1)"):
        vdm(DenoisingMLP(2), event_shape=shape, num_layers=3)


def test_numpy_integers_are_sizes():
    model, _ = vae(np.int64(6), 2, hidden=(4,))
    assert model(size=3).shape == (3, 6)
    assert json.loads(json.dumps(model.factory)) == model.factory


def test_ladder_refuses_layers_without_features():
    with pytest.raises(ValueError, match="at least one hidden width"):
        ladder_vae(6, (3, 2), hidden=())
