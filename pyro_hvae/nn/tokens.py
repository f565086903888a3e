"""Denoisers of categories: integers z and a noise level to logits, ``forward(z, gamma, context=None)``.

z holds integers in 0, ..., C, of which C is the mask of absorbing noise; the logits are those of the C categories, in a
last dim of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_hvae.nn.denoisers import Conditioning, DenoisingMLP, UNet
from pyro_hvae.nn.layers import flatten_leading

__all__ = ["TokenMLP", "TokenTransformer", "TokenUNet"]


class TokenMLP(nn.Module):
    r"""Denoiser of few entries: a :class:`DenoisingMLP` of their one-hot vectors.

    Args:
        event_shape: of one datum; a number is a length.
        num_categories: C.
        hidden, num_layers, context_features: as :class:`DenoisingMLP`.

    Raises:
        ValueError: at the call, for z of another shape.

    Example:
        >>> z = torch.tensor([[0, 3, 2, 3, 1]])
        >>> TokenMLP(5, 3)(z, torch.zeros(1)).shape
        torch.Size([1, 5, 3])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_categories: int,
        hidden: int = 128,
        num_layers: int = 3,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        self.num_categories = num_categories
        entries = math.prod(self.event_shape)
        self.net = DenoisingMLP(
            entries * (num_categories + 1),
            hidden,
            num_layers,
            context_features,
            out_features=entries * num_categories,
        )

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Tensor:
        """Map integers (..., *event_shape) and (...) to logits (..., *event_shape, C)."""
        dims = len(self.event_shape)
        if z.shape[z.dim() - dims :] != self.event_shape:
            raise ValueError(f"TokenMLP needs z of shape (..., {self.event_shape}), got {tuple(z.shape)}.")
        states = torch.arange(self.num_categories + 1, device=z.device)
        vectors = (z.unsqueeze(-1) == states).flatten(-dims - 1)  # F.one_hot would wait for the device
        logits = self.net(vectors.to(self.net.input.weight.dtype), gamma, context)
        return logits.reshape(*logits.shape[:-1], *self.event_shape, self.num_categories)


class TokenUNet(nn.Module):
    r"""Denoiser of images of categories: embeddings of the pixels as channels of a :class:`UNet`.

    Args:
        num_categories: C.
        in_channels: channels of z.
        embedding: width of a pixel's embedding, for each channel.
        channels, context_features: as :class:`UNet`.

    Raises:
        ValueError: at the call, for z with too few dims or another number of channels.

    Example:
        >>> TokenUNet(2, channels=(8, 16))(torch.zeros(5, 1, 8, 8), torch.zeros(5)).shape
        torch.Size([5, 1, 8, 8, 2])
    """

    def __init__(
        self,
        num_categories: int,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        context_features: int = 0,
        embedding: int = 8,
    ) -> None:
        super().__init__()
        self.num_categories, self.in_channels = num_categories, in_channels
        self.embed = nn.Embedding(num_categories + 1, embedding)
        self.net = UNet(
            in_channels * embedding, channels, context_features, out_channels=in_channels * num_categories
        )

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Tensor:
        """Map integers (..., C', H, W) and (...) to logits (..., C', H, W, C)."""
        if z.dim() < 3 or z.shape[-3] != self.in_channels:
            raise ValueError(f"TokenUNet needs z of shape (..., {self.in_channels}, H, W), got {tuple(z.shape)}.")
        image = self.embed(z.long()).movedim(-1, -3).flatten(-4, -3)
        return self.net(image, gamma, context).unflatten(-3, (self.in_channels, self.num_categories)).movedim(-3, -1)


class TokenTransformer(nn.Module):
    r"""Denoiser of sequences: torch's encoder layers, with learned positions and without dropout.

    Args:
        length: L, entries of a sequence.
        num_categories: C.
        features: width of the layers, divisible by ``num_heads``, even.
        num_heads: heads of attention.
        num_layers: layers.
        context_features: c, width of the context or number of classes; 0 for none.

    Raises:
        ValueError: for widths that do not fit; at the call, for sequences of another length.

    Reference: Attention Is All You Need (Vaswani et al., 2017).

    Example:
        >>> TokenTransformer(6, 27)(torch.zeros(4, 6), torch.zeros(4)).shape
        torch.Size([4, 6, 27])
    """

    def __init__(
        self,
        length: int,
        num_categories: int,
        features: int = 64,
        num_heads: int = 4,
        num_layers: int = 2,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        if features % num_heads or features % 2 or features < 4:
            raise ValueError(
                f"features must be even, at least 4 and a multiple of num_heads={num_heads}; got {features}."
            )
        self.length = length
        self.conditioning = Conditioning(features, context_features)
        self.embed = nn.Embedding(num_categories + 1, features)
        self.position = nn.Parameter(0.1 * torch.randn(length, features))
        layer = nn.TransformerEncoderLayer(
            features, num_heads, 4 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(features), enable_nested_tensor=False)
        self.output = nn.Linear(features, num_categories)

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Tensor:
        """Map integers (..., L) and (...) to logits (..., L, C)."""
        if not z.dim() or z.shape[-1] != self.length:
            raise ValueError(f"TokenTransformer needs z of shape (..., {self.length}), got {tuple(z.shape)}.")
        hidden = self.embed(z.long()) + self.position
        hidden = hidden + self.conditioning(gamma, context).unsqueeze(-2)
        (flat,), lead = flatten_leading((hidden,), (2,))
        logits = self.output(self.layers(flat))
        return logits.reshape(lead + logits.shape[1:])
