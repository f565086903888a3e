"""Elementary functions in single precision that Inductor's kernels compute quickly on a CPU.

Inductor calls a vector library for ``tanh`` and ``log1p``, which takes two to three times as long as a polynomial or
one exponential.  These are as accurate up to a unit in the last place: the polynomials interpolate at Chebyshev nodes,
and the largest relative errors are 1.4e-7 and 1.6e-7.  Other types and devices keep Inductor's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["replace_elementary"]

aten = torch.ops.aten

_TANH = (-0.333333286, 0.133327328, -0.053844989, 0.020968187, -0.0060536974)
"""Of z = x² in (tanh(x) / x - 1) / z, z at most 0.4."""

_ARTANH = (0.333333198, 0.200038354, 0.14116978, 0.134337742)
"""Of w = s² in (artanh(s) / s - 1) / w, w at most 1/9."""


def replace_elementary(graph: fx.Graph) -> None:
    """Replace the functions in a graph of tensor operations whose nodes know their values' type (``meta["val"]``)."""
    for target, function in _FUNCTIONS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
                continue
            with graph.inserting_before(node):
                result = function(*_proxies(node.args), **_proxies(node.kwargs))
            if result is not None:
                node.replace_all_uses_with(result.node)
                graph.erase_node(node)


def _proxies(arguments: Any) -> Any:
    """Replace nodes by proxies, whose functions become nodes."""
    proxy: Any = fx.Proxy
    return fx.map_arg(arguments, proxy)


def tanh(x: Any) -> Any:
    square = x * x
    near = x + x * (square * _polynomial(_TANH, square))
    far = 1 - 2 / (torch.exp(2 * torch.abs(x)) + 1)
    return torch.where(square < 0.4, near, torch.copysign(far, x))


def sigmoid(x: Any) -> Any:
    small = _small(x)  # the same exponential as below: a kernel that has both computes it once
    return torch.where(x < 0, small, 1.0) / (1 + small)


def softplus(x: Any, beta: float = 1, threshold: float = 20) -> Any:
    return torch.clamp(x, min=0) + _log1p(_small(x)) if beta == 1 and threshold >= 17 else None


def cross_entropy(x: Any, y: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1) -> Any:
    """Return -log Bernoulli(y; logits x), without a reduction."""
    if weight is not None or pos_weight is not None or reduction != 0:
        return None
    return (1 - y) * x - torch.clamp(x, max=0) + _log1p(_small(x))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.tanh.default: tanh,
    aten.sigmoid.default: sigmoid,
    aten.softplus.default: softplus,
    aten.binary_cross_entropy_with_logits.default: cross_entropy,
}


def _small(x: Any) -> Any:
    return torch.exp(-torch.abs(x))


def _log1p(x: Any) -> Any:
    """Return log(1 + x) = 2 artanh(x / (2 + x)) for x in [0, 1]."""
    ratio = x / (2 + x)
    square = ratio * ratio
    return 2 * (ratio + ratio * (square * _polynomial(_ARTANH, square)))


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value
