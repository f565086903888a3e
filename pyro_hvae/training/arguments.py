"""Check the arguments of fit before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from pyro_hvae.training.feed import Batch, Feed, TensorFeed, rows_of

__all__ = ["check_batch", "check_bound", "check_counts", "check_data_size", "check_switches", "dtypes_differ"]


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
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer, got {value!r}: round it, or leave {name} out")
        if int(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < 2**63):
        raise ValueError(f"seed must be an integer of at least 0 and below 2**63, got {seed!r}")


def check_switches(compile: Any, **switches: Any) -> None:
    """Refuse switches that are neither True nor False.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if not isinstance(compile, (bool, Mapping)):
        raise ValueError(f"compile must be True, False or a mapping of options, got {compile!r}")


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
