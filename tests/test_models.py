"""The ready-made pairs, and encoder and decoder as functions."""

import importlib
import inspect
import json

import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_hvae import IWELBO, LayerwiseELBO, TraceELBO
from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.coding import decode, encode, impute, reconstruct
from pyro_hvae.kernels import Categorical, LinearGaussian, StandardNormal
from pyro_hvae.ladder import Ladder
from pyro_hvae.models import hvae, ladder_vae, vae
from tests.linear_gaussian import Oracle, linear_gaussian

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
        ({"latent_dims": ()}, "at least one and each >= 1"),
        ({"latent_dims": (3, 0)}, "at least one and each >= 1"),
        ({"event_shape": ()}, "event_shape must hold at least one size"),
    ],
)
@pytest.mark.parametrize("factory", [hvae, ladder_vae])
def test_refuses(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**{"event_shape": 6, "latent_dims": (3, 2), **options})


def test_ladder_refuses_rungs_without_features():
    with pytest.raises(ValueError, match="at least one hidden width"):
        ladder_vae(6, (3, 2), hidden=())


class TestCoding:
    """Against the closed forms of a linear-Gaussian chain with its exact posterior."""

    def test_encode_draws_from_the_posterior(self):
        case = linear_gaussian(2)
        mean, cov = Oracle(case.model).posterior(case.x)
        drawn = encode(case.exact, case.x, num_draws=40_000)
        stacked = torch.cat([drawn["z1"], drawn["z2"]], -1)
        assert stacked.shape == (40_000, 5, 5)
        torch.testing.assert_close(stacked.mean(0), mean.detach(), rtol=0, atol=0.03)
        torch.testing.assert_close(stacked[:, 0].T.cov(), cov.detach(), rtol=0, atol=0.03)

    def test_mean_of_a_linear_chain_is_the_posterior_mean(self):
        case = linear_gaussian(2)
        mean, _ = Oracle(case.model).posterior(case.x)
        found = encode(case.exact, case.x, mean=True)
        torch.testing.assert_close(torch.cat([found["z1"], found["z2"]], -1), mean.detach())
        found = encode(case.exact, case.x, mean=True, num_draws=3)
        assert found["z1"].shape == (3, 5, 2)

    def test_reconstruct_is_the_mean_of_the_decoder(self):
        case = linear_gaussian(2)
        oracle = Oracle(case.model)
        mean, _ = oracle.posterior(case.x)
        expected = mean[:, :2] @ oracle.weight[1].T + oracle.bias[0]
        found = reconstruct(case.model, case.exact, case.x, num_draws=20_000)
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0.03)
        assert reconstruct(case.model, case.exact, case.x).shape == (5, 3)

    def test_impute_draws_from_the_predictive(self):
        """x1, x2 | z ~ N(w z, s^2): the guide of x1 alone is exact, so x2 given x1 must be."""
        w, s = torch.tensor([[1.5], [-0.8]]), torch.tensor([0.5, 0.7])
        model = TopDown(z1=StandardNormal(1), x=LinearGaussian(1, 2, weight=w, bias=False, scale=s))
        precision = 1 + w[0, 0] ** 2 / s[0] ** 2
        gain = w[0, 0] / s[0] ** 2 / precision
        guide = BottomUp(
            z1=LinearGaussian(2, 1, weight=torch.tensor([[gain, 0.0]]), bias=False, scale=precision.rsqrt().item())
        )
        x = torch.tensor([[1.2, torch.nan]])
        found = impute(model, guide, x, ~x.isnan(), num_draws=40_000)
        assert (found[..., 0] == 1.2).all()
        assert found[..., 1].mean() == pytest.approx((w[1, 0] * gain * 1.2).item(), abs=0.02)
        assert found[..., 1].var() == pytest.approx((w[1, 0] ** 2 / precision + s[1] ** 2).item(), abs=0.02)
        whole = impute(model, guide, torch.ones(3, 2), torch.tensor([True, False, True]))
        assert whole.shape == (3, 2)
        assert (whole[[0, 2]] == 1).all()
        assert not (whole[1] == 1).any()

    def test_decode_from_any_depth(self):
        model, _ = hvae(6, (3, 2), hidden=(8,))
        z1 = torch.randn(4, 3)
        logits = decode(model, {"z1": z1}).base_dist.logits
        torch.testing.assert_close(logits, model.x.net(z1).detach())
        assert decode(model, {"z2": torch.randn(7, 4, 2)}).shape() == (7, 4, 6)
        assert decode(model, {}, size=2).shape() == (2, 6)
        with pytest.raises(ValueError, match=r"\['z3'\] are no latents of 'model'"):
            decode(model, {"z3": z1})

    def test_no_gradient_is_kept(self):
        model, guide = vae(6, 3, hidden=(8,))
        assert not reconstruct(model, guide, model(size=2)).requires_grad

    def test_context_goes_to_both(self):
        model, guide = vae(6, 3, hidden=(8,), context_dim=2)
        x, context = torch.zeros(4, 6), torch.randn(4, 2)
        assert reconstruct(model, guide, x, context=context, num_draws=3).shape == (4, 6)

    def test_refuses(self):
        model = TopDown(z1=StandardNormal(2), x=Categorical(nn.Linear(2, 15), num_categories=5))
        guide = BottomUp(z1=LinearGaussian(3, 2))
        with pytest.raises(ValueError, match="has no mean: its values are categories"):
            reconstruct(model, guide, torch.zeros(4, 3))
        with pytest.raises(ValueError, match="num_draws must be >= 1, got 0"):
            encode(guide, torch.zeros(4, 3), num_draws=0)
