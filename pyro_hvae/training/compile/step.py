"""The compiled training step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.arguments import check_choice, check_count, check_number, check_switch
from pyro_hvae.training.compile.graph import (
    FlatGraph,
    batch_key,
    kept_buffers,
    kept_values,
    loss_and_gradients,
    plain_programs,
    split_batch,
    trace,
)
from pyro_hvae.training.compile.program import Program, full_precision, same
from pyro_hvae.training.compile.reads import NotTraceable
from pyro_hvae.training.compile.update import FusedAdam, clip, missing_parameters
from pyro_hvae.training.compile.watch import Watch

__all__ = ["MAX_GRAPHS", "CompileOptions", "CompileWarning", "CompiledStep", "compile_step"]

MAX_GRAPHS = 32
"""Largest number of graphs of one step; further batches and states of modules run eagerly."""


class CompileWarning(UserWarning):
    """Warning: a program can't be compiled, and runs eagerly instead."""


def compile_step(
    objective: nn.Module, optimizer: torch.optim.Optimizer, example: Any, **options: Any
) -> CompiledStep:
    """Compile loss and gradient of a Pyro pair into one function of a batch, followed by the optimiser's update.

    The program is traced once for each layout of a batch into a flat graph of tensor operations, in which random
    draws remain random, and compiled.  Parameters, buffers and optimiser state are changed in place, so everything
    that holds them (the programs, ``optimizer.state_dict()``) sees the result, and eager steps may come between.
    Compiled graphs are kept on disk: the next process that runs the same program starts in seconds.

    Args:
        objective: a module whose call returns the loss: ``bound(model, guide)``.
        optimizer: over its parameters.  ``torch.optim.Adam`` and ``AdamW`` update by one call of torch's fused
            kernel; other optimisers make an eager ``step()`` on compiled gradients.  Hyper-parameters are read at
            every step.
        example: a batch of the step: a tensor, a tuple of arguments, or a mapping of keywords.
        options: see :class:`CompileOptions`.

    Returns:
        ``step(x) -> loss``, a :class:`CompiledStep`; the loss is a 0-dim tensor.  A program that can't be traced
        runs eagerly, with one :class:`CompileWarning` that names the line.

    Raises:
        CompileMismatchError: if the check fails; nothing is changed then.
        TypeError: for a batch with values that are neither tensors nor hashable.
        ValueError: for invalid arguments, or an optimiser that misses parameters of the objective.

    A graph is made for one state of the objective's modules: another is made when ``train()`` or ``eval()`` is called,
    a parameter stops requiring its gradient or changes its layout, a submodule, parameter or buffer is replaced, or a
    number or string among the attributes of a module changes.  At most 32 graphs are made, so keep values that
    change at every step in a buffer that is changed in place.  Other values that the program reads from Python
    (globals, lists, attributes of objects that are no modules) are read once, while it is traced.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.nn import PyroModule
        >>> from pyro_hvae.bounds import TraceELBO
        >>> class Model(PyroModule):
        ...     def forward(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...             pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> class Guide(PyroModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.zeros(()))
        ...     def forward(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Normal(self.slope * x, 0.5**0.5))
        >>> objective = TraceELBO()(Model(), Guide())
        >>> x = torch.randn(1000)
        >>> optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
        >>> step = compile_step(objective, optimizer, x, backend="eager")
        >>> for _ in range(200):
        ...     loss = step(x)
        >>> round(objective.guide.slope.item(), 1)
        0.5
    """
    step = CompiledStep(objective, optimizer, **options)
    if isinstance(example, Mapping):
        step.prepare((), example)
    else:
        step.prepare(example if isinstance(example, tuple) else (example,), {})
    return step


