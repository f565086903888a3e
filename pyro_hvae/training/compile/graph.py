"""Trace the loss of a Pyro program and its gradient into one flat graph of tensor operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_hvae.training.compile.reads import NotTraceable, RefuseReads, line_of
from pyro_hvae.training.compile.watch import attributes

__all__ = [
    "FlatGraph",
    "batch_key",
    "kept_buffers",
    "kept_values",
    "loss_and_gradients",
    "plain_programs",
    "split_batch",
    "trace",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class FlatGraph:
    """The loss of a batch and its gradient as a function of tensors.

    Attributes:
        module: called with ``(*tensors, *inputs)``, returns ``(loss, *gradients)``.
        tensors: the tensors that the program reads besides the batch: parameters, buffers, constants.
            Those that the program changes in place are changed in place by the graph.
        trained: the parameters that have a gradient, in the order of the gradients.
    """

    module: fx.GraphModule
    tensors: list[Tensor]
    trained: list[Tensor]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.module(*self.tensors, *inputs)


def split_batch(args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors of a batch, and a function from such tensors to ``(args, kwargs)``."""
    leaves, spec = tree_flatten((args, dict(kwargs)))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def join(tensors: Sequence[Tensor]) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return tree_unflatten(filled, spec)

    return [leaves[place] for place in places], join


def batch_key(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """Return the key of a batch for its graph: the layouts of tensors, and all other values.

    Raises:
        TypeError: for a value that is neither a tensor nor hashable, such as a NumPy array.
    """
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        return _layout(args[0])
    leaves, spec = tree_flatten((args, dict(kwargs)))
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and type(leaf).__hash__ is None:
            raise TypeError(
                f"a batch of a compiled step holds tensors and hashable values, got {type(leaf).__name__}: convert "
                "arrays by torch.as_tensor"
            )
    return str(spec), *(_layout(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)


def _layout(tensor: Tensor) -> tuple:
    stride = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    return tensor.shape, stride, tensor.dtype, tensor.device


def trace(
    objective: Callable[..., Tensor],
    parameters: Sequence[Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
) -> FlatGraph:
    """Trace the loss of ``objective`` on a batch, and its gradient with respect to ``parameters``.

    Random draws are operations of the graph, and so are changes of buffers in place.  Generators and buffers are
    restored afterwards.

    Args:
        objective: a module or function whose call returns the loss.
        parameters: with respect to which the gradient is taken, where the loss depends on them.
        args, kwargs: an example batch.

    Raises:
        NotTraceable: naming the line, if an operation depends on the value of a tensor, or if a call of the objective
            replaces a buffer or changes a number among the attributes of its modules.
    """
    inputs, join = split_batch(args, kwargs)
    used: list[Tensor] = []
    reads = RefuseReads()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        call_args, call_kwargs = join(tensors)
        with reads:
            loss, gradients = loss_and_gradients(objective, parameters, call_args, call_kwargs)
        used[:] = [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
        return (loss, *(gradient for gradient in gradients if gradient is not None))

    with torch.random.fork_rng(), kept_buffers(objective), plain_programs():
        with torch.enable_grad():
            objective(*args, **kwargs)  # fills caches and makes checks, which the graph must not contain
        before = attributes(objective)
        try:
            module = make_fx(run)(*[tensor.detach() for tensor in inputs])
        except Exception as error:
            raise (reads.refused or NotTraceable(_reason(error), line_of(error))) from error
        if reads.refused is not None:
            raise reads.refused
        _refuse_changes(before, attributes(objective))
    tensors = _lift(module)
    _draw_directly(module)
    module.graph.lint()
    module.recompile()
    return FlatGraph(module, tensors, used)


def loss_and_gradients(
    objective: Callable[..., Tensor],
    parameters: Sequence[Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return loss and gradients of a batch; None for parameters that the loss does not depend on."""
    with torch.enable_grad():
        loss = objective(*args, **kwargs)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), [_like(gradient, p) for gradient, p in zip(gradients, parameters, strict=True)]


def _like(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Give a gradient the memory layout of its parameter, which fused optimisers assume."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
    ).copy_(gradient)


def _refuse_changes(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> None:
    for (module, name), value in after.items():
        old = before.get((module, name))
        if isinstance(value, Tensor) and value is not old:
            advice = "change the buffer in place (copy_, add_, lerp_), so that the graph changes it too"
        elif not isinstance(value, Tensor) and value != old:
            advice = "keep it in a buffer that is changed in place, so that the graph changes it too"
        else:
            continue
        where = f"attribute {name!r} of the module {module or 'itself'}"
        raise NotTraceable(f"a call of the objective replaces the {where}: {advice}", "the forward pass")


@contextmanager
def plain_programs() -> Iterator[None]:
    """Run programs without validation, which reads values."""
    with pyro.validation_enabled(False):
        yield


@contextmanager
def kept_values(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the values of tensors afterwards."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


@contextmanager
def kept_buffers(objective: Any) -> Iterator[None]:
    """Restore the buffers of a module afterwards: the tensors and their values."""
    places = []
    if isinstance(objective, nn.Module):
        for module in objective.modules():
            places += [(module._buffers, name, b, b.clone()) for name, b in module._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, value in places:
                buffers[name] = buffer
                buffer.copy_(value)


def _lift(module: fx.GraphModule) -> list[Tensor]:
    """Turn every tensor that the graph holds into an input; return the tensors in the order of these inputs."""
    graph = module.graph
    first = next(iter(graph.nodes))
    tensors: list[Tensor] = []
    lifted: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, str(node.target))
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in lifted:
            with graph.inserting_before(first):
                lifted[id(tensor)] = graph.placeholder(f"held_{len(tensors)}")
            tensors.append(tensor)
        node.replace_all_uses_with(lifted[id(tensor)])
        graph.erase_node(node)
    return tensors


def _draw_directly(module: fx.GraphModule) -> None:
    """Draw standard normal noise by ``randn``, which compilers support, instead of filling an empty tensor."""
    graph = module.graph
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or node.target is not aten.normal_.default
            or node.args[1:] not in ((), (0.0, 1.0))
        ):
            continue
        source = node.args[0]
        if source.target is not aten.empty.memory_format or len(source.users) != 1 or node.kwargs:
            continue
        options = {k: v for k, v in source.kwargs.items() if k != "memory_format"}
        with graph.inserting_before(node):
            draw = graph.call_function(aten.randn.default, source.args, options)
        draw.meta = dict(node.meta)
        node.replace_all_uses_with(draw)
        graph.erase_node(node)
        graph.erase_node(source)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
