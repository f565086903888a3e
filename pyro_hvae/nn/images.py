"""Convolutions between images and vectors, for encoders and decoders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_hvae.nn.layers import context_features as known_context
from pyro_hvae.nn.layers import fill, flatten_leading

__all__ = ["ConvDecoder", "ConvEncoder"]


class ConvEncoder(nn.Module):
    """Images to a vector: convolutions that halve the image, then one linear layer. (..., C, H, W) to (..., out).

    Args:
        event_shape: (C, H, W), any size: odd sizes are rounded up when halved.
        out_features: width of the output, e.g. 2 d for a ``Gaussian`` kernel.
        channels: channels after each halving.
        activation: makes the activation.
        context_features: c, width of the context or number of classes; 0 for none.  The context joins the image's
            features before the last layer.

    Raises:
        ValueError: for an ``event_shape`` that is no image, or at the call for images or a context of another shape.

    Example:
        >>> ConvEncoder((1, 8, 8), 2 * 4)(torch.zeros(5, 3, 1, 8, 8)).shape
        torch.Size([5, 3, 8])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (32, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        *,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.context_features = context_features
        self.event_shape, sizes = _image_sizes(event_shape, len(channels))
        layers: list[nn.Module] = []
        for left, right in itertools.pairwise([self.event_shape[0], *channels]):
            layers += [nn.Conv2d(left, right, 3, stride=2, padding=1), activation()]
        self.convolutions = nn.Sequential(*layers)
        self.output = nn.Linear(channels[-1] * math.prod(sizes[-1]) + context_features, out_features)

    def forward(self, image: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (..., C, H, W), and (..., c) or integer labels (...), to (..., out)."""
        if image.dim() < 3 or tuple(image.shape[-3:]) != self.event_shape:
            shape = ", ".join(str(size) for size in self.event_shape)
            raise ValueError(f"ConvEncoder needs images of shape (..., {shape}), got {tuple(image.shape)}.")
        (flat,), lead = flatten_leading((image,), (3,))
        features = self.convolutions(flat).flatten(1)
        if context is None and not self.context_features:
            result = self.output(features)
            return result.reshape(lead + result.shape[1:])
        context = known_context(context, self.context_features, features, "ConvEncoder")
        features = features.reshape(lead + features.shape[1:])
        shape = torch.broadcast_shapes(lead, context.shape[:-1])
        return self.output(torch.cat([features.expand(*shape, -1), context.expand(*shape, -1)], -1))


class ConvDecoder(nn.Module):
    """A vector to images: one linear layer, then doublings with convolutions. (..., in) to (..., C, H, W).

    Images are doubled by nearest neighbours and then convolved, which avoids checkerboard artefacts.

    Args:
        in_features: width of the input.
        event_shape: (C, H, W) of the output, any size; for a kernel with two parameters a pixel double C.
        channels: channels before each doubling, coarse to fine.
        activation: makes the activation.
        output_bias: where the output starts, (C, H, W) or a number; e.g. ``logit_of_mean(x)``.
        context_features: c, width of the context or number of classes, joined to the input; 0 for none.  A kernel joins
            its context to the input of a decoder without it, whose ``in_features`` is then d + c.

    Raises:
        ValueError: for an ``event_shape`` that is no image, an ``output_bias`` of another shape, or at the call a
            context of another width.

    Example:
        >>> ConvDecoder(4, (1, 8, 8))(torch.zeros(5, 3, 4)).shape
        torch.Size([5, 3, 1, 8, 8])
    """

    def __init__(
        self,
        in_features: int,
        event_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        activation: Callable[[], nn.Module] = nn.SiLU,
        *,
        output_bias: Tensor | float | None = None,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.context_features = context_features
        self.takes_context = context_features > 0
        self.event_shape, sizes = _image_sizes(event_shape, len(channels))
        coarse, *self.finer = sizes[::-1]
        self.first = (channels[0], *coarse)
        self.input = nn.Sequential(nn.Linear(in_features + context_features, math.prod(self.first)), activation())
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(left, right, 3, padding=1), activation())
            for left, right in itertools.pairwise([*channels, channels[-1]])
        )
        self.output = nn.Conv2d(channels[-1], self.event_shape[0], 3, padding=1, bias=False)
        self.bias = nn.Parameter(torch.zeros(self.event_shape))
        if output_bias is not None:
            fill(self.bias, output_bias, "output_bias")

    def forward(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (..., in), and (..., c) or integer labels (...), to (..., C, H, W)."""
        if context is not None or self.context_features:
            context = known_context(context, self.context_features, value, "ConvDecoder")
            shape = torch.broadcast_shapes(value.shape[:-1], context.shape[:-1])
            value = torch.cat([value.expand(*shape, -1), context.expand(*shape, -1)], -1)
        (flat,), lead = flatten_leading((value,), (1,))
        image = self.input(flat).reshape(-1, *self.first)
        for size, convolution in zip(self.finer, self.convolutions, strict=True):
            image = convolution(F.interpolate(image, size=size, mode="nearest"))
        return (self.output(image) + self.bias).reshape(lead + self.event_shape)


def _image_sizes(event_shape: Sequence[int], num_halvings: int) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Return the event shape, and (height, width) before and after each halving."""
    if len(event_shape) != 3 or min(event_shape) < 1:
        raise ValueError(f"event_shape must be (channels, height, width), got {tuple(event_shape)}.")
    if num_halvings < 1:
        raise ValueError("channels must name at least one level, got ().")
    sizes = [(event_shape[1], event_shape[2])]
    for _ in range(num_halvings):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return tuple(event_shape), sizes
