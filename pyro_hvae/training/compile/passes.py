"""Passes over Inductor's graphs; loaded where a graph is compiled, since Inductor is slow to load."""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

__all__ = ["SplitBias"]

aten = torch.ops.aten


class SplitBias(CustomGraphPass):
    """Add a bias after the product: then Inductor fuses the addition with what follows.

    ``addmm`` copies the bias over its whole result first, in a pass of its own.  Run after Inductor's own passes, which
    join product and addition on a CPU.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, left, right = node.args
            if node.kwargs:
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (left, right))
                product.meta["val"] = node.meta["val"]
                total = graph.call_function(aten.add.Tensor, (product, bias))
                total.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> str:
        return "pyro_hvae.split_bias.1"
