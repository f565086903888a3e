"""All columns of a table, and a frame as numbers with a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_hvae.tables.column import Column, infer_column

__all__ = ["Schema", "Table", "is_frame", "table"]


def is_frame(value: Any) -> bool:
    """Return whether a value is a ``pandas.DataFrame``, without importing pandas."""
    return type(value).__name__ == "DataFrame" and hasattr(value, "to_numpy") and hasattr(value, "columns")


@dataclass(frozen=True)
class Schema:
    """Columns of a table, in the order of the entries of a row.

    Args:
        columns: their descriptions.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"height": [1.7, None, 1.5], "smokes": ["no", "yes", None]})
        >>> schema = table(frame).schema
        >>> schema
        Schema(
          height: student_t, mean 1.6, sd 0.1
          smokes: bernoulli, no | yes
        )
        >>> Schema.of_record(schema.record()) == schema
        True
    """

    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [column.name for column in self.columns]

    def __getitem__(self, name: str) -> Column:
        return self.columns[self.names.index(name)]

    def __repr__(self) -> str:
        lines = [f"  {column.name}: {column.family}, {_detail(column)}" for column in self.columns]
        return "\n".join(["Schema(", *lines, ")"])

    def record(self) -> list[dict[str, Any]]:
        """Return the schema as plain data, for a configuration."""
        return [column.record() for column in self.columns]

    @staticmethod
    def of_record(record: Iterable[Mapping[str, Any]]) -> Schema:
        """Invert :meth:`record`."""
        return Schema(tuple(Column.of_record(column) for column in record))

    def table(self, frame: Any) -> Table:
        """Convert a frame with these columns, in any order, to numbers and a mask.

        Raises:
            ValueError: for columns that are missing or unknown, and values that a column's family can't have.
        """
        given = list(frame.columns)
        missing = [name for name in self.names if name not in given]
        unknown = [name for name in given if name not in self.names]
        if missing or unknown:
            raise ValueError(
                f"the frame must have the columns {self.names}: it lacks {missing} and has besides {unknown}. Add a "
                "column that is not known as NaN, and drop the others."
            )
        numbers = np.stack([column.encode(frame[column.name]) for column in self.columns], -1)
        seen = ~np.isnan(numbers)
        x = torch.as_tensor(np.where(seen, numbers, 0.0), dtype=torch.get_default_dtype())
        return Table(self, x, torch.as_tensor(seen), frame[self.names])

    def restore(self, x: Any) -> np.ndarray:
        """Convert numbers of the model (..., D) to the units of the frame; categories stay codes."""
        x = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=float)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([column.decode(x[..., j]) for j, column in enumerate(self.columns)], -1)

    def frame(self, values: np.ndarray, index: Any) -> Any:
        """Return restored values (N, D), NaN where missing, as a DataFrame with labels and dtypes as they were."""
        import pandas as pd

        return pd.DataFrame(
            {column.name: column.series(values[:, j], index) for j, column in enumerate(self.columns)}, index=index
        )

    def log_scale(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``log |dx / d value|`` (N,), nats; added to log p(x), the log-density in the units of the frame."""
        numbers = np.asarray(x.detach().cpu(), dtype=float)
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.stack([column.log_scale(numbers[..., j]) for j, column in enumerate(self.columns)], -1)
        entries = torch.as_tensor(each, dtype=x.dtype, device=x.device)
        return (entries if mask is None else torch.where(mask, entries, 0.0)).sum(-1)


def _detail(column: Column) -> str:
    if column.is_label:
        labels = [str(label) for label in column.categories]
        shown = labels if len(labels) < 7 else [*labels[:5], "..."]
        return (" < " if column.family == "ordinal" else " | ").join(shown)
    logs = " of logarithms" if column.family == "log_normal" else ""
    return f"mean {column.mean:.4g}, sd {column.sd:.4g}{logs}"


