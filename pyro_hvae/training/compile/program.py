"""One graph: traced for one layout of a batch, compiled, checked and called."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from pyro_hvae.training.compile.elementary import replace_elementary
from pyro_hvae.training.compile.graph import FlatGraph, kept_values
from pyro_hvae.training.compile.update import FusedAdam

__all__ = ["CompileMismatchError", "Program", "compile_graph", "full_precision", "same"]

aten = torch.ops.aten


class CompileMismatchError(RuntimeError):
    """Error: a compiled step and the program differ under the same noise."""


class Program:
    """A flat graph of loss and gradients, compiled, with the optimiser's update of the parameters that it trains.

    Args:
        flat: the graph.
        adam: the update of ``flat.trained``.
        inputs: an example batch.
        backend, noise: as for :func:`~pyro_hvae.training.compile.compile_step`.
    """

    def __init__(
        self, flat: FlatGraph, adam: FusedAdam, inputs: Sequence[Tensor], backend: str, noise: str
    ) -> None:
        self.flat, self.adam = flat, adam
        self.call: Callable[..., Any] = flat.module
        if backend == "inductor":
            self.call = compile_graph(flat.module, [*flat.tensors, *inputs], noise)

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the loss and the gradients of ``flat.trained``."""
        with torch.no_grad():
            return self.call(*self.flat.tensors, *inputs)

    def verify(self, inputs: Sequence[Tensor], noise: Tensor, labels: list[str]) -> None:
        """Compare the compiled graph with the flat graph under one noise.

        Raises:
            CompileMismatchError: if they differ by more than round-off.
        """
        results = []
        for call in (self.call, self.flat.module):
            with torch.random.fork_rng(), torch.no_grad(), kept_values(self.flat.tensors), full_precision():
                torch.set_rng_state(noise)
                results.append([value.clone() for value in call(*self.flat.tensors, *inputs)])
        same("the compiled graph", labels, results[0], results[1])


def compile_graph(module: fx.GraphModule, tensors: Sequence[Tensor], noise: str) -> Callable[..., Any]:
    """Compile a graph by Inductor.

    The inputs are fake tensors of one mode with a shape environment: without one, Inductor has no cache on disk, and
    every process compiles all graphs again.

    Inductor asks the compiler first whether it knows each set of instructions that the processor has, which takes as
    long as the graph of a small program.  So the answer is assumed, and asked for only where the compiler then fails.

    A process that is killed while it compiles may leave a library half-written in the cache: it is compiled again.
    """
    from torch._inductor import config

    if config.cpp.vec_isa_ok is not None:
        return _from_whole_libraries(module, tensors, noise, instructions=config.cpp.vec_isa_ok)
    try:
        return _from_whole_libraries(module, tensors, noise, instructions=True)
    except Exception:
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        valid_vec_isa_list.cache_clear()
        return _from_whole_libraries(module, tensors, noise, instructions=None)


def _from_whole_libraries(
    module: fx.GraphModule, tensors: Sequence[Tensor], noise: str, instructions: bool | None
) -> Callable[..., Any]:
    """Compile a graph; remove each library in the cache on disk that can't be loaded, and try again."""
    removed: set[Path] = set()
    while True:
        try:
            return _compiled(module, tensors, noise, instructions)
        except Exception as error:
            library = _cached_library(error)
            if library is None or library in removed:
                raise
            removed.add(library)
            library.unlink(missing_ok=True)


def _cached_library(error: Exception) -> Path | None:
    """Return the library of Inductor's cache that could not be loaded; None where this is not the error."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    inner = getattr(error, "inner_exception", error)
    if not isinstance(inner, ImportError) or inner.path is None:
        return None
    library = Path(inner.path)
    return library if library.suffix == ".so" and library.is_relative_to(cache_dir()) else None


def _compiled(
    module: fx.GraphModule, tensors: Sequence[Tensor], noise: str, instructions: bool | None
) -> Callable[..., Any]:
    """Compile a graph; ``instructions``: whether the compiler knows those of the processor, None to ask it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from pyro_hvae.training.compile.passes import SplitBias

        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
        examples = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in tensors]
        owned = _owned(module, keep_draws=noise == "eager")
        settings = {"fallback_random": noise == "eager", "post_grad_custom_post_pass": SplitBias()}
        patch = config.patch({**settings, "cpp.vec_isa_ok": instructions})
        with patch, tracing(TracingContext(mode)):
            compiled: Any = compile_fx(owned, examples)
    return compiled


def _owned(module: fx.GraphModule, keep_draws: bool) -> fx.GraphModule:
    """Copy a graph for Inductor, which changes its input.

    With ``keep_draws``, Bernoulli draws use the overload that Inductor leaves to torch; it replaces the other by
    ``rand < p``, whose draws differ from torch's.
    """
    graph = copy.deepcopy(module.graph)
    replace_elementary(graph)
    for node in graph.nodes:
        node.meta.clear()  # otherwise the keys of the cache on disk contain lines of the program
        if keep_draws and node.op == "call_function" and node.target is aten.bernoulli.default:
            node.target = aten.bernoulli.Tensor
            node.args = (node.args[0], node.args[0])
    return fx.GraphModule(module, graph)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply matrices of float32 in full, whatever ``torch.set_float32_matmul_precision`` allows, for comparisons."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def same(what: str, labels: list[str], actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare tensors up to round-off, relative to the largest of them for gradients that nearly cancel.

    Raises:
        CompileMismatchError: naming the first that differs by more.
    """
    norms = [float(value.double().norm()) for value in expected]
    for label, a, b, size in zip(labels, actual, expected, norms, strict=True):
        epsilon = torch.finfo(b.dtype).eps
        distance = float((a.double() - b.double()).norm())
        if not distance <= max(1e-5, epsilon**0.5) * size + epsilon * max(norms) + 1e-12:
            raise CompileMismatchError(
                f"{what} does not agree with the program under the same noise: {label} is off by {distance:.3g} of "
                f"{size:.3g}. Does the program draw from another generator than torch's, or change from call to call?"
            )