@dataclass(frozen=True)
class CompileOptions:
    """Options of a compiled step.

    Attributes:
        clip_norm: largest global norm of the gradients, positive and finite; None for any.
        backend: ``"inductor"``, or ``"eager"`` to run the flat graph without compiling it.
        noise: ``"eager"`` gives the eager program's draws from the same generator state; ``"fused"`` draws inside the
            compiled kernels, by another generator seeded from torch's: faster for many draws.
        steps: number of steps per call, at least 1.  Above 1, every tensor of a batch has a further leading dimension
            of that size, and the loss has shape ``(steps,)``.
        check: compare each new graph with the eager program under the same noise, before its first step.

    Raises:
        ValueError: for invalid values.
    """

    clip_norm: float | None = None
    backend: str = "inductor"
    noise: str = "eager"
    steps: int = 1
    check: bool = True

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, ("inductor", "eager"))
        check_choice("noise", self.noise, ("eager", "fused"))
        check_count("steps", self.steps)
        check_switch("check", self.check)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, 0.0, ends="()")


class CompiledStep:
    """A step of training, called with a batch; see :func:`compile_step`.

    Args:
        objective, optimizer: as for :func:`compile_step`.
        options: of :class:`CompileOptions`.

    Attributes:
        fallback: why and where the program could not be traced; None if it could.
        seconds: of tracing and compiling so far.
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        chosen = CompileOptions(**options)
        self.objective, self.optimizer, self.clip_norm = objective, optimizer, chosen.clip_norm
        self.backend, self.noise, self.steps, self.check = chosen.backend, chosen.noise, chosen.steps, chosen.check
        self.fallback: str | None = None
        self.seconds = 0.0
        self._check_optimizer()
        self._watch = Watch(objective)
        self._state: tuple = ()
        self._programs: dict[tuple, Program] = {}  # those of the present state, by batch_key
        self._by_state: dict[tuple, dict[tuple, Program]] = {}
        self._adams: dict[tuple[int, ...], FusedAdam] = {}  # by the identities of the parameters
        self._made = 0

    @property
    def graphs(self) -> int:
        """The number of graphs: one for each layout of a batch and each state of the modules."""
        return sum(map(len, self._by_state.values()))

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of the optimiser that require a gradient."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make ``steps`` steps on a batch; return their losses, each before its step."""
        program = self.prepare(args, kwargs)
        if self.steps == 1:
            return self._one(program, args, kwargs)
        return torch.stack([self._one(program, *one) for one in self._slices(args, kwargs)])

    def _one(self, program: Program | None, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        if program is None or not program.adam.applies():
            return self.apply(self.backward([(args, kwargs)]))
        loss, *gradients = program.run(_inputs(args, kwargs))
        program.adam(gradients if self.clip_norm is None else clip(gradients, self.clip_norm))
        return loss

    def backward(self, batches: Sequence[tuple[tuple, Mapping[str, Any]]]) -> Tensor:
        """Set the parameters' gradients to the mean over batches, without a step; return the mean loss."""
        losses = []
        self.optimizer.zero_grad(set_to_none=True)
        for args, kwargs in batches:
            program = self._program(args, kwargs)
            if program is None:
                loss = self.objective(*args, **kwargs) / len(batches)
                loss.backward()
                losses.append(loss.detach())
                continue
            loss, *gradients = program.run(_inputs(args, kwargs))
            for parameter, gradient in zip(program.flat.trained, gradients, strict=True):
                share = gradient / len(batches) if len(batches) > 1 else gradient
                parameter.grad = share if parameter.grad is None else parameter.grad + share
            losses.append(loss / len(batches) if len(batches) > 1 else loss)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def apply(self, loss: Tensor) -> Tensor:
        """Clip the gradients of :meth:`backward`, and update the parameters; return ``loss``."""
        if self.clip_norm is not None:
            pairs = [(p, p.grad) for p in self.parameters if p.grad is not None]
            clipped = clip([gradient for _, gradient in pairs], self.clip_norm)
            for (parameter, _), gradient in zip(pairs, clipped, strict=True):
                parameter.grad = gradient
        self.optimizer.step()
        return loss

    # -- graphs

    def prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> Program | None:
        """Return the compiled program for batches like this one; None if it runs eagerly."""
        if self.steps > 1:
            args, kwargs = next(self._slices(args, kwargs))
        return self._program(args, kwargs)

    def _program(self, args: tuple, kwargs: Mapping[str, Any]) -> Program | None:
        if self.fallback is not None:
            return None
        state = self._watch()
        if state is not self._state:
            if self._state and state[0] != self._state[0]:
                self._adams.clear()  # parameters may have been replaced
            self._state, self._programs = state, self._by_state.get(state, {})
            for adam in self._adams.values():
                adam.reset()
        key = batch_key(args, kwargs)
        program = self._programs.get(key)
        if program is None and self._made <= MAX_GRAPHS:
            program = self._make(key, args, kwargs)
        return program

    def _make(self, key: tuple, args: tuple, kwargs: Mapping[str, Any]) -> Program | None:
        self._made += 1
        if self._made > MAX_GRAPHS:
            warnings.warn(
                f"this step has made {MAX_GRAPHS} graphs; batches that need another run eagerly: pass batches of fewer "
                "shapes, numbers that change as tensors, and keep what a module changes in buffers",
                CompileWarning,
                stacklevel=5,
            )
            return None
        start = time.perf_counter()
        try:
            program = self._build(args, kwargs)
        except NotTraceable as error:
            self.fallback = f"{error.where}: {error}"
            warnings.warn(
                f"this program runs eagerly, since it can't be compiled: {self.fallback}", CompileWarning, stacklevel=5
            )
            return None
        # The first run may have created parameters or buffers; graphs of replaced modules are dropped.
        self._state = self._watch()
        generation = self._state[0]
        self._by_state = {state: programs for state, programs in self._by_state.items() if state[0] == generation}
        self._programs = self._by_state.setdefault(self._state, {})
        self._programs[key] = program
        self.seconds += time.perf_counter() - start
        return program

    def _build(self, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        self._check_optimizer()
        flat = trace(self.objective, self.parameters, args, kwargs)
        if not flat.trained:
            raise ValueError("the loss does not depend on any parameter of the optimizer")
        inputs = _inputs(args, kwargs)
        if self.check:
            labels, noise = self._compare(flat, args, kwargs)
        trained = tuple(map(id, flat.trained))
        if trained not in self._adams:
            self._adams[trained] = FusedAdam(self.optimizer, flat.trained)
        program = Program(flat, self._adams[trained], inputs, self.backend, self.noise)
        if self.check and self.backend == "inductor" and self.noise == "eager":
            program.verify(inputs, noise, labels)
        return program

    def _slices(self, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple, Mapping[str, Any]]]:
        """Yield the batches of one call."""
        if self.steps == 1:
            yield args, kwargs
            return
        tensors, join = split_batch(args, kwargs)
        if any(tensor.dim() == 0 or len(tensor) != self.steps for tensor in tensors):
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise ValueError(f"every tensor must have the leading dimension steps={self.steps}, got shapes {shapes}")
        for index in range(self.steps):
            yield join([tensor[index] for tensor in tensors])

    def _compare(self, flat: FlatGraph, args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[str], Tensor]:
        """Compare the eager program with the flat graph under one noise; return names of the results, and the noise."""
        with torch.random.fork_rng(), kept_buffers(self.objective), kept_values(flat.tensors), full_precision():
            noise = torch.get_rng_state()
            with plain_programs():
                loss, gradients = loss_and_gradients(self.objective, flat.trained, args, kwargs)
        with torch.random.fork_rng(), kept_values(flat.tensors), full_precision():
            torch.set_rng_state(noise)
            results = flat(*_inputs(args, kwargs))
        names = {id(p): name for name, p in self.objective.named_parameters()}
        labels = ["the loss", *(f"the gradient of {names.get(id(p), 'a parameter')}" for p in flat.trained)]
        same("the flat graph", labels, results, [loss, *gradients])  # type: ignore[list-item]
        return labels, noise

    def _check_optimizer(self) -> None:
        lost = missing_parameters(self.optimizer, self.objective)
        if lost:
            raise ValueError(f"the optimizer does not hold {len(lost)} parameter(s) of the objective: {lost[:4]}")


def _inputs(args: tuple, kwargs: Mapping[str, Any]) -> Sequence[Tensor]:
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        return args
    return split_batch(args, kwargs)[0]
