"""The compiled training step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.compile.graph import NotTraceable, batch_key, kept_buffers, plain_programs, split_batch, trace
from pyro_hvae.compile.program import Program, same
from pyro_hvae.compile.update import AdamState, supports

__all__ = ["CompileWarning", "CompiledStep", "compile_step"]


class CompileWarning(UserWarning):
    """A program could not be compiled and runs eagerly instead."""


def compile_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    example: Any,
    *,
    clip_norm: float | None = None,
    backend: str = "inductor",
    noise: str = "eager",
    products: str = "blas",
    steps: int = 1,
    check: bool = True,
) -> CompiledStep:
    r"""Compile loss, gradient and optimiser of a Pyro pair into one function of a batch.

    The program is traced once for each shape of a batch into a flat graph of tensor operations, with its random
    draws alive, and compiled.  Parameters and optimiser state are changed in place, so everything that holds them
    (the programs, ``optimizer.state_dict()``) sees the result, and eager steps may come between.

    Args:
        objective: a module whose call gives the loss: ``bound(model, guide)``.
        optimizer: over its parameters.  ``torch.optim.Adam`` and ``AdamW`` become part of the graph; others run
            eagerly on compiled gradients.
        example: a batch, as the step will be called with: a tensor, a tuple of arguments, or a mapping of keywords.
        clip_norm: global norm that gradients are cut to.
        backend: ``"inductor"``, or ``"eager"`` to run the flat graph without compiling it.
        noise: ``"eager"`` draws what the eager program would draw from the same generator state; ``"fused"`` draws
            inside the compiled kernels, by another generator seeded from torch's: faster for many draws.
        products: ``"blas"`` leaves matrix products to torch; ``"fastest"`` measures, when a graph is made, which of
            the libraries that torch brings along is faster for each float32 product on this processor.
        steps: how many steps one call makes.  Above one, every tensor of a batch has a further leading dimension of
            that size, the loss has shape ``(steps,)``, and weights that follow the step stay the same during a call.
            Compiling takes as many times longer.
        check: compare each new graph with the eager program under the same noise, before its first step.

    Returns:
        ``step(x) -> loss``, a :class:`CompiledStep`; the loss is a 0-dim tensor.  A program that can't be traced
        runs eagerly, with one :class:`CompileWarning` that names the line.

    Raises:
        CompileMismatchError: if the check fails; nothing has been changed then.
        ValueError: for an unknown backend, noise or products, or an optimiser that misses parameters of the objective.

    What the program reads from Python at every step (an attribute that counts, a float that is annealed) is read
    once; keep such things in tensors, or use :class:`pyro_hvae.bounds.Regularised`, whose weights are.

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
    step = CompiledStep(
        objective, optimizer, clip_norm=clip_norm, backend=backend, noise=noise, products=products, steps=steps,
        check=check,
    )  # fmt: skip
    if isinstance(example, Mapping):
        step.prepare((), example)
    else:
        step.prepare(example if isinstance(example, tuple) else (example,), {})
    return step


