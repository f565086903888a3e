"""Check the arguments of fit before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from pyro_hvae.arguments import check_count, check_switch
from pyro_hvae.training.feed import Batch, Feed, TensorFeed, rows_of

__all__ = [
    "arguments_differ",
    "check_batch",
    "check_bound",
    "check_counts",
    "check_data_size",
    "check_functions",
    "check_switches",
    "dtypes_differ",
]


def check_bound(bound: Any) -> None:
    """Refuse an object without a loss.

    Raises:
        TypeError: with the object.
    """
    if isinstance(bound, type) or not hasattr(bound, "differentiable_loss"):
        what = f"the class {bound.__name__}: call it" if isinstance(bound, type) else repr(bound)
        raise TypeError(f"bound is an object such as LayerwiseELBO() or IWELBO(num_particles=8); this is {what}")


def check_counts(*, epochs: Any, steps: Any, seed: Any, **counts: Any) -> None:
    """Refuse numbers of steps, data and the like that are no integers of at least 1; None is accepted.

    Raises:
        ValueError: naming the argument and its value.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"pass either epochs or steps, got epochs={epochs} and steps={steps}")
    for name, value in {"epochs": epochs, "steps": steps, **counts}.items():
        if value is None:
            continue
        check_count(name, value)
    if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < 2**63):
        raise ValueError(f"seed must be an integer of at least 0 and below 2**63, got {seed!r}")


def check_switches(compile: Any, **switches: Any) -> None:
    """Refuse switches that are neither True nor False.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in switches.items():
        check_switch(name, value)
    if not isinstance(compile, (bool, Mapping)):
        raise ValueError(f"compile must be True, False or a mapping of options, got {compile!r}")


def check_functions(transform: Any, callbacks: Any) -> None:
    """Refuse a transform that can't be called, and callbacks that are no sequence.

    Raises:
        TypeError: naming the argument and its value.
    """
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of a batch, got {transform!r}")
    if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks must be a list of callbacks, got {callbacks!r}")


def arguments_differ(model: Any, guide: Any, example: Batch) -> str:
    """Describe arguments that a program does not take; empty if both take those of a batch."""
    args, kwargs = example
    for which, program in (("model", model), ("guide", guide)):
        target = program.forward if isinstance(program, nn.Module) else program
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):
            continue
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            given = [*[f"argument {place + 1}" for place in range(len(args))], *kwargs]
            return (
                f"the data are passed as {', '.join(given)}, and the {which} takes {signature}: {error}. Pass a tensor "
                "or a tuple for positional arguments, a mapping from names to tensors for keywords"
            )
    return ""


def check_data_size(data_size: int | None, batches: Feed) -> None:
    """Refuse a size of the data set below that of the data.

    Raises:
        ValueError: with both sizes.
    """
    if data_size is not None and isinstance(batches, TensorFeed) and data_size < batches.data_size:
        raise ValueError(
            f"data_size={data_size} is less than the {batches.data_size} data that were passed: data_size is N, the "
            "number of all data; give the number of data a step as batch_size"
        )


def check_batch(example: Batch) -> None:
    """Refuse a batch without a tensor whose leading dim is that of the data.

    Raises:
        TypeError: with its types.
    """
    if rows_of(*example) is None:
        args, kwargs = example
        types = [
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            for value in (*args, *kwargs.values())
        ]
        raise TypeError(
            f"a batch must hold a tensor with the data on its leading dimension; this one holds {types}. Pass tensors, "
            "or return them from transform="
        )


def dtypes_differ(model: Any, guide: Any, example: Batch) -> str:
    """Describe different dtypes of data and parameters; empty if they agree."""
    args, kwargs = example
    modules = [program for program in (model, guide) if isinstance(program, nn.Module)]
    data = {v.dtype for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()}
    own = {p.dtype for module in modules for p in module.parameters() if p.is_floating_point()}
    if not data or not own or data & own:
        return ""
    return (
        f"the data are {', '.join(map(str, data))} and the parameters {', '.join(map(str, own))}: convert the data, as "
        f"in x.to({next(iter(own))}), or the programs"
    )
