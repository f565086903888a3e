"""Contexts of convolutional networks in chains, and lines between latents."""

import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae.kernels.base import takes_context
from pyro_hvae.nn import ConvDecoder, ConvEncoder, Flattened


def image_pair():
    torch.manual_seed(0)
    model = ph.TopDown(
        z=ph.StandardNormal(3), x=ph.Bernoulli(ConvDecoder(3, (1, 4, 4), (4, 4), context_features=2), event_dim=3)
    )
    guide = ph.BottomUp(z=ph.Gaussian(ConvEncoder((1, 4, 4), 2 * 3, (4, 4), context_features=2)))
    return model, guide


class TestImages:
    def test_context_reaches_both_programs(self):
        model, guide = image_pair()
        x, context = torch.bernoulli(torch.full((5, 1, 4, 4), 0.5)), torch.randn(5, 2)
        values = []
        for given in (context, context + 1.0):
            torch.manual_seed(1)
            values.append(ph.IWELBO(num_particles=4).per_datum(model, guide, x, given))
        assert values[0].shape == (5,)
        assert (values[0] != values[1]).all()
        loss = ph.TraceELBO().differentiable_loss(model, guide, x, context)
        gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
        assert all(gradient.any() for gradient in gradients)
        assert model(context=context).shape == (5, 1, 4, 4)

    def test_labels_are_one_hot_vectors(self):
        model, guide = image_pair()
        labels = torch.tensor([0, 1, 1])
        one_hot = torch.eye(2)[labels]
        z, x = torch.randn(6, 3, 3), torch.rand(3, 1, 4, 4)
        assert torch.equal(model.x(z, labels).base_dist.logits, model.x(z, one_hot).base_dist.logits)
        assert torch.equal(guide.z(x, labels).mean, guide.z(x, one_hot).mean)

    def test_particles_broadcast(self):
        encoder = ConvEncoder((1, 4, 4), 5, (4,), context_features=2)
        x, context = torch.rand(3, 1, 4, 4), torch.randn(6, 3, 2)
        found = encoder(x, context)
        assert found.shape == (6, 3, 5)
        torch.testing.assert_close(found[4], encoder(x, context[4]))

    def test_without_a_context_as_before(self):
        """A decoder whose in_features holds the context gets it joined, as ever."""
        assert not takes_context(ConvDecoder(3 + 2, (1, 4, 4), (4, 4)))
        kernel = ph.Bernoulli(ConvDecoder(3 + 2, (1, 4, 4), (4, 4)), event_dim=3)
        z, context = torch.randn(5, 3), torch.randn(5, 2)
        joined = kernel.net(torch.cat([z, context], -1))
        assert torch.equal(kernel(z, context).base_dist.logits, joined)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ConvEncoder((1, 4, 4), 5)(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3)), "context_features="),
            (lambda: ConvEncoder((1, 4, 4), 5, context_features=2)(torch.zeros(2, 1, 4, 4)), "got none: pass context="),
            (lambda: ConvDecoder(3, (1, 4, 4), context_features=2)(torch.zeros(2, 3), torch.zeros(2, 5)), "width 2"),
            (lambda: ConvDecoder(3, (1, 4, 4))(torch.zeros(2, 3), torch.zeros(2, 5)), "context_features="),
        ],
    )
    def test_refusals(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class TestFlattened:
    def test_two_arguments_take_the_context(self):
        class Net(nn.Module):
            def forward(self, image, label):
                assert image.dim() == 4
                assert label.dim() == 2
                return torch.cat([image.flatten(1).mean(-1, keepdim=True), label], -1)

        kernel = ph.Gaussian(Flattened(Net(), 3, 1))
        found = kernel(torch.ones(7, 5, 1, 2, 2), torch.full((5, 1), 3.0))
        assert found.batch_shape == (7, 5)
        assert torch.equal(found.mean, torch.ones(7, 5, 1))

    def test_one_argument_gets_the_joined_vector(self):
        kernel = ph.Gaussian(Flattened(nn.Linear(4 + 1, 2), 1))
        assert kernel(torch.zeros(3, 4), torch.zeros(3, 1)).batch_shape == (3,)


class TestInterpolate:
    def test_means_along_the_line(self):
        torch.manual_seed(0)
        model, guide = ph.hvae(6, (3, 2), hidden=(4,))
        a, b = torch.rand(4, 6), torch.rand(4, 6)
        found = ph.interpolate(model, guide, a, b, num_steps=5)
        ends = [ph.encode(guide, x, mean=True) for x in (a, b)]
        for i, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
            latents = {site: (1 - t) * ends[0][site] + t * ends[1][site] for site in ends[0]}
            torch.testing.assert_close(found[i], ph.decode(model, latents).mean)

    def test_with_a_context(self):
        model, guide = image_pair()
        found = ph.interpolate(model, guide, torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), context=torch.randn(2, 2))
        assert found.shape == (8, 2, 1, 4, 4)

    def test_refusals(self):
        model, guide = ph.vae(6, 2, hidden=(4,))
        with pytest.raises(ValueError, match="one shape"):
            ph.interpolate(model, guide, torch.zeros(2, 6), torch.zeros(3, 6))
        with pytest.raises(ValueError, match="num_steps must be >= 2"):
            ph.interpolate(model, guide, torch.zeros(2, 6), torch.zeros(2, 6), num_steps=1)
        model, guide = ph.vae(6, 2, hidden=(4,), likelihood="categorical", num_categories=3)
        with pytest.raises(ValueError, match="no mean"):
            ph.interpolate(model, guide, torch.zeros(2, 6), torch.zeros(2, 6))
