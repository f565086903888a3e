"""Denoisers: networks of a noisy value and its noise level, ``forward(z, gamma, context=None)``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_hvae.arguments import ContextError, check_context, check_count
from pyro_hvae.nn.layers import flatten_leading

__all__ = ["Conditioning", "DenoisingMLP", "SignDenoiser", "TimeEmbedding", "UNet"]


class TimeEmbedding(nn.Module):
    r"""Sine features of gamma (the package's docstring has them), then two linear layers: (...) to (..., features).

    Args:
        features: width of the embedding, even, >= 4.
        periods: shortest and longest period, in units of gamma (nats of SNR).

    Raises:
        ValueError: for an odd width or one below 4.

    Example:
        >>> TimeEmbedding(16)(torch.linspace(-10, 5, 7)).shape
        torch.Size([7, 16])
    """

    frequencies: Tensor

    def __init__(self, features: int, periods: tuple[float, float] = (1.0, 100.0)) -> None:
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"features must be even and >= 4, for pairs of sine and cosine; got {features}.")
        shortest, longest = periods
        period = torch.logspace(math.log10(longest), math.log10(shortest), features // 2)
        self.register_buffer("frequencies", 2 * math.pi / period, persistent=False)
        self.layers = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, gamma: Tensor) -> Tensor:
        """Map (...) to (..., features)."""
        angle = gamma.to(self.frequencies.dtype).unsqueeze(-1) * self.frequencies
        return self.layers(torch.cat([angle.sin(), angle.cos()], -1))


class DenoisingMLP(nn.Module):
    r"""Denoiser for vectors: residual layers with gamma and a context as inputs.

    Args:
        features: d, width of z, and of the output unless ``out_features`` is set.
        hidden: width of the residual layers, even.
        num_layers: number of them.
        context_features: c, width of the context or number of classes; 0 for none.
        out_features: width of the output; default ``features``.

    Raises:
        ValueError: at the call, for a context where ``context_features=0``.

    Example:
        >>> DenoisingMLP(2)(torch.zeros(5, 7, 2), torch.tensor(-1.0)).shape
        torch.Size([5, 7, 2])
    """

    def __init__(
        self,
        features: int,
        hidden: int = 128,
        num_layers: int = 3,
        context_features: int = 0,
        out_features: int | None = None,
    ) -> None:
        super().__init__()
        check_count("features", features)
        check_count("hidden", hidden, 4)
        check_count("num_layers", num_layers)
        check_count("context_features", context_features, 0)
        self.conditioning = Conditioning(hidden, context_features)
        self.input = nn.Linear(features, hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(num_layers)
        )
        self.output = nn.Linear(hidden, out_features or features)

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (..., d), (...), and (..., c) or integer labels (...), to (..., d)."""
        embedding = self.conditioning(gamma, context)
        hidden = self.input(z)
        for layer in self.layers:
            hidden = hidden + layer(hidden + embedding)
        return self.output(hidden)


class SignDenoiser(nn.Module):
    r"""Denoiser of entries that are -1 or 1: what a noisy entry says of itself, plus a network.

    Given :math:`z = \alpha x + \sigma\epsilon` alone, the log odds of x = 1 are :math:`2\alpha z/\sigma^2`, and the
    network f adds what the other entries tell:

    .. math:: \mathrm E[x \mid z] \approx \tanh\bigl(\alpha z / \sigma^2 + f(z, \gamma)\bigr).

    With entries that are independent of each other the best f is constant, half the log odds of an entry, whereas a
    network that predicts the noise has to find the function of z anew at each level.

    Args:
        net: f, called with (z, gamma), or (z, gamma, context), to the shape of z.
        event_dim: dims of one datum, 1 or more.

    The output is an estimate of x: give ``parameterisation="x0"`` with it.

    Raises:
        ValueError: at the call, for gamma with more dims than z without its event dims.

    Example:
        >>> net = SignDenoiser(DenoisingMLP(2))
        >>> net(torch.tensor([[3.0, -3.0]]), torch.tensor([-6.0])).round()
        tensor([[ 1., -1.]], grad_fn=<RoundBackward0>)
    """

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__()
        check_count("event_dim", event_dim)
        self.net, self.event_dim = net, event_dim

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (..., *event_shape), (...) and a context to the shape of z, within [-1, 1]."""
        if gamma.dim() > max(0, z.dim() - self.event_dim):
            raise ValueError(
                f"SignDenoiser with event_dim={self.event_dim} needs one gamma a datum, got gamma {tuple(gamma.shape)} "
                f"for z {tuple(z.shape)}; diffusion.MeanLevel(...) passes the mean of a gamma for each entry."
            )
        level = gamma.reshape(gamma.shape + (1,) * self.event_dim)
        own = torch.exp(0.5 * F.logsigmoid(-level) - F.logsigmoid(level)) * z
        return torch.tanh(own + (self.net(z, gamma) if context is None else self.net(z, gamma, context)))


class UNet(nn.Module):
    r"""Small U-Net for images as a denoiser, the output shaped like z.

    Residual blocks with group normalisation, shifted by the embedding of gamma and of the context; each level halves
    the image (odd sizes rounded up), and each level of the way up gets the output of its counterpart on the way down.
    Good for 8 x 8 to 32 x 32.

    Args:
        in_channels: C of z, and of the output unless ``out_channels`` is set.
        channels: channels of each level, fine to coarse; two levels suit 8 x 8, three 28 x 28.
        context_features: c, width of the context or number of classes; 0 for none. A context that is left out
            contributes nothing, so one network can be trained with and without.
        out_channels: C of the output; default ``in_channels``.

    Raises:
        ValueError: at the call, for z with too few dims or another number of channels, or for a context where
            ``context_features=0``.

    Reference: U-Net (Ronneberger, Fischer and Brox, 2015); Denoising Diffusion Probabilistic Models (Ho et al., 2020).

    Example:
        >>> net = UNet(1, channels=(8, 16), context_features=10)
        >>> net(torch.zeros(5, 3, 1, 8, 8), torch.tensor(0.5), torch.tensor([0, 4, 9])).shape
        torch.Size([5, 3, 1, 8, 8])
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        context_features: int = 0,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        if not channels or min(in_channels, *channels) < 1:
            raise ValueError(f"every number of channels must be >= 1, got {in_channels} and {tuple(channels)}.")
        self.in_channels = in_channels
        width = max(8, 2 * channels[0])
        self.conditioning = Conditioning(width, context_features)
        self.input = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList(_ResidualBlock(count, count, width) for count in channels)
        self.halve = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in itertools.pairwise(channels)
        )
        self.middle = _ResidualBlock(channels[-1], channels[-1], width)
        self.up = nn.ModuleList(
            _ResidualBlock(fine + coarse, fine, width) for fine, coarse in itertools.pairwise([*channels, channels[-1]])
        )
        self.normalise = _group_norm(channels[0])
        self.output = nn.Conv2d(channels[0], out_channels or in_channels, 3, padding=1)
        with torch.no_grad():
            self.output.weight.mul_(0.1)  # output near zero at the start; every parameter has a gradient

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (..., C, H, W), (...), and (..., c) or integer labels (...), to (..., C, H, W)."""
        if z.dim() < 3 or z.shape[-3] != self.in_channels:
            raise ValueError(f"UNet needs z of shape (..., {self.in_channels}, H, W), got {tuple(z.shape)}.")
        (image, embedding), lead = flatten_leading((z, self.conditioning(gamma, context)), (3, 1))
        embedding = F.silu(embedding)
        image = self.input(image)
        skips = []
        for level, block in enumerate(self.down):
            image = block(self.halve[level - 1](image) if level else image, embedding)
            skips.append(image)
        image = self.middle(image, embedding)
        for block in reversed(self.up):
            skip = skips.pop()
            if image.shape[-2:] != skip.shape[-2:]:
                image = F.interpolate(image, size=skip.shape[-2:], mode="nearest")
            image = block(torch.cat([image, skip], 1), embedding)
        image = self.output(F.silu(self.normalise(image)))
        return image.reshape(lead + image.shape[1:])


class Conditioning(nn.Module):
    """Embed gamma and the context, and add the two; leading dims broadcast."""

    def __init__(self, features: int, context_features: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(features)
        self.context_features = context_features
        if context_features:
            self.context = nn.Linear(context_features, features)

    def forward(self, gamma: Tensor, context: Tensor | None) -> Tensor:
        embedding = self.time(torch.as_tensor(gamma))
        if context is None:
            return embedding
        if not self.context_features:
            raise ContextError("this denoiser takes no context: build it with context_features=.")
        check_context("this denoiser", context, self.context_features)
        if not context.is_floating_point():
            context = F.one_hot(context.long(), self.context_features)
        return embedding + self.context(context.to(embedding.dtype))


class _ResidualBlock(nn.Module):
    """Two convolutions around a shift by the embedding, added to their input."""

    def __init__(self, in_channels: int, out_channels: int, features: int) -> None:
        super().__init__()
        self.normalise1, self.normalise2 = _group_norm(in_channels), _group_norm(out_channels)
        self.convolution1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.convolution2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shift = nn.Linear(features, out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, image: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.convolution1(F.silu(self.normalise1(image))) + self.shift(embedding)[..., None, None]
        return self.skip(image) + self.convolution2(F.silu(self.normalise2(hidden)))


def _group_norm(channels: int) -> nn.GroupNorm:
    """Make up to four groups of two channels or more: a group of one channel would lose its mean."""
    return nn.GroupNorm(math.gcd(4, channels) if channels >= 8 else 1, channels)
