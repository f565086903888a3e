r"""Matrix products by the library that is fastest for their shape on this processor, found by measuring.

torch gives float32 products of dense matrices to its BLAS (MKL, mostly); oneDNN, which it brings along too, is up to
twice as fast on some processors and shapes, and slower on others.  The two round differently, so a choice belongs to
a run: it is written into the checkpoint, and a resumed run does not measure again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["assign_products"]

aten = torch.ops.aten


def assign_products(module: fx.GraphModule, chosen: dict[str, str], repeats: int = 15) -> None:
    """Send each float32 product of a graph on a CPU to the library of its shape.

    Args:
        module: the graph; changed in place.
        chosen: ``"blas"`` or ``"onednn"`` by shape and strides; what is missing is measured and added.
        repeats: how often a product is run by each library, in turn; the shortest time counts.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for node in list(module.graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        left, right, bias = operands
        a, b = left.meta["val"], right.meta["val"]
        key = f"{tuple(a.shape)}{tuple(a.stride())} {tuple(b.shape)}{tuple(b.stride())} {bias is not None}"
        if key not in chosen:
            chosen[key] = _fastest(a, b, bias is not None, repeats)
        if chosen[key] == "onednn":
            with module.graph.inserting_before(node):
                product = module.graph.call_function(_onednn(), (left, right, bias))
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()


def _operands(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Left, right and bias of a product that either library can do."""
    args: Any = node.args
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target is aten.mm.default:
        (left, right), bias = args, None
    elif node.target is aten.addmm.default:
        bias, left, right = args
    else:
        return None
    values: list[Any] = [operand.meta["val"] for operand in (left, right, bias) if operand is not None]
    if any(value.dtype != torch.float32 or value.device.type != "cpu" for value in values):
        return None
    if bias is not None and values[-1].dim() != 1:
        return None
    return left, right, bias


def _fastest(a: Tensor, b: Tensor, with_bias: bool, repeats: int) -> str:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        left, right = (torch.empty_strided(v.shape, v.stride()).normal_() for v in (a, b))
        bias = torch.randn(b.shape[1]) if with_bias else None

        def blas() -> Tensor:
            return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)

        calls: dict[str, Callable[[], Tensor]] = {"blas": blas, "onednn": lambda: _onednn()(left, right, bias)}
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return min(best, key=lambda name: best[name])


@functools.cache
def _onednn() -> Any:
    """The product as an operator that compilers leave alone; defined at its first use."""
    library = torch.library.Library("pyro_hvae", "FRAGMENT")
    library.define("onednn_product(Tensor left, Tensor right, Tensor? bias) -> Tensor")
    linear = torch.ops.mkldnn._linear_pointwise

    def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return linear(left, right.t(), bias, "none", [], "")

    library.impl("onednn_product", product, "CPU")
    torch.library.register_fake(
        "pyro_hvae::onednn_product",
        lambda left, right, bias: left.new_empty(left.shape[0], right.shape[1]),
        lib=library,
    )
    _kept.append(library)
    return torch.ops.pyro_hvae.onednn_product.default


_kept: list[torch.library.Library] = []
