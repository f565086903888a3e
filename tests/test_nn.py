"""Networks: leading dims are a batch, whatever their number; starts are where the docstrings say."""

import math

import pytest
import torch
from torch import nn

from pyro_hvae.bounds import DiffusionELBO
from pyro_hvae.diffusion import BinnedGaussian, LinearSchedule
from pyro_hvae.models import vdm
from pyro_hvae.nn import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    DenoisingMLP,
    Flattened,
    SignDenoiser,
    TimeEmbedding,
    TokenMLP,
    TokenTransformer,
    TokenUNet,
    UNet,
    logit_of_mean,
    xavier_,
)

IMAGES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (2, 7, 5)]


def per_item(net, *values):
    """Call the net on one datum at a time and stack: what every batch must equal."""
    lead = torch.broadcast_shapes(*(value.shape[:2] for value in values))
    rows = [[net(*(value[i : i + 1, j : j + 1] for value in values)) for j in range(lead[1])] for i in range(lead[0])]
    return torch.cat([torch.cat(row, 1) for row in rows], 0)


def unused(module):
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_mlp_is_its_layers():
    net = MLP(3, 2, hidden=(4,))
    x = torch.randn(5, 6, 3)
    first, last = net.layers[0], net.layers[2]
    expected = torch.tanh(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(net(x), expected)
    assert [type(layer) for layer in MLP(3, 2, hidden=()).layers] == [nn.Linear]


@pytest.mark.parametrize("event_shape", IMAGES)
def test_convolutions_treat_leading_dims_as_a_batch(event_shape):
    encoder, decoder = ConvEncoder(event_shape, 6, channels=(4, 8)), ConvDecoder(3, event_shape, channels=(8, 4))
    x, z = torch.randn(2, 3, *event_shape), torch.randn(2, 3, 3)
    assert encoder(x).shape == (2, 3, 6)
    assert decoder(z).shape == (2, 3, *event_shape)
    torch.testing.assert_close(encoder(x), per_item(encoder, x))
    torch.testing.assert_close(decoder(z), per_item(decoder, z))
    assert encoder(x[0, 0]).shape == (6,)
    assert decoder(z[0, 0]).shape == event_shape
    (encoder(x).square().sum() + decoder(z).square().sum()).backward()
    assert not unused(encoder)
    assert not unused(decoder)


@pytest.mark.parametrize("event_shape", IMAGES)
def test_unet_treats_leading_dims_as_a_batch(event_shape):
    net = UNet(event_shape[0], channels=(4, 8), context_features=3)
    z, gamma = torch.randn(2, 3, *event_shape), torch.randn(2, 3)
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]])
    whole = net(z, gamma, labels)
    assert whole.shape == z.shape
    torch.testing.assert_close(whole, per_item(net, z, gamma, labels))
    one_hot = nn.functional.one_hot(labels, 3).double()
    torch.testing.assert_close(whole, net(z, gamma, one_hot))
    whole.square().sum().backward()
    assert not unused(net)


@pytest.mark.parametrize("make", [lambda: UNet(1, (4, 8), 3), lambda: DenoisingMLP(8, 16, 2, 3)])
def test_denoisers_depend_on_gamma_and_context_and_broadcast(make):
    net = make()
    z = torch.randn(5, 2, 1, 8, 8) if isinstance(net, UNet) else torch.randn(5, 2, 8)
    base = net(z, torch.tensor(0.0))
    assert not torch.allclose(base, net(z, torch.tensor(3.0)))
    assert not torch.allclose(base, net(z, torch.tensor(0.0), torch.tensor(1)))
    torch.testing.assert_close(base, net(z, torch.zeros(5, 2)))
    torch.testing.assert_close(base, net(z, torch.zeros(2)))


def test_denoising_mlp_trains_every_parameter():
    net = DenoisingMLP(2, 8, 2, context_features=3)
    net(torch.randn(4, 5, 2), torch.randn(4, 5), torch.randn(4, 5, 3)).square().sum().backward()
    assert not unused(net)


def test_time_embedding_tells_neighbouring_layers_apart():
    features = TimeEmbedding(32)
    periods = 2 * math.pi / features.frequencies
    torch.testing.assert_close(periods[[0, -1]], torch.tensor([100.0, 1.0]))
    gamma = torch.linspace(-13.0, 5.0, 1000)
    embedded = features(gamma)
    assert embedded.shape == (1000, 32)
    assert (embedded[1:] - embedded[:-1]).norm(dim=-1).min() > 1e-3


