"""One graph of a training step: built for one shape of a batch, compiled, checked, and called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_hvae.compile.graph import FlatGraph
from pyro_hvae.compile.products import assign_products
from pyro_hvae.compile.update import AdamState, adam_update, clip

__all__ = ["CompileMismatchError", "Program", "same"]


class CompileMismatchError(RuntimeError):
    """A compiled step does not give what the program gives under the same noise."""


class Program:
    """One graph: for one shape of a batch."""

    def __init__(
        self,
        flat: FlatGraph,
        trained: list[Tensor],
        state: AdamState | None,
        clip_norm: float | None,
        backend: str,
        noise: str,
        steps: int,
        products: dict[str, str] | None,
    ) -> None:
        self.steps, self.products = steps, products
        self.flat, self.trained, self.state = flat, trained, state
        self.clip_norm, self.backend, self.noise = clip_norm, backend, noise
        self._compiled: Callable[..., Any] | None = None
        self._held: list[Tensor] = []
        self._generation = -1
        self._graph: fx.GraphModule | None = None

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """The loss, after the update; or loss and gradients, if the optimiser is not in the graph."""
        if self.state is not None and self.state.acquire() != self._generation:
            self._hold()
        if self._compiled is None:
            self._compile(inputs)
        if self.state is not None:
            self.state.advance()
        assert self._compiled is not None
        with torch.no_grad():
            return self._compiled(*self._held, *inputs)

    def _hold(self) -> None:
        assert self.state is not None
        self._held = [tensor.detach() for tensor in self.flat.tensors] + self.state.tensors
        self._generation = self.state.generation

    def _compile(self, inputs: Sequence[Tensor]) -> None:
        if self.state is None:
            self._held = [tensor.detach() for tensor in self.flat.tensors]
            self._graph = self.flat.module
        else:
            with torch.no_grad():
                self._graph = make_fx(self._step, tracing_mode="fake")(*self._held, *inputs)
        graph = self._graph
        if self.products is not None:
            with torch.no_grad():
                graph = make_fx(graph, tracing_mode="fake")(*self._held, *inputs)
            assign_products(graph, self.products)
        if self.backend == "eager":
            self._compiled = graph
            return
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside of torch
            from torch._inductor import config
            from torch._inductor.compile_fx import compile_fx
            from torch._inductor.decomposition import select_decomp_table

            table = dict(select_decomp_table())
            if self.noise == "eager":  # as `rand < p` it would draw otherwise than torch does
                table.pop(torch.ops.aten.bernoulli.default, None)
            with config.patch(fallback_random=self.noise == "eager"):
                compiled: Any = compile_fx(graph, [*self._held, *inputs], decompositions=table)
            self._compiled = compiled

    def _step(self, *tensors: Tensor) -> Tensor:
        """The whole step on flat tensors: held ones, moments, count, factors, inputs."""
        assert self.state is not None
        start, size = len(self.flat.tensors), len(self.trained)
        held = list(tensors[:start])
        first, second = tensors[start : start + size], tensors[start + size : start + 2 * size]
        count, factors, *inputs = tensors[start + 2 * size :]
        groups = self.state.optimizer.param_groups
        place = {id(group): index for index, group in enumerate(groups)}
        group_of = [place[id(group)] for group in self.state.groups]
        parameters = [held[index] for index in self.flat.parameters]
        now, m, v = list(parameters), list(first), list(second)
        losses = []
        for index in range(self.steps):
            for where, value in zip(self.flat.parameters, now, strict=True):
                held[where] = value
            batch = [tensor[index] for tensor in inputs] if self.steps > 1 else inputs
            loss, *gradients = fx.Interpreter(self.flat.module).run(*held, *batch)
            losses.append(loss)
            if self.clip_norm is not None:
                gradients = clip(gradients, self.clip_norm)
            now, m, v = adam_update(now, gradients, m, v, factors[index], groups, group_of)
        for old, value in zip([*parameters, *first, *second], [*now, *m, *v], strict=True):
            old.copy_(value)
        count.add_(float(self.steps))
        return torch.stack(losses) if self.steps > 1 else losses[0]

    def verify(self, inputs: Sequence[Tensor], noise: Tensor, labels: list[str]) -> None:
        """What was compiled against the graph it was compiled from, under one noise; the state is put back."""
        if self.state is not None and self.state.acquire() != self._generation:
            self._hold()
        if self._compiled is None:
            self._compile(inputs)
        assert self._graph is not None
        before = [tensor.clone() for tensor in self._held]
        results = []
        for call in (self._compiled, self._graph):
            with torch.random.fork_rng(), torch.no_grad():
                torch.set_rng_state(noise)
                out = call(*self._held, *inputs)  # type: ignore[misc]
                out = out if isinstance(out, (tuple, list)) else [out]
                # First moments tell of the gradients; parameters would magnify the round-off of vanishing ones.
                size, start = len(self.trained), len(self.flat.tensors)
                moments = self._held[start : start + size] if self.state is not None else []
                if self.steps > 1:  # round-off grows from step to step
                    out, moments = [out[0][:1]], []
                results.append([value.clone() for value in (*out, *moments)])
                for tensor, value in zip(self._held, before, strict=True):
                    tensor.copy_(value)
        same("the compiled graph", labels, results[0], results[1])


def same(what: str, labels: list[str], found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Refuse what differs by more than round-off, which a gradient that nearly cancels has from its larger parts."""
    norms = [float(value.double().norm()) for value in expected]
    for label, a, b, size in zip(labels, found, expected, norms, strict=True):
        epsilon = torch.finfo(b.dtype).eps
        distance = float((a.double() - b.double()).norm())
        if not distance <= max(1e-5, epsilon**0.5) * size + epsilon * max(norms) + 1e-12:
            raise CompileMismatchError(
                f"{what} does not agree with the program under the same noise: {label} is off by {distance:.3g} of "
                f"{size:.3g}. Does the program draw from another generator than torch's, or change from call to call?"
            )
