"""From a Pyro program to a flat graph of tensor operations: the loss and its gradient, traced once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_hvae.traces.running import unregistered

__all__ = ["FlatGraph", "NotTraceable", "batch_key", "split_batch", "trace"]

aten = torch.ops.aten


class NotTraceable(RuntimeError):
    """A program whose operations depend on the values of its tensors, or that can't be followed.

    Attributes:
        where: ``file:line`` of the program where it happened, as far as it can be told.
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


@dataclass(frozen=True)
class FlatGraph:
    """The loss of a batch and its gradient as one function of tensors, without a trace of Pyro.

    Attributes:
        module: called with ``(*tensors, *inputs)``, gives ``(loss, *gradients)``.
        tensors: what the program reads besides the batch: parameters, buffers, constants; the objects themselves.
        parameters: index in ``tensors`` of each parameter that has a gradient, in the order of the gradients.
    """

    module: fx.GraphModule
    tensors: list[Tensor]
    parameters: list[int]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.module(*self.tensors, *inputs)


def split_batch(args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a batch, and the way back to ``(args, kwargs)``."""
    leaves, spec = tree_flatten((args, dict(kwargs)))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def join(tensors: Sequence[Tensor]) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return tree_unflatten(filled, spec)

    return [leaves[place] for place in places], join


def batch_key(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """What a graph is made for: shapes, dtypes and devices of tensors, values of everything else."""
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        return args[0].shape, args[0].dtype, args[0].device
    leaves, spec = tree_flatten((args, dict(kwargs)))
    parts = ((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return str(spec), *parts


def trace(
    objective: Callable[..., Tensor], parameters: Sequence[Tensor], args: tuple, kwargs: Mapping[str, Any]
) -> FlatGraph:
    """Trace the loss of ``objective`` on a batch, and its gradient in ``parameters``.

    Random draws stay what they are, operations of the graph.  The generators are left as they were, and buffers that
    the programs change in place (running statistics) too.

    Raises:
        NotTraceable: naming the line, if an operation depends on a tensor's value.
    """
    inputs, join = split_batch(args, kwargs)
    used: list[int] = []

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        call_args, call_kwargs = join(tensors)
        with _NoPeeking(), torch.enable_grad():
            loss = objective(*call_args, **call_kwargs)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        used[:] = [index for index, gradient in enumerate(gradients) if gradient is not None]
        return (loss.detach(), *(gradient for gradient in gradients if gradient is not None))

    with torch.random.fork_rng(), kept_buffers(objective), plain_programs():
        with torch.no_grad():
            objective(*args, **kwargs)  # caches and checks of a first run are no part of the graph
        try:
            module = make_fx(run)(*[tensor.detach() for tensor in inputs])
        except Exception as error:
            raise NotTraceable(_reason(error), _line(error)) from error
    tensors = _lift(module)
    _draw_directly(module)
    module.graph.lint()
    module.recompile()
    place = {id(tensor): index for index, tensor in enumerate(tensors)}
    return FlatGraph(module, tensors, [place[id(parameters[index])] for index in used])


@contextmanager
def plain_programs() -> Iterator[None]:
    """No validation, and no statements about parameters, where nothing depends on them."""
    with pyro.validation_enabled(False), unregistered():
        yield


@contextmanager
def kept_buffers(objective: Any) -> Iterator[None]:
    buffers = list(objective.buffers()) if isinstance(objective, torch.nn.Module) else []
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)


class _NoPeeking(TorchDispatchMode):
    """Refuse what looks at a tensor's value: a graph would hold on to the value of the first run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or _depends_on_values(func, args):
            raise RuntimeError(
                f"{func} makes the program depend on the value of a tensor (.item(), if tensor:, indexing by a mask)"
            )
        return func(*args, **(kwargs or {}))


def _depends_on_values(func: Any, args: Any) -> bool:
    """Whether the shape of the result does; indexing does only by masks."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _lift(module: fx.GraphModule) -> list[Tensor]:
    """Turn every tensor that the graph holds on to into an input; the tensors, in the order of these inputs."""
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
    """Standard normal noise by ``randn``, which compilers know, instead of in-place filling of an empty tensor."""
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


_PACKAGE = Path(__file__).resolve().parent.parent
_TORCH, _PYRO = (Path(str(module.__file__)).resolve().parent for module in (torch, pyro))


def _line(error: BaseException) -> str:
    """The innermost line of the program; of Pyro, if the program's lines do not tell."""
    machinery = [_PACKAGE / name for name in ("compile", "traces", "bounds")]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_absolute()]
    for hidden in ([_TORCH, _PYRO, *machinery], [_TORCH, _PACKAGE / "compile"]):
        outside = [f for f in frames if not any(Path(f.filename).is_relative_to(root) for root in hidden)]
        outside = [f for f in outside if not f.filename.endswith("contextlib.py")]
        if outside:
            last = outside[-1]
            return f"{last.filename}:{last.lineno} ({(last.line or '').strip()})"
    return "a line that could not be told"


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
