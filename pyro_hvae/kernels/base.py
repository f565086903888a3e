"""Base of the kernels: a network, and the rule by which it is called."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_hvae.arguments import check_count

__all__ = ["Kernel", "WithoutContext", "halves", "join", "pieces", "takes_context"]


class Kernel(PyroModule):
    """Base of the kernels here: holds a network and calls it by the rule of this module.

    A kernel need not inherit from this: any module with the same ``forward`` will do.

    Args:
        net: network from the parent to the parameters, or ``None``. A ``PyroModule`` with ``PyroSample``
            weights makes a Bayesian kernel.
        event_dim: number of dims of one datum's event, >= 0.

    Attributes:
        infer: what the chain passes to ``pyro.sample(..., infer=)`` for this kernel, or ``None``.
    """

    infer: dict[str, Any] | None = None

    def __init__(self, net: nn.Module | None = None, event_dim: int = 1) -> None:
        super().__init__()
        check_count("event_dim", event_dim, 0)
        if net is not None and not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}.")
        self.event_dim = event_dim
        self._net_takes_context = net is not None and takes_context(net)
        if net is not None:
            self.net = net

    @property
    def masked_value(self) -> float:
        """What a guide's first kernel gets for masked entries: its network's ``masked_value``, or 0."""
        return getattr(self._modules.get("net"), "masked_value", 0.0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the distribution; within a chain, register parameters only while the chain does."""
        if self._pyro_name and not self._pyro_context.active:
            return nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def parameters_of(self, parent: Tensor | None, context: Tensor | None) -> Tensor:
        """Call the network on the parent and the context, those of them that are not ``None``."""
        net = self.net
        if context is None:
            if parent is None:
                raise ValueError(
                    f"{type(self).__name__} got neither a parent nor a context, so its network has no input. Start the "
                    "chain with StandardNormal(...), or pass context=."
                )
            return net(parent)
        if parent is None:
            return net(context)
        if self._net_takes_context:
            return net(parent, context)
        return net(join(parent, context))

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        """Return the distribution of this site given its parent (..., d) and context (..., c)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(parent, context=None).")


def takes_context(net: nn.Module) -> bool:
    """Return whether a network takes a context: by its ``takes_context``, or a second argument of ``forward``."""
    declared = getattr(net, "takes_context", None)
    if isinstance(declared, bool):
        return declared
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        arguments = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(argument.kind in positional for argument in arguments) >= 2


def join(parent: Tensor, context: Tensor) -> Tensor:
    """Concatenate parent (..., d) and context (..., c) to (..., d + c), leading dims broadcast."""
    if parent.shape[:-1] != context.shape[:-1]:
        lead = torch.broadcast_shapes(parent.shape[:-1], context.shape[:-1])
        parent = parent.expand(lead + parent.shape[-1:])
        context = context.expand(lead + context.shape[-1:])
    return torch.cat([parent, context], -1)


def halves(kernel: Kernel, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Split a network's output in two along the first event dim."""
    first, second = pieces(kernel, parameters, 2)
    return first, second


def pieces(kernel: Kernel, parameters: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split a network's output in ``count`` equal pieces along the first event dim."""
    if parameters.dim() < kernel.event_dim or parameters.shape[-kernel.event_dim] % count:
        words, size = ("two", "an even size") if count == 2 else (str(count), f"a multiple of {count}")
        raise ValueError(
            f"{type(kernel).__name__} needs a network that yields {words} parameters a variable, so {size} along dim "
            f"{-kernel.event_dim}; it yielded shape {tuple(parameters.shape)}. Make the network's output {count} * d "
            "wide."
        )
    return parameters.chunk(count, -kernel.event_dim)


class WithoutContext(PyroModule):
    """Call a kernel without the chain's context.

    Args:
        kernel: any kernel.

    Example:
        >>> from pyro_hvae.kernels import Bernoulli
        >>> WithoutContext(Bernoulli(nn.Linear(2, 1)))(torch.zeros(3, 2), torch.zeros(3, 9)).event_shape
        torch.Size([1])
    """

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel
        self.infer = getattr(kernel, "infer", None)

    def forward(self, parent: Tensor | None, context: Tensor | None = None) -> TorchDistribution:
        return self.kernel(parent)
