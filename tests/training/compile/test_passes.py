"""Passes over Inductor's graphs."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_hvae.training.compile.passes import SplitBias

aten = torch.ops.aten


def _split(function, *tensors):
    module = make_fx(function)(*tensors)
    SplitBias()(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def test_a_bias_is_added_after_the_product():
    bias, left, right = torch.randn(3).double(), torch.randn(4, 5).double(), torch.randn(5, 3).double()
    module = _split(lambda b, m, n: torch.tanh(torch.addmm(b, m, n)), bias, left, right)
    targets = [node.target for node in module.graph.nodes]
    assert aten.addmm.default not in targets
    assert aten.mm.default in targets
    expected = torch.tanh(bias + left @ right)
    torch.testing.assert_close(module(bias, left, right), expected, rtol=1e-14, atol=1e-14)


def test_a_product_with_factors_is_left_alone():
    bias, left, right = torch.randn(3).double(), torch.randn(4, 5).double(), torch.randn(5, 3).double()
    module = _split(lambda b, m, n: torch.addmm(b, m, n, beta=2.0, alpha=0.5), bias, left, right)
    torch.testing.assert_close(module(bias, left, right), 2.0 * bias + 0.5 * left @ right)
    assert aten.addmm.default in [node.target for node in module.graph.nodes]


def test_the_compiler_is_asked_for_its_instructions_only_where_it_fails(monkeypatch):
    """Asking takes as long as the graph of a small program; a setting of the user's is kept."""
    from torch._inductor import config

    from pyro_hvae.training.compile import program

    asked = []

    def compiled(module, tensors, noise, instructions):
        asked.append(instructions)
        if instructions:
            raise RuntimeError("unrecognised option -mavx512f")
        return module

    monkeypatch.setattr(program, "_compiled", compiled)
    assert program.compile_graph("graph", [], "eager") == "graph"
    assert asked == [True, None]
    with config.patch({"cpp.vec_isa_ok": False}):
        program.compile_graph("graph", [], "eager")
    assert asked == [True, None, False]
