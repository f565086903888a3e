"""Refuse operations of a traced program whose result depends on the values of its tensors.

A graph records tensor operations.  A number that Python reads from a tensor while the graph is recorded would be the
same number at every later step, so the program is refused instead, and runs eagerly.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["NotTraceable", "RefuseReads", "line_of"]

aten = torch.ops.aten

# Methods that hand values of a tensor to Python, NumPy or other libraries.
_READS = {
    getattr(Tensor, name): name
    for name in (
        "__array__", "__bool__", "__complex__", "__contains__", "__deepcopy__", "__dlpack__", "__float__", "__format__",
        "__index__", "__int__", "__repr__", "data_ptr", "item", "numpy", "storage", "tolist", "untyped_storage",
    )
}  # fmt: skip
# Functions that read the values of tensors inside a list or tuple; a tensor alone is followed by the tracer.
_BUILDERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new}


class NotTraceable(RuntimeError):
    """Raised for a program whose operations depend on the values of its tensors, or that can't be traced.

    Attributes:
        where: ``file:line`` of the operation in the program, or a note that it is unknown.
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class RefuseReads:
    """Raise at every operation that reads the value of a tensor, or whose output shape depends on one.

    Attributes:
        refused: the first such operation, also if the program caught the error; None if there was none.
    """

    def __init__(self) -> None:
        self.refused: NotTraceable | None = None
        self._modes = _Functions(self), _Operators(self)

    def __enter__(self) -> RefuseReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def refuse(self, what: str) -> None:
        error = NotTraceable(
            f"{what} makes the program depend on the value of a tensor (.item(), .tolist(), .numpy(), if tensor:, "
            "indexing by a mask)",
            _innermost(_inside_trace(traceback.extract_stack())),
        )
        if self.refused is None:
            self.refused = error
        raise error


class _Functions(TorchFunctionMode):
    """Intercept the functions of torch: some read values without an operator."""

    def __init__(self, owner: RefuseReads) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            self.owner.refuse(f"Tensor.{_READS[func]}")
        if func in _BUILDERS:
            data = [*args, *kwargs.values()]
            containers = [value for value in data if not isinstance(value, Tensor)]
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(containers)):
                self.owner.refuse(f"{func.__name__}([tensor, ...]), which torch.stack can replace,")
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """Intercept the operators that torch calls."""

    def __init__(self, owner: RefuseReads) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or _shape_depends_on_values(func, args):
            self.owner.refuse(str(func))
        return func(*args, **(kwargs or {}))


def _shape_depends_on_values(func: Any, args: Any) -> bool:
    """Whether the shape of the output depends on values; indexing does for masks only."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


_PACKAGE = Path(__file__).resolve().parents[2]
_TORCH, _PYRO, _NUMPY = (Path(str(module.__file__)).resolve().parent for module in (torch, pyro, numpy))
_STDLIB = sysconfig.get_paths()["stdlib"]
_LIBRARIES = [_TORCH, _PYRO, _NUMPY, *(_PACKAGE / name for name in ("training", "problem", "bounds"))]


def line_of(error: BaseException) -> str:
    """Return the innermost line of the program where an error was raised."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def _in_standard_library(filename: str) -> bool:
    return filename.startswith(_STDLIB) and "site-packages" not in filename and "dist-packages" not in filename


def _inside_trace(stack: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """Return the frames below the tracer, without those above it."""
    tracer = str(Path(__file__).with_name("graph.py"))
    start = max((index for index, frame in enumerate(stack) if frame.filename == tracer), default=-1)
    return list(stack)[start + 1 :]


def _innermost(stack: Sequence[traceback.FrameSummary]) -> str:
    """Return the innermost line of the program; of Pyro or this package, if the stack has no line of the program."""
    frames = [frame for frame in stack if Path(frame.filename).is_absolute()]
    for hidden in (_LIBRARIES, [_TORCH, _NUMPY, Path(__file__).resolve().parent]):
        outside = [f for f in frames if not any(Path(f.filename).is_relative_to(root) for root in hidden)]
        outside = [f for f in outside if not _in_standard_library(f.filename)]
        if outside:
            last = outside[-1]
            return f"{last.filename}:{last.lineno} ({(last.line or '').strip()})"
    return "an unknown line"
