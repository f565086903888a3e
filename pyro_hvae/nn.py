"""Networks for kernels: they accept any number of leading dims (particles, data), and a context beside the parent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Multilayer perceptron over the last dims of its input.

    Args:
        in_shape: width, or shape of an event, which is flattened.
        out_shape: width, or shape of an event, which the output is folded into.
        hidden: widths of the hidden layers; none gives a linear map.
        activation: module class (or function that returns a module) between the layers.
        context_dim: width of a context that is joined to the flattened input.

    Raises:
        ValueError: for a width below 1.

    Example:
        >>> net = MLP((1, 4, 4), 3, hidden=(8,), context_dim=2)
        >>> net(torch.zeros(7, 5, 1, 4, 4), torch.zeros(5, 2)).shape
        torch.Size([7, 5, 3])
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int],
        hidden: Sequence[int] = (200, 200),
        activation: Callable[[], nn.Module] = nn.Tanh,
        *,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.in_shape = (in_shape,) if isinstance(in_shape, int) else tuple(in_shape)
        self.out_shape = (out_shape,) if isinstance(out_shape, int) else tuple(out_shape)
        widths = [math.prod(self.in_shape) + context_dim, *hidden, math.prod(self.out_shape)]
        if min(widths) < 1 or context_dim < 0:
            raise ValueError(f"every width of an MLP must be at least 1, got {widths} (context_dim={context_dim}).")
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Linear(before, after), activation()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (..., *in_shape) and a context (..., c) to (..., *out_shape)."""
        if len(self.in_shape) != 1:
            value = value.flatten(-len(self.in_shape)) if self.in_shape else value.unsqueeze(-1)
        if context is not None:
            lead = torch.broadcast_shapes(value.shape[:-1], context.shape[:-1])
            value = torch.cat([value.expand(*lead, -1), context.expand(*lead, -1)], -1)
        found = self.layers(value)
        return found if len(self.out_shape) == 1 else found.unflatten(-1, self.out_shape)
