"""Linear networks, flattening of leading dims, and initial weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pyro_hvae.arguments import ContextError, check_context, check_count

__all__ = ["MLP", "Flattened", "fill", "flatten_leading", "logit_of_mean", "xavier_"]


class MLP(nn.Module):
    """Linear layers with an activation between them, on the last dim: (..., in) to (..., out).

    Args:
        in_features: width of the input, >= 1.
        out_features: width of the output, >= 1.
        hidden: widths of the hidden layers; ``()`` for one linear map.
        activation: makes the activation; called once a hidden layer.
        xavier: start from Xavier weights and zero biases, not from torch's default.
        output_bias: where the last bias starts, (out,) or a number; for Bernoulli pixels ``logit_of_mean(x)``.

    Raises:
        ValueError: for a width below 1, or an ``output_bias`` of another shape.

    Example:
        >>> MLP(8, 2 * 16)(torch.zeros(5, 3, 8)).shape
        torch.Size([5, 3, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (200, 200),
        activation: Callable[[], nn.Module] = nn.Tanh,
        *,
        xavier: bool = False,
        output_bias: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(hidden, str) or not isinstance(hidden, Iterable):
            raise ValueError(f"hidden must be a sequence of widths, got {hidden!r}.")
        if not callable(activation):
            raise ValueError(f"activation must be a class such as torch.nn.Tanh, got {activation!r}.")
        widths = [in_features, *hidden, out_features]
        for width in widths:
            check_count("every width", width)
        layers: list[nn.Module] = []
        for left, right in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(left, right), activation()]
        last = nn.Linear(widths[-2], widths[-1])
        self.layers = nn.Sequential(*layers, last)
        if xavier:
            xavier_(self)
        if output_bias is not None:
            fill(last.bias, output_bias, "output_bias")

    def forward(self, value: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.layers(value)


class Flattened(nn.Module):
    """Call a network that takes one batch dim on values with any number of them.

    Args:
        net: the network.
        *event_dims: the number of event dims of each argument of ``net``; leading dims broadcast among arguments.
            With two or more, a kernel passes its context as the second.

    Raises:
        ValueError: at the call, for more arguments than ``event_dims``, or a value with too few dims.

    Example:
        >>> net = Flattened(nn.Conv2d(1, 4, 3), 3)
        >>> net(torch.zeros(5, 7, 1, 8, 8)).shape
        torch.Size([5, 7, 4, 6, 6])
    """

    def __init__(self, net: nn.Module, *event_dims: int) -> None:
        super().__init__()
        if not event_dims or min(event_dims) < 0:
            raise ValueError(f"event_dims are numbers >= 0, one for each argument of net; got {event_dims}.")
        self.net = net
        self.event_dims = event_dims
        self.takes_context = len(event_dims) > 1

    def forward(self, value: Tensor, *others: Tensor) -> Tensor:
        """Call ``net`` on the arguments with their leading dims joined into one."""
        values = (value, *others)
        if len(values) > len(self.event_dims):
            raise ValueError(f"got {len(values)} arguments where event_dims are {self.event_dims}: name one for each.")
        flat, lead = flatten_leading(values, self.event_dims[: len(values)])
        result = self.net(*flat)
        return result.reshape(lead + result.shape[1:])


def context_features(context: Tensor | None, width: int, like: Tensor, name: str) -> Tensor:
    """Return a context (..., c), or integer labels (...) as one-hot vectors, in the dtype of ``like``.

    Raises:
        ValueError: for no context where the network has one, another width, or a context where it has none.
    """
    if not width:
        raise ContextError(f"{name} takes no context: build it with context_features=.")
    check_context(name, context, width)
    assert context is not None
    if not context.is_floating_point():
        return nn.functional.one_hot(context.long(), width).to(like.dtype)
    return context.to(like.dtype)


def flatten_leading(values: Sequence[Tensor], event_dims: Sequence[int]) -> tuple[list[Tensor], torch.Size]:
    """Broadcast the leading dims of the values and join them into one; return the values and those dims."""
    leads = []
    for value, event_dim in zip(values, event_dims, strict=True):
        if value.dim() < event_dim:
            raise ValueError(f"a value with {event_dim} event dims was expected, got shape {tuple(value.shape)}.")
        leads.append(value.shape[: value.dim() - event_dim])
    lead = torch.broadcast_shapes(*leads)
    flat = []
    for value, own in zip(values, leads, strict=True):
        event = value.shape[len(own) :]
        flat.append(value.expand(lead + event).reshape(math.prod(lead), *event))
    return flat, lead


def xavier_(module: nn.Module) -> nn.Module:
    """Draw every linear and convolutional weight of a module from Xavier's uniform, biases zero; return the module.

    Reference: Understanding the difficulty of training deep feedforward neural networks (Glorot and Bengio, 2010).

    Example:
        >>> xavier_(nn.Linear(4, 2)).bias.tolist()
        [0.0, 0.0]
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def logit_of_mean(x: Tensor, clip: float = 1e-3) -> Tensor:
    r"""Return the logit of the data's mean, clipped to [clip, 1 - clip], where a Bernoulli decoder's bias starts.

    Args:
        x: data (N, ...) in [0, 1].
        clip: smallest distance from 0 and 1, in (0, 1/2).

    Returns:
        Logits, shape ``x.shape[1:]``.

    Reference: Importance Weighted Autoencoders (Burda et al., 2016).

    Example:
        >>> logit_of_mean(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor([-6.9068,  0.0000,  0.0000])
    """
    if not 0 < clip < 0.5:
        raise ValueError(f"clip must lie in (0, 1/2), got {clip}.")
    return torch.logit(x.to(torch.get_default_dtype()).mean(0).clamp(clip, 1 - clip))


def fill(parameter: Tensor, value: Tensor | float, name: str) -> None:
    """Set a parameter to a value of its shape, or to a number."""
    value = torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device)
    if value.dim() and value.shape != parameter.shape:
        raise ValueError(f"{name} must have shape {tuple(parameter.shape)} or be a number, got {tuple(value.shape)}.")
    with torch.no_grad():
        parameter.copy_(value)
