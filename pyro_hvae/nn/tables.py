"""Encoder of rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hvae.arguments import ContextError, check_context
from pyro_hvae.nn.layers import MLP, xavier_

__all__ = ["TableEncoder"]


class TableEncoder(nn.Module):
    """Perceptron on the features of a row, which may have missing entries: (..., D) to (..., out).

    The features of an entry are: itself for real numbers; its logarithm for positive ones, its log-odds for those in
    (0, 1), log(1 + x) for counts, the last relative to that of the mean; -1 and 1 for binary labels, equally spaced in
    [-1, 1] for ordered ones, one-hot for others.  All features of a missing entry, which is NaN, are 0.  A chain puts
    NaN where data are masked for a network with this attribute ``masked_value``.

    Args:
        columns: descriptions with ``family``, ``mean`` and ``categories``: ``table(frame).schema.columns``.
        out_features: width of the output.
        hidden: widths of the hidden layers.
        activation: makes the activation.
        context_features: width of the context, 0 for none.

    Example:
        >>> import pandas as pd
        >>> from pyro_hvae.tables import table
        >>> rows = table(pd.DataFrame({"age": [31.5, None, 60.0], "region": ["n", "s", "w"]}))
        >>> TableEncoder(rows.schema.columns, 2 * 4)(torch.tensor([[0.3, torch.nan], [torch.nan, 2.0]])).shape
        torch.Size([2, 8])
    """

    masked_value = math.nan

    def __init__(
        self,
        columns: Sequence[Any],
        out_features: int,
        hidden: Sequence[int] = (128, 128),
        activation: Callable[[], nn.Module] = nn.ReLU,
        *,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self._one_hot: list[tuple[int, int]] = []
        width = 0
        kinds: dict[str, list[int]] = {}
        for j, column in enumerate(columns):
            kind = _KINDS[column.family]
            if kind == "one_hot":
                self._one_hot.append((j, len(column.categories)))
                width += len(column.categories)
            else:
                kinds.setdefault(kind, []).append(j)
                width += 1
        for kind, places in kinds.items():
            shift = [_shift(kind, columns[j]) for j in places]
            self.register_buffer(f"shift_{kind}", torch.tensor(shift), persistent=False)
            self.register_buffer(f"places_{kind}", torch.tensor(places), persistent=False)
        self._kinds = list(kinds)
        self._context_features = context_features
        self.layers = xavier_(MLP(width + context_features, out_features, hidden, activation))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map rows (..., D), NaN where missing, and a context (..., c) to (..., out)."""
        parts = []
        for kind in self._kinds:
            values = x.index_select(-1, getattr(self, f"places_{kind}"))
            parts.append(_transformed(kind, values, getattr(self, f"shift_{kind}")))
        features = torch.cat(parts, -1) if parts else x[..., :0]
        features = torch.where(features.isnan(), 0.0, features)
        for j, count in self._one_hot:
            codes = torch.arange(count, dtype=x.dtype, device=x.device)
            features = torch.cat([features, (x[..., j : j + 1] == codes).to(x.dtype)], -1)
        if self._context_features:
            check_context("TableEncoder", context, self._context_features)
            assert context is not None
            features = torch.cat([features, context.expand(*features.shape[:-1], context.shape[-1])], -1)
        elif context is not None:
            raise ContextError("TableEncoder takes no context: build it with context_features=.")
        return self.layers(features)


_KINDS = {
    "gaussian": "real",
    "student_t": "real",
    "log_normal": "positive",
    "gamma": "positive",
    "beta": "unit",
    "poisson": "count",
    "negative_binomial": "count",
    "zero_inflated_poisson": "count",
    "zero_inflated_negative_binomial": "count",
    "bernoulli": "grade",
    "ordinal": "grade",
    "categorical": "one_hot",
}


def _shift(kind: str, column: Any) -> float:
    """Return the origin of a column's features: log(1 + mean) of counts, half the largest code of grades."""
    if kind == "count":
        return math.log1p(column.mean)
    return (len(column.categories) - 1) / 2 if kind == "grade" else 0.0


def _transformed(kind: str, values: Tensor, shift: Tensor) -> Tensor:
    if kind == "positive":
        return values.log()
    if kind == "unit":
        return torch.logit(values)
    if kind == "count":
        return values.log1p() - shift
    return values / shift - 1 if kind == "grade" else values