class CompiledStep:
    """A step of training, called with a batch; see :func:`compile_step`.

    Attributes:
        fallback: why and where the program could not be traced; None if it could.
        seconds: spent tracing and compiling so far.
        products: which library each shape of a matrix product goes to, with ``products="fastest"``; otherwise None.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        backend: str = "inductor",
        noise: str = "eager",
        products: str = "blas",
        steps: int = 1,
        check: bool = True,
        fuse_optimizer: bool = True,
    ) -> None:
        if backend not in ("inductor", "eager"):
            raise ValueError(f"backend must be 'inductor' or 'eager', got {backend!r}")
        if noise not in ("eager", "fused"):
            raise ValueError(f"noise must be 'eager' or 'fused', got {noise!r}")
        if products not in ("blas", "fastest"):
            raise ValueError(f"products must be 'blas' or 'fastest', got {products!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self.objective, self.optimizer, self.clip_norm = objective, optimizer, clip_norm
        self.backend, self.noise, self.check = backend, noise, check
        self.products: dict[str, str] | None = {} if products == "fastest" else None
        self.fuse_optimizer = fuse_optimizer and supports(optimizer)
        if steps > 1 and not self.fuse_optimizer:
            raise ValueError(f"several steps a call need torch.optim.Adam or AdamW, got {type(optimizer).__name__}")
        self.fallback: str | None = None
        self.seconds = 0.0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        held = {id(p) for p in self.parameters}
        lost = [name for name, p in objective.named_parameters() if p.requires_grad and id(p) not in held]
        if lost:
            raise ValueError(f"the optimizer does not hold {len(lost)} parameter(s) of the objective: {lost[:4]}")
        self._bound: Any = getattr(objective, "bound", getattr(objective, "elbo", None))
        self._programs: dict[tuple, Program] = {}
        self._state: AdamState | None = None

    @property
    def graphs(self) -> int:
        """How many graphs there are: one for each shape of a batch."""
        return len(self._programs)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make one step on a batch; its loss, before the step."""
        program = self.prepare(args, kwargs)
        if program is None and self.steps > 1:
            return torch.stack([self.apply(self.backward([one])) for one in self._slices(args, kwargs)])
        if program is None or program.state is None:
            return self.apply(self.backward([(args, kwargs)]))
        self._advance()
        return program.run(split_batch(args, kwargs)[0] if kwargs or len(args) != 1 else args)

    def backward(self, batches: Sequence[tuple[tuple, Mapping[str, Any]]]) -> Tensor:
        """Set the parameters' gradients to the mean over batches, without a step; the mean loss.

        Only for a step whose optimiser is not a part of the graph (``fuse_optimizer=False``).
        """
        losses = []
        self.optimizer.zero_grad(set_to_none=True)
        for args, kwargs in batches:
            program = self.prepare(args, kwargs)
            if program is None:
                loss = self.objective(*args, **kwargs) / len(batches)
                loss.backward()
                losses.append(loss.detach())
                continue
            self._advance()
            loss, *gradients = program.run(split_batch(args, kwargs)[0])
            for parameter, gradient in zip(program.trained, gradients, strict=True):
                share = gradient / len(batches) if len(batches) > 1 else gradient
                parameter.grad = share if parameter.grad is None else parameter.grad + share
            losses.append(loss / len(batches) if len(batches) > 1 else loss)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> Program | None:
        """Compile for batches like this one, if that is not done yet; None if the program can't be traced."""
        if self.fallback is not None:
            return None
        key = batch_key(args, kwargs)
        program = self._programs.get(key)
        if program is None:
            start = time.perf_counter()
            try:
                program = self._build(args, kwargs)
            except NotTraceable as error:
                self.fallback = f"{error.where}: {error}"
                warnings.warn(
                    f"this program runs eagerly, since it can't be compiled: {self.fallback}",
                    CompileWarning,
                    stacklevel=3,
                )
                return None
            self._programs[key] = program
            self.seconds += time.perf_counter() - start
        return program

    # -- building

    def _build(self, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        one_args, one_kwargs = next(self._slices(args, kwargs))
        with _still(self._bound):
            flat = trace(self.objective, self.parameters, one_args, one_kwargs)
        trained = [flat.tensors[index] for index in flat.parameters]
        if not trained:
            raise ValueError("the loss does not depend on any parameter of the optimizer")
        state = None
        if self.fuse_optimizer:
            if self._state is None:
                self._state = AdamState(self.optimizer, trained, self.steps)
            if [id(p) for p in self._state.parameters] == [id(p) for p in trained]:
                state = self._state
        if state is None and self.steps > 1:
            raise ValueError("several steps a call need the same parameters to have a gradient in every batch")
        program = Program(flat, trained, state, self.clip_norm, self.backend, self.noise, self.steps, self.products)
        if self.check:
            labels, noise = self._compare(program, one_args, one_kwargs)
            if (self.backend == "inductor" or self.products is not None) and self.noise == "eager":
                program.verify(split_batch(args, kwargs)[0], noise, labels)
        return program

    def _slices(self, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple, Mapping[str, Any]]]:
        """The batches of one call."""
        if self.steps == 1:
            yield args, kwargs
            return
        tensors, join = split_batch(args, kwargs)
        if any(tensor.dim() == 0 or len(tensor) != self.steps for tensor in tensors):
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise ValueError(f"every tensor must have the leading dimension steps={self.steps}, got shapes {shapes}")
        for index in range(self.steps):
            yield join([tensor[index] for tensor in tensors])

    def _compare(self, program: Program, args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[str], Tensor]:
        """Eager against flat graph under one noise; names of what was compared, and the noise."""
        inputs = split_batch(args, kwargs)[0]
        self._set_step()
        with torch.random.fork_rng(), kept_buffers(self.objective):
            noise = torch.get_rng_state()
            with _still(self._bound), plain_programs(), torch.enable_grad():
                loss = self.objective(*args, **kwargs)
                gradients = torch.autograd.grad(loss, program.trained)
        with torch.random.fork_rng(), kept_buffers(self.objective):
            torch.set_rng_state(noise)
            found = program.flat(*inputs)
        names = {id(p): name for name, p in self.objective.named_parameters()}
        labels = ["the loss", *(f"the gradient of {names[id(p)]}" for p in program.trained)]
        same("the flat graph", labels, found, (loss.detach(), *gradients))
        return labels, noise

    # -- around a step

    def _advance(self) -> None:
        if self._set_step() and getattr(self.objective, "step", None) is None:
            self._bound.step += self.steps

    def _set_step(self) -> bool:
        """Bring weights that follow the step up to date, which live in tensors that the graph reads."""
        if not hasattr(self._bound, "set_step"):
            return False
        step = getattr(self.objective, "step", None)
        self._bound.set_step(self._bound.step if step is None else step)
        return True

    def apply(self, loss: Tensor) -> Tensor:
        """Clip, and let the optimiser move, eagerly; gives ``loss`` back."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        return loss


class _still:
    """While it lasts, weights that follow the step stay as they are: a graph must read them, not set them."""

    def __init__(self, bound: Any) -> None:
        self.bound = bound if hasattr(bound, "set_step") else None

    def __enter__(self) -> None:
        if self.bound is not None:
            self.step = self.bound.step
            self.bound.set_step(self.step)
            self.bound.set_step = lambda step: None

    def __exit__(self, *_: Any) -> None:
        if self.bound is not None:
            del self.bound.set_step
            self.bound.step = self.step
