r"""Check that every site of a model is Normal, with a mean that is affine in the latents and a constant covariance.

Then log p(x, z) is quadratic in z everywhere.  The model runs once with its draws marked, and every tensor operation is
intercepted below autograd:

- an operation that is affine in its marked arguments, as a sum or a product with an unmarked tensor, gives a tensor
  that is affine in the latents;
- any other operation gives a tensor of unknown form.

Marks belong to storages, so they follow views and writes in place.  Where Python reads a marked value (``if``,
``float``, numpy), the whole program counts as not affine.  A distribution counts as Normal by its class, through
wrappers and affine transforms.  Other operations and classes count as not affine: the answer may be a false "no".
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import transforms
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_hvae.modules import evaluation_mode
from pyro_hvae.problem import Problem
from pyro_hvae.problem.dependencies import VALUE_READERS
from pyro_hvae.problem.isolation import isolated

__all__ = ["is_linear_gaussian"]


def is_linear_gaussian(problem: Problem) -> bool:
    """Whether every latent is Normal, and every site that depends on one has a mean affine in it and is Normal.

    Args:
        problem: the model with its data; the guide does not run.
    """
    model, _, kwargs = problem.programs.bound()
    marks = _Marks()
    sites = _Sites(marks)
    with isolated(problem.model), evaluation_mode(problem.model), torch.no_grad(), pyro.validation_enabled(False):
        try:
            with _Operations(marks), _Readers(marks), sites:
                model(*problem.args, **kwargs)
        except Exception:  # the program can't be analysed; if it fails by itself, its next run shows the error
            return False
    return sites.linear and not marks.read


class _Level(IntEnum):
    """How a tensor depends on the latents."""

    CONSTANT = 0
    AFFINE = 1
    UNKNOWN = 2


class _Marks:
    """Levels of tensors by their storage, and whether Python has read a marked value."""

    def __init__(self) -> None:
        self.levels: dict[int, tuple[Any, _Level]] = {}  # holds the storage, so that no other one gets its key
        self.read = False

    def of(self, value: Any) -> _Level:
        """Return the level of a tensor; the highest level in a structure of tensors."""
        if isinstance(value, Tensor):
            return self.levels.get(value.untyped_storage()._cdata, (None, _Level.CONSTANT))[1]
        if isinstance(value, (list, tuple, dict)):
            return max((self.of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), default=_Level(0))
        return _Level.CONSTANT

    def put(self, value: Tensor, level: _Level) -> None:
        storage = value.untyped_storage()
        self.levels[storage._cdata] = storage, max(level, self.of(value))


LINEAR = frozenset((
    "_index_put_impl", "_neg_view", "_reshape_alias", "_to_copy", "_unsafe_view", "add", "alias", "as_strided",
    "cat", "clone", "constant_pad_nd", "contiguous", "copy", "cumsum", "detach", "diag_embed", "diagonal",
    "diagonal_copy", "expand", "fill", "flip", "gather", "index", "index_add", "index_copy", "index_put",
    "index_select", "lift_fresh", "masked_fill", "mean", "neg", "permute", "positive", "repeat", "reshape", "roll",
    "rsub", "scatter_add", "select", "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes",
    "squeeze", "stack", "sub", "sum", "t", "trace", "transpose", "tril", "triu", "unbind", "unfold", "unsqueeze",
    "view", "where",
))  # fmt: skip
"""Operations that are linear in all their tensors together; masks and indices among these must be unmarked."""

PRODUCTS = {
    "mul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "addmm": (1, 2), "addmv": (1, 2),
    "addbmm": (1, 2), "baddbmm": (1, 2), "addcmul": (1, 2), "convolution": (0, 1), "matmul": (0, 1), "linear": (0, 1),
}  # fmt: skip
"""Operations that multiply two of their arguments, of which one at most may be marked, and are linear in the rest."""

DIVISORS = {"div": 1, "linalg_solve_triangular": 0, "_linalg_solve_ex": 0, "cholesky_solve": 1, "addcdiv": 2}
"""Operations that are linear in all but this argument, which must be unmarked."""

SHAPES = frozenset((
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like",
    "randn_like", "zeros_like",
))  # fmt: skip
"""Operations that read shapes only."""


class _Operations(TorchDispatchMode):
    """Follow marks through tensor operations."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        level = self.marks.of((args, kwargs))
        if level and func.overloadpacket.__name__.rstrip("_") in SHAPES:
            level = _Level.CONSTANT
        if level:
            tags = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
            self.marks.read |= any(tag in func.tags for tag in tags)
            if level == _Level.AFFINE and not self.is_affine(func, args, kwargs):
                level = _Level.UNKNOWN
        out = func(*args, **kwargs)
        if level:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.marks.put(leaf, level if leaf.is_floating_point() else _Level.UNKNOWN)
                elif leaf is not None:
                    self.marks.read = True
        return out

    def is_affine(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether an operation is affine in its marked arguments."""
        name = func.overloadpacket.__name__
        name = name[:-1] if name.endswith("_") and not name.startswith("__") else name
        if "out" in kwargs or func.namespace != "aten" or func._overloadname == "dtype":  # a view of the bits
            return False
        if name in LINEAR:
            return True
        if name in PRODUCTS:
            return sum(self.marks.of(args[place]) > 0 for place in PRODUCTS[name]) <= 1
        if name in DIVISORS:
            return self.marks.of(args[DIVISORS[name]]) == 0 and kwargs.get("rounding_mode") is None
        return name == "pow" and len(args) == 2 and not isinstance(args[1], Tensor) and args[1] == 1


class _Readers(TorchFunctionMode):
    """Record that Python reads the value of a marked tensor."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in VALUE_READERS | {"__dlpack__", "data_ptr"} and self.marks.of(args):
            self.marks.read = True
        return func(*args, **(kwargs or {}))


class _Sites(Messenger):
    """Mark the draws of a model, and check each site."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks
        self.linear = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.linear = self.linear and self.contributes_a_quadratic(msg)
        if not msg["is_observed"]:
            value = msg["value"].detach().clone()
            self.marks.put(value, _Level.AFFINE)
            msg["value"] = value

    def contributes_a_quadratic(self, msg: Any) -> bool:
        """Whether the log-density of a site is at most quadratic in the latents."""
        fn, marks = msg["fn"], self.marks
        if marks.of([msg["mask"], msg["scale"]]):
            return False
        if msg["is_observed"]:
            if msg["mask"] is False or _hidden(fn):
                return True
            if marks.of([msg["value"], *_tensors(fn)]) == _Level.CONSTANT:
                return True
        return marks.of(msg["value"]) <= _Level.AFFINE and self.is_normal(fn)

    def is_normal(self, fn: Any) -> bool:
        """Whether a distribution is Normal with an affine mean and a constant covariance."""
        kind, marks = type(fn), self.marks
        if kind in WRAPPERS:
            return marks.of(getattr(fn, "_mask", None)) == 0 and self.is_normal(fn.base_dist)
        if kind in NORMALS:
            rest = [value for name, value in vars(fn).items() if name != "loc" and isinstance(value, Tensor)]
            return marks.of(fn.loc) <= _Level.AFFINE and marks.of(rest) == _Level.CONSTANT
        if kind in TRANSFORMED:
            return all(self.is_affine(step) for step in fn.transforms) and self.is_normal(fn.base_dist)
        return False

    def is_affine(self, step: Any) -> bool:
        """Whether a transform is affine with an affine shift and a constant factor."""
        kind, marks = type(step), self.marks
        if kind is transforms.ComposeTransform:
            return all(self.is_affine(part) for part in step.parts)
        if kind is transforms.IndependentTransform:
            return self.is_affine(step.base_transform)
        if kind is transforms.AffineTransform:
            return marks.of(step.loc) <= _Level.AFFINE and marks.of(step.scale) == _Level.CONSTANT
        if kind is dist.transforms.LowerCholeskyAffine:
            return marks.of(step.loc) <= _Level.AFFINE and marks.of(step.scale_tril) == _Level.CONSTANT
        return kind in (transforms.ReshapeTransform, dist.transforms.Permute)


def _classes(*names: str) -> frozenset[type]:
    """Return the classes of torch and Pyro with these names, without subclasses, whose density may differ."""
    return frozenset(getattr(module, name) for name in names for module in (torch.distributions, dist))


NORMALS = _classes("Normal", "MultivariateNormal", "LowRankMultivariateNormal")
TRANSFORMED = _classes("TransformedDistribution")
WRAPPERS = _classes("Independent") | {dist.ExpandedDistribution, dist.MaskedDistribution}


def _hidden(fn: Any) -> bool:
    """Whether a distribution is masked as a whole, as ``pyro.deterministic`` does: its log-density is 0."""
    while type(fn) in WRAPPERS:
        if getattr(fn, "_mask", None) is False:
            return True
        fn = fn.base_dist
    return False


def _tensors(fn: Any) -> Iterable[Tensor]:
    """Yield all tensors that a distribution holds, at any depth."""
    stack, seen = [fn], set()
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif hasattr(item, "__dict__") and not isinstance(item, type) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(vars(item).values())