@dataclass(frozen=True, eq=False)
class Table:
    """A frame as numbers.

    Attributes:
        schema: description of the columns.
        x: values (N, D) in the units of the model, 0 where missing, in torch's default dtype.
        mask: (N, D), True where observed.
        source: the frame.
    """

    schema: Schema
    x: Tensor
    mask: Tensor
    source: Any

    @property
    def index(self) -> Any:
        """The frame's index."""
        return self.source.index

    def __len__(self) -> int:
        return len(self.x)

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments of the programs: ``x`` (N, D) and ``mask`` (N, D)."""
        return {"x": self.x, "mask": self.mask}

    def frame(self, x: Any = None) -> Any:
        """Return values of the model (N, D) as a DataFrame; by default the table's own, NaN where missing."""
        restored = self.schema.restore(self.x if x is None else x)
        if x is None:
            restored[~self.mask.numpy()] = np.nan
        return self.schema.frame(restored, self.index)

    @property
    def labels(self) -> Any:
        """Labels of the rows for an xarray dim; tuples of a MultiIndex become text."""
        if getattr(self.index, "nlevels", 1) > 1:
            return [", ".join(map(str, label)) for label in self.index]
        return self.index.to_numpy()


def table(
    frame: Any, families: Mapping[str, str] | None = None, *, schema: Schema | Sequence[Mapping[str, Any]] | None = None
) -> Table:
    """Convert a DataFrame to numbers with a mask of its missing entries, and keep the way back.

    Families are inferred column by column:

    ============================================================= =====================================
    column                                                        family
    ============================================================= =====================================
    booleans, 0 and 1, two labels                                 ``bernoulli``
    ordered categories                                            ``ordinal``
    other labels, 50 at most                                      ``categorical``
    whole numbers that start at 0 or 1 and end below 1001         ``negative_binomial``
    other numbers                                                 ``student_t``, standardised
    ============================================================= =====================================

    ``families`` chooses among ``gaussian`` and ``student_t`` (standardised), ``log_normal`` (standardised logarithms)
    and ``gamma`` (divided by the mean) for positive numbers, ``beta`` for numbers inside (0, 1), ``poisson``,
    ``negative_binomial``, ``zero_inflated_poisson`` and ``zero_inflated_negative_binomial`` for counts, ``bernoulli``,
    ``categorical`` and ``ordinal`` (in the order of the values, or of a categorical dtype).  Look at ``.schema``.

    Args:
        frame: ``pandas.DataFrame`` of N rows and D columns with text as names; NaN, None and NA are missing entries.
        families: families by column, for those that are not to be inferred.
        schema: descriptions of an earlier table, for new data; nothing is inferred then.

    Returns:
        :class:`Table`.

    Raises:
        TypeError: for something else than a frame, or columns of dates.
        ValueError: for no rows, column names that are no text or occur twice, and columns that no model can learn
            from, with what to do.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"age": [31.5, None, 60.0], "visits": [0, 3, 12]}, index=["ann", "bo", "cy"])
        >>> patients = table(frame)
        >>> patients.mask
        tensor([[ True,  True],
                [False,  True],
                [ True,  True]])
        >>> patients.frame().equals(frame)
        True
    """
    if not is_frame(frame):
        raise TypeError(f"table takes a pandas.DataFrame, got {type(frame).__name__}: wrap it by DataFrame(...).")
    names = list(frame.columns)
    bad = [name for name in names if not isinstance(name, str)]
    if bad or len(set(names)) < len(names) or not names or not len(frame):
        raise ValueError(
            f"a table has at least one row and one column, and each column a name of its own that is text; got "
            f"{len(frame)} rows and columns {names}: set frame.columns."
        )
    if schema is not None:
        if families:
            raise ValueError("families are those of the schema: pass one of the two.")
        return (schema if isinstance(schema, Schema) else Schema.of_record(schema)).table(frame)
    unknown = sorted(set(families or {}) - set(names))
    if unknown:
        raise ValueError(f"families name column(s) {unknown}, and the frame has {names}.")
    columns = [infer_column(frame[name], (families or {}).get(name)) for name in names]
    return Schema(tuple(columns)).table(frame)
