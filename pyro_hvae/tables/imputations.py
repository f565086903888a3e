"""Draws of the missing entries of a frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pyro_hvae.tables.schema import Table

__all__ = ["Imputations", "Pooled"]


class Pooled(NamedTuple):
    """An estimate over imputations.

    Attributes:
        estimate: mean of the estimates.
        stderr: its standard error, within and between imputations.
        fraction: share of the variance that is due to the missing entries.
    """

    estimate: Any
    stderr: Any
    fraction: Any


class Imputations:
    """Completed copies of a frame: its missing entries are draws, all others as they were.

    Draws are those of the model given the observed entries of a row.  That is right where entries are missing at
    random: whether an entry is missing may depend on observed entries, and not on its own value.

    Args:
        table: the frame, with its missing entries.
        draws: values of the model (S, N, D).

    Attributes:
        values: draws of the missing entries (S, M) in the units of the frame, codes for labels.
        rows, columns: positions of the M missing entries.
    """

    def __init__(self, table: Table, draws: Tensor) -> None:
        self.table = table
        missing = ~table.mask.cpu().numpy()
        self.rows, self.columns = np.nonzero(missing)
        self.values = np.stack([table.schema.restore(draw)[missing] for draw in draws])
        self._missing = missing

    def __len__(self) -> int:
        """Return the number of imputations S."""
        return len(self.values)

    def __repr__(self) -> str:
        return (
            f"Imputations({len(self)} draws of {len(self.rows)} missing entries in {len(self.table)} rows; entries "
            "are taken to be missing at random)"
        )

    def __getitem__(self, draw: int) -> Any:
        """Return one completed DataFrame."""
        return self._filled(self.values[draw])

    def __iter__(self) -> Iterator[Any]:
        """Yield the completed DataFrames."""
        return (self[draw] for draw in range(len(self)))

    @property
    def frame(self) -> Any:
        """DataFrame with one value for each missing entry.

        It is the mean of the draws, their median for whole numbers and ordered labels, and the most frequent for other
        labels.  Standard errors of what is computed from this frame are too small: see :meth:`pool`.
        """
        return self._filled(self._points())

    def intervals(self, probability: float = 0.9) -> Any:
        """Return a DataFrame with one row for each missing entry, labelled by row and column.

        Columns: ``value`` as in :attr:`frame`; ``sd``, ``lower`` and ``upper``, the ends of the central interval, for
        numbers; ``share`` of the draws that have this value, for labels.

        Args:
            probability: of the intervals, in (0, 1).

        Raises:
            ValueError: for a probability outside.
        """
        import pandas as pd

        if not 0 < probability < 1:
            raise ValueError(f"probability must lie in (0, 1), got {probability}.")
        columns = [self.table.schema.columns[j] for j in self.columns]
        numbers = np.array([not column.is_label for column in columns], dtype=bool)
        points, frame = self._points(), self.frame
        tails = [(1 - probability) / 2, (1 + probability) / 2]
        lower, upper = np.quantile(self.values, tails, axis=0) if len(columns) else np.empty((2, 0))
        whole = np.array([column.whole for column in columns], dtype=bool)
        lower, upper = np.where(whole, np.floor(lower), lower), np.where(whole, np.ceil(upper), upper)
        return pd.DataFrame(
            {
                "value": pd.Series(
                    [frame.iat[i, j] for i, j in zip(self.rows, self.columns)], dtype=None if numbers.all() else object
                ).to_numpy(),
                "sd": np.where(numbers, self.values.std(0), np.nan),
                "lower": np.where(numbers, lower, np.nan),
                "upper": np.where(numbers, upper, np.nan),
                "share": np.where(numbers, np.nan, (self.values == points).mean(0)),
            },
            index=pd.MultiIndex.from_arrays(
                [list(self.table.index[self.rows]), [column.name for column in columns]], names=["row", "column"]
            ),
        )

    def pool(self, statistic: Callable[[Any], tuple[Any, Any]]) -> Pooled:
        r"""Combine an estimate over the imputations (Rubin's rules).

        .. math:: \bar q = \frac1S \sum_s q_s,\qquad \mathrm{stderr}^2 = \frac1S \sum_s u_s + (1 + \tfrac1S)\,
            \frac{1}{S - 1} \sum_s (q_s - \bar q)^2

        Args:
            statistic: function of a completed DataFrame that returns an estimate and the square of its standard error
                (numbers, arrays or series).

        Raises:
            ValueError: for fewer than two imputations.

        Reference: Multiple Imputation for Nonresponse in Surveys (Rubin, 1987).
        """
        count = len(self)
        if count < 2:
            raise ValueError("pooling needs at least two imputations: pass num_draws=.")
        results = [statistic(frame) for frame in self]
        mean = sum(result[0] for result in results) / count
        within = sum(result[1] for result in results) / count
        between = sum((result[0] - mean) ** 2 for result in results) / (count - 1)
        total = within + (1 + 1 / count) * between
        root = math.sqrt(total) if isinstance(total, (int, float)) else np.sqrt(total)
        return Pooled(mean, root, (1 + 1 / count) * between / total)

    def _points(self) -> np.ndarray:
        """Return one value for each missing entry (M,)."""
        points = np.empty(len(self.columns))
        for j, column in enumerate(self.table.schema.columns):
            here = self.columns == j
            drawn = self.values[:, here]
            if not here.any():
                continue
            if column.family in ("bernoulli", "categorical"):
                shares = [(drawn == code).mean(0) for code in range(len(column.categories))]
                points[here] = np.argmax(shares, 0)
            elif column.whole or column.is_label:
                points[here] = np.quantile(drawn, 0.5, axis=0, method="lower")
            else:
                points[here] = drawn.mean(0)
        return points

    def _filled(self, values: np.ndarray) -> Any:
        """Return the frame with these values (M,) in the place of its missing entries."""
        filled = self.table.source.copy()
        for j, column in enumerate(self.table.schema.columns):
            here = self._missing[:, j]
            if here.any():
                numbers = np.zeros(len(here))
                numbers[here] = values[self.columns == j]
                made = column.series(numbers, filled.index)
                mixed = filled[column.name].astype(object)  # a column with gaps may have another dtype than without
                mixed[here] = made[here].astype(object)
                filled[column.name] = mixed.astype(made.dtype)
        return filled
