"""Inductor: passes over its graphs, and its cache on disk."""

import os
import subprocess
import sys

import pytest
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


def test_a_library_that_a_killed_process_left_half_written_is_compiled_again(monkeypatch, tmp_path):
    from pyro_hvae.training.compile import program

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    broken, foreign = tmp_path / "cache" / "ab" / "kernel.so", tmp_path / "foreign.so"
    broken.parent.mkdir(parents=True)
    tried = []

    def compiled(module, tensors, noise, instructions):
        tried.append(instructions)
        if module.exists():
            raise ImportError(f"{module}: file too short", path=str(module))
        return module

    monkeypatch.setattr(program, "_compiled", compiled)
    for library in (broken, foreign):
        library.write_bytes(b"\x7fELF")
    assert program.compile_graph(broken, [], "eager") == broken
    assert tried == [True, True]
    with pytest.raises(ImportError, match="too short"):
        program.compile_graph(foreign, [], "eager")
    assert foreign.exists()  # no file of Inductor's


_TWO_STEPS = """
import torch, pyro_hvae as ph
torch.manual_seed(0)
model, guide = ph.vae(8, 2, hidden=(4,))
objective = ph.TraceELBO()(model, guide)
x = torch.ones(5, 8)
step = ph.compile_step(objective, torch.optim.Adam(objective.parameters(), fused=True), x)
print(float(step(x)), float(step(x)), step.fallback)
"""


@pytest.mark.slow
def test_a_run_starts_where_half_written_libraries_are_in_the_cache(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def run():
        done = subprocess.run([sys.executable, "-c", _TWO_STEPS], env=environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-2000:]
        return done.stdout

    first = run()
    libraries = list(tmp_path.rglob("*.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(library.read_bytes()[:100])
    assert run() == first
    assert first.split()[2] == "None"