def test_flattened_equals_one_datum_at_a_time_and_broadcasts():
    net = Flattened(nn.Conv2d(1, 2, 3), 3)
    x = torch.randn(2, 3, 1, 4, 4)
    torch.testing.assert_close(net(x), per_item(net, x))
    pair = Flattened(nn.Bilinear(3, 2, 4), 1, 1)
    left, right = torch.randn(5, 1, 3), torch.randn(6, 2)
    assert pair(left, right).shape == (5, 6, 4)
    torch.testing.assert_close(pair(left, right)[2, 4], pair.net(left[2, 0], right[4]))


def test_empty_batches_keep_their_shape():
    assert Flattened(nn.Conv2d(1, 2, 3), 3)(torch.zeros(0, 3, 1, 4, 4)).shape == (0, 3, 2, 2, 2)
    assert MLP(3, 2)(torch.zeros(0, 3)).shape == (0, 2)


def test_xavier_has_the_variance_it_names():
    net = xavier_(MLP(300, 100, hidden=(200,)))
    for layer in (net.layers[0], net.layers[2]):
        expected = 2 / sum(layer.weight.shape)
        assert layer.weight.var().item() == pytest.approx(expected, rel=0.03)
        assert not layer.bias.any()


def test_output_bias_starts_at_the_logit_of_the_clipped_mean():
    x = torch.tensor([[0.0, 1.0, 0.25], [0.0, 1.0, 0.25]])
    bias = logit_of_mean(x)
    torch.testing.assert_close(bias, torch.tensor([math.log(1e-3 / 0.999), math.log(0.999 / 1e-3), math.log(1 / 3)]))
    net = MLP(4, 3, xavier=True, output_bias=bias)
    torch.testing.assert_close(net(torch.zeros(4)), bias)  # tanh(0) = 0
    decoder = xavier_(ConvDecoder(2, (1, 8, 8), output_bias=-2.0))
    torch.testing.assert_close(decoder(torch.zeros(2)), torch.full((1, 8, 8), -2.0))


