"""Kernels of a table's columns, by the names of families."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.kernels.continuous import Beta, Gamma, LogNormal, StudentT
from pyro_hvae.kernels.discrete import Bernoulli, Categorical, NegativeBinomial, Poisson
from pyro_hvae.kernels.gaussian import Gaussian
from pyro_hvae.kernels.graded import Ordinal, ZeroInflated

__all__ = ["column_kernels"]


class Scaled(nn.Module):
    """Linear map with an output in units of its own: shift + gain * (W h + b)."""

    shift: Tensor
    gain: Tensor

    def __init__(self, in_features: int, shift: Sequence[float], gain: Sequence[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, len(shift))
        nn.init.xavier_uniform_(self.linear.weight, gain=0.1)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("shift", torch.tensor(shift), persistent=False)
        self.register_buffer("gain", torch.tensor(gain), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.shift + self.gain * self.linear(features)


def column_kernels(
    columns: Sequence[Any], in_features: int, *, min_scale: float = 1e-3
) -> dict[tuple[str, ...], nn.Module]:
    """Return kernels over features of width ``in_features``, those of a family together where it has no own size.

    Counts start at the mean and variance of the observed values.

    Args:
        columns: descriptions with ``name``, ``family``, ``mean``, ``sd`` and ``categories``.
        in_features: width of the features.
        min_scale: floor of the scales of real and positive columns, in standard deviations.
    """
    blocks: dict[Any, list[Any]] = {}
    for column in columns:
        size = len(column.categories) if column.family in ("categorical", "ordinal") else 0
        blocks.setdefault((column.family, size), []).append(column)
    return {
        tuple(column.name for column in block): _block(family, size, block, in_features, min_scale)
        for (family, size), block in blocks.items()
    }


def _block(family: str, size: int, block: Sequence[Any], in_features: int, min_scale: float) -> nn.Module:
    count = len(block)
    if family == "categorical":
        return Categorical(_plain(in_features, count * size), num_categories=size)
    if family == "ordinal":
        return Ordinal(_plain(in_features, count), size, count)
    if family == "bernoulli":
        return Bernoulli(_plain(in_features, count))
    if family == "beta":
        return Beta(_plain(in_features, 2 * count))
    if family == "gaussian":
        return Gaussian(_plain(in_features, 2 * count), min_scale=min_scale)
    continuous: dict[str, tuple[Callable[..., nn.Module], int]] = {
        "student_t": (StudentT, 3), "log_normal": (LogNormal, 2), "gamma": (Gamma, 2),
    }  # fmt: skip
    if family in continuous:
        kernel, parameters = continuous[family]
        return kernel(_plain(in_features, parameters * count), floor=min_scale)
    net = Scaled(in_features, *_count_scales(family, block))
    if family == "poisson":
        return Poisson(net)
    if family == "negative_binomial":
        return NegativeBinomial(net)
    return ZeroInflated(net, family.removeprefix("zero_inflated_"))


def _plain(in_features: int, out_features: int) -> nn.Module:
    return Scaled(in_features, [0.0] * out_features, [1.0] * out_features)


def _count_scales(family: str, block: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Return start and unit of each parameter of a block of counts, by their moments."""
    gates = [0.0] * len(block), [1.0] * len(block)
    if family.endswith("poisson"):
        shift = [_inverse_softplus(column.mean) for column in block]
        gain = [max(1.0, column.sd) for column in block]
    else:
        sizes = [_dispersion(column) for column in block]
        shift = [_inverse_softplus(size) for size in sizes] + [
            math.log(column.mean / size) for column, size in zip(block, sizes)
        ]
        gain = [max(1.0, size) for size in sizes] + [1.0] * len(block)
    if family.startswith("zero_inflated"):
        return shift + gates[0], gain + gates[1]
    return shift, gain


def _dispersion(column: Any) -> float:
    """Return r of a negative binomial by the method of moments, within [.1, 100]."""
    spare = column.sd**2 - column.mean
    return min(100.0, max(0.1, column.mean**2 / spare)) if spare > 0 else 100.0


def _inverse_softplus(value: float) -> float:
    value = max(value, 1e-3)
    return value + math.log(-math.expm1(-value))