def test_networks_take_float32():
    net = UNet(1, (4, 8)).float()
    assert net(torch.zeros(2, 1, 8, 8, dtype=torch.float32), torch.tensor(0.5)).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP(3, 0), "every width must be at least 1, got 0"),
        (lambda: MLP(3, 2, output_bias=torch.zeros(5)), "output_bias must have shape \\(2,\\)"),
        (lambda: ConvEncoder((8, 8), 2), "event_shape must be \\(channels, height, width\\), got \\(8, 8\\)"),
        (lambda: ConvEncoder((1, 8, 8), 2)(torch.zeros(2, 1, 9, 8)), "1, 8, 8\\), got \\(2, 1, 9, 8\\)"),
        (lambda: UNet(3)(torch.zeros(2, 1, 8, 8), torch.tensor(0.0)), "needs z of shape \\(..., 3, H, W\\)"),
        (lambda: UNet(1)(torch.zeros(1, 8, 8), torch.tensor(0.0), torch.tensor(1)), "takes no context"),
        (lambda: TimeEmbedding(7), "features must be even and >= 4.*got 7"),
        (lambda: Flattened(nn.Identity()), "one for each argument of net; got \\(\\)"),
        (lambda: Flattened(nn.Identity(), 3)(torch.zeros(2, 2)), "3 event dims was expected, got shape \\(2, 2\\)"),
        (lambda: logit_of_mean(torch.zeros(2, 2), clip=0.5), "clip must lie in \\(0, 1/2\\), got 0.5"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TOKENS = {
    "mlp": (lambda context=0: TokenMLP((2, 3), 4, hidden=8, num_layers=1, context_features=context), (2, 3)),
    "transformer": (lambda context=0: TokenTransformer(5, 4, 8, 2, 1, context), (5,)),
    "unet": (lambda context=0: TokenUNet(4, 2, (4, 8), context, embedding=3), (2, 8, 8)),
}


@pytest.mark.parametrize("name", TOKENS)
def test_denoisers_of_categories_treat_leading_dims_as_a_batch(name):
    make, event = TOKENS[name]
    net = make(3)
    z, gamma, labels = torch.randint(0, 5, (2, 3, *event)), torch.randn(2, 3), torch.tensor([[0, 1, 2], [2, 1, 0]])
    whole = net(z, gamma, labels)
    assert whole.shape == (*z.shape, 4)
    torch.testing.assert_close(whole, per_item(net, z, gamma, labels))
    torch.testing.assert_close(net(z.double(), gamma, labels), whole)  # categories may be given as floats
    torch.testing.assert_close(net(z[0, 0], gamma[0, 0], labels[0, 0]), whole[0, 0])
    assert not torch.allclose(net(z, gamma), whole)
    assert not torch.allclose(net(z, gamma + 1, labels), whole)
    whole.square().sum().backward()
    assert not unused(net)
    with pytest.raises(ValueError, match="needs z of shape"):
        net(z[..., :1].flatten(-1)[..., 0], gamma)


def test_each_entry_of_a_transformer_sees_all_others():
    net = TokenTransformer(5, 4, 8, 2, 1)
    z = torch.zeros(5, dtype=torch.long)
    base = net(z, torch.tensor(0.0))
    for j in range(5):
        other = z.clone()
        other[j] = 4
        assert ((net(other, torch.tensor(0.0)) - base).abs().amax(-1) > 1e-6).all()
    with pytest.raises(ValueError, match="multiple of num_heads=3; got 8"):
        TokenTransformer(5, 4, 8, num_heads=3)


class Odds(nn.Module):
    """Half the log odds of each entry, whatever z is: the best network for entries that are independent."""

    def __init__(self, probs):
        super().__init__()
        self.log_odds = nn.Parameter(0.5 * torch.logit(probs))

    def forward(self, z, gamma):
        return self.log_odds.expand_as(z)


@pytest.mark.parametrize("event", [(3,), (1, 3), (3, 1, 1)])
def test_signs_are_denoised_by_bayes_rule(event):
    probs = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64).reshape(event)
    net = SignDenoiser(Odds(probs), event_dim=len(event))
    gamma = torch.tensor([[-6.0, -1.0], [0.5, 4.0]], dtype=torch.float64)
    z = torch.randn(2, 2, *event, dtype=torch.float64)
    level = gamma.reshape(2, 2, *(1 for _ in event))
    alpha, sigma = torch.sigmoid(-level).sqrt(), torch.sigmoid(level).sqrt()
    on, off = (torch.distributions.Normal(sign * alpha, sigma).log_prob(z) for sign in (1, -1))
    posterior = torch.sigmoid(on - off + torch.logit(probs))
    torch.testing.assert_close(net(z, gamma), 2 * posterior - 1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(z[0, 0], gamma[0, 0]), net(z, gamma)[0, 0])
    with pytest.raises(ValueError, match="one gamma a datum"):
        net(z, gamma.reshape(level.shape).expand_as(z))


def test_exact_denoiser_of_independent_signs_has_their_likelihood_for_its_bound():
    probs = torch.tensor([0.1, 0.4, 0.95], dtype=torch.float64)
    schedule = LinearSchedule(-6.0, 8.0)
    likelihood = BinnedGaussian(schedule, levels=2)
    model, guide = vdm(
        SignDenoiser(Odds(probs)), event_shape=3, num_layers=None, schedule=schedule, likelihood=likelihood,
        parameterisation="x0",
    )  # fmt: skip
    bits = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    exact = torch.distributions.Bernoulli(probs).log_prob(bits).sum(-1)
    torch.manual_seed(0)
    value = DiffusionELBO(20_000).per_datum(model, guide, 2 * bits - 1)
    assert (value - exact).abs().max() < 0.05  # the largest difference by time is 14 nats times a square below 1


def test_signs_are_finite_at_any_level():
    net = SignDenoiser(DenoisingMLP(2, 8, 1))
    z = torch.randn(5, 2, requires_grad=True)
    gamma = torch.tensor([-40.0, -20.0, 0.0, 20.0, 40.0])
    found = net(z, gamma)
    found.sum().backward()
    assert found.isfinite().all()
    assert (found.abs() <= 1).all()
    assert z.grad.isfinite().all()
