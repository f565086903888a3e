"""One column of a table: its family, its values as numbers, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["FAMILIES", "Column", "infer_column"]

REAL = ("gaussian", "student_t")
POSITIVE = ("log_normal", "gamma")
COUNTS = ("poisson", "negative_binomial", "zero_inflated_poisson", "zero_inflated_negative_binomial")
LABELS = ("bernoulli", "categorical", "ordinal")
FAMILIES = (*REAL, *POSITIVE, "beta", *COUNTS, *LABELS)
"""Names of the families of columns."""

_MOST_CATEGORIES = 50
_LARGEST_COUNT = 1000


@dataclass(frozen=True)
class Column:
    """Description of a column.

    Attributes:
        name: name of the column.
        family: one of :data:`FAMILIES`.
        mean, sd: moments of the observed values by which they are standardised (of the logarithms for log-normal
            columns; 0 and 1 for categories).
        categories: labels of the codes 0, 1, ..., for binary, ordinal and categorical columns; else empty.
        whole: values are whole numbers, so imputations are rounded.
        dtype: name of the frame's dtype.
    """

    name: str
    family: str
    mean: float = 0.0
    sd: float = 1.0
    categories: tuple[Any, ...] = ()
    whole: bool = False
    dtype: str = "float64"

    @property
    def is_label(self) -> bool:
        """Whether values are labels."""
        return self.family in LABELS

    def encode(self, series: Any) -> np.ndarray:
        """Convert a series (N,) to the numbers of the model, NaN where it is missing.

        Raises:
            ValueError: for a value that the family can't have, with its label in the index.
        """
        if self.is_label:
            return self._codes(series)
        values = _numbers(self.name, series)
        _check_support(self, values, series)
        if self.family in REAL:
            return (values - self.mean) / self.sd
        if self.family == "log_normal":
            return np.exp((np.log(values) - self.mean) / self.sd)
        return values / self.mean if self.family == "gamma" else values

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Convert numbers of the model (any shape) to numbers in the units of the frame; codes stay codes."""
        if self.family in REAL:
            values = values * self.sd + self.mean
        elif self.family == "log_normal":
            values = np.exp(np.log(values) * self.sd + self.mean)
        elif self.family == "gamma":
            values = values * self.mean
        return np.rint(values) if self.whole else values

    def log_scale(self, values: np.ndarray) -> np.ndarray:
        """Return ``log |d encoded / d value|`` at encoded values, nats; 0 for counts and labels."""
        if self.family in REAL:
            return np.full(values.shape, -math.log(self.sd))
        if self.family == "gamma":
            return np.full(values.shape, -math.log(self.mean))
        if self.family == "log_normal":
            logs = np.log(values)
            return logs - math.log(self.sd) - (logs * self.sd + self.mean)
        return np.zeros(values.shape)

    def series(self, values: np.ndarray, index: Any) -> Any:
        """Convert decoded numbers (N,), NaN where missing, to a series of the frame's dtype where that can hold it."""
        import pandas as pd

        missing = np.isnan(values)
        if self.is_label:
            codes = np.where(missing, -1, values).astype(int)
            ordered = self.family == "ordinal"
            made = pd.Series(pd.Categorical.from_codes(codes, list(self.categories), ordered=ordered), index, None)
            return made if self.dtype == "category" else self._cast(made.astype(object), bool(missing.any()))
        return self._cast(pd.Series(values, index), bool(missing.any()))

    def _cast(self, made: Any, missing: bool) -> Any:
        plain = self.dtype == "bool" or self.dtype.startswith(("int", "uint"))
        if (missing and plain) or (self.dtype.startswith("float") and self.is_label):
            return made
        try:
            return made.astype(self.dtype)
        except (TypeError, ValueError):
            return made

    def _codes(self, series: Any) -> np.ndarray:
        codes = {label: code for code, label in enumerate(self.categories)}
        by_text = {str(label): code for code, label in enumerate(self.categories)}
        result = np.full(len(series), np.nan)
        labels = series.tolist()
        if hasattr(series, "cat"):  # the labels as the dtype has them, which a list changes
            labels = [series.cat.categories[code] if code >= 0 else None for code in series.cat.codes]
        for row, (label, missing) in enumerate(zip(labels, series.isna().tolist())):
            if missing:
                continue
            code = codes.get(label, by_text.get(str(label)))
            if code is None:
                raise ValueError(
                    f"column {self.name!r} has {label!r} at index {series.index[row]!r}, and its categories are "
                    f"{list(self.categories)}: set it to NaN, or build the table from data that have it."
                )
            result[row] = code
        return result

    def record(self) -> dict[str, Any]:
        """Return the description as plain data; labels that are no plain data become text."""
        plain = (str, int, float, bool)
        return asdict(self) | {
            "categories": [label if isinstance(label, plain) else str(label) for label in self.categories]
        }

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> Column:
        """Invert :meth:`record`."""
        return Column(**{**record, "categories": tuple(record["categories"])})


def infer_column(series: Any, family: str | None) -> Column:
    """Describe a column; see :func:`~pyro_hvae.tables.table` for the rules.

    Raises:
        TypeError: for dates and other values that are neither numbers nor labels.
        ValueError: for an unknown family, a column without values or with one value, too many labels.
    """
    import pandas as pd

    name, dtype = series.name, str(series.dtype)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family of column {name!r} must be one of {', '.join(FAMILIES)}; got {family!r}.")
    present = series.dropna()
    if not len(present):
        raise ValueError(f"column {name!r} has no value: drop it.")
    categorical = isinstance(series.dtype, pd.CategoricalDtype)
    kind = "category" if categorical else pd.api.types.infer_dtype(present, skipna=True)
    if kind.startswith(("datetime", "timedelta", "period", "date", "time", "complex", "bytes", "interval")):
        raise TypeError(
            f"column {name!r} holds {kind} values, which no family has: convert it to numbers (days since a date, for "
            "one), to labels, or drop it."
        )
    numeric = kind in ("integer", "floating", "mixed-integer-float", "decimal")
    labels = _labels(present, kind, series.dtype if categorical else None)
    if len(labels) == 1:
        raise ValueError(f"column {name!r} has the one value {labels[0]!r}: drop it.")
    values = _numbers(name, present) if numeric or kind == "boolean" else None
    if family is None:
        family = _inferred(name, kind, labels, values, categorical and bool(series.dtype.ordered))
    if family in LABELS:
        if family == "bernoulli" and len(labels) != 2:
            raise ValueError(
                f"column {name!r} has {len(labels)} values, and a Bernoulli column has two: use 'categorical' or "
                "'ordinal'."
            )
        return Column(name, family, categories=tuple(labels), dtype=dtype)
    if values is None:
        raise ValueError(
            f"column {name!r} holds {kind} values, and family {family!r} needs numbers: use 'bernoulli', 'categorical' "
            "or 'ordinal', or convert it."
        )
    column = Column(name, family, whole=bool((values == np.rint(values)).all()), dtype=dtype)
    _check_support(column, values, present)
    moments = np.log(values) if family == "log_normal" else values
    return Column(name, family, float(moments.mean()), float(moments.std()), (), column.whole, dtype)


def _labels(present: Any, kind: str, dtype: Any) -> list[Any]:
    """Return the different values of a column, in their order; of a categorical column its categories."""
    if dtype is not None:
        return [_plain(label) for label in dtype.categories]
    values = [_plain(value) for value in present.unique()]
    return sorted(values, key=str if kind.startswith("mixed") and kind != "mixed-integer-float" else None)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _inferred(name: str, kind: str, labels: Sequence[Any], values: np.ndarray | None, ordered: bool) -> str:
    if ordered and len(labels) > 2:
        return "ordinal"
    if kind == "boolean" or (values is None and len(labels) == 2) or (len(labels) == 2 and set(labels) == {0, 1}):
        return "bernoulli"
    if values is None:
        if kind != "category" and len(labels) > _MOST_CATEGORIES:
            raise ValueError(
                f"column {name!r} has {len(labels)} different labels, more than {_MOST_CATEGORIES}: drop it, merge its "
                "rare labels, or pass families={...: 'categorical'}."
            )
        return "categorical"
    whole = bool((values == np.rint(values)).all())
    if whole and values.min() in (0.0, 1.0) and values.max() <= _LARGEST_COUNT:
        return "negative_binomial"
    return "student_t"


def _numbers(name: str, series: Any) -> np.ndarray:
    """Return a series as numbers, NaN where missing.

    Raises:
        ValueError: for values that are no numbers, or infinite.
    """
    import pandas as pd

    try:
        values = pd.to_numeric(series).to_numpy(dtype=float, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name!r} should hold numbers: {error}") from None
    if np.isinf(values).any():
        row = series.index[int(np.isinf(values).argmax())]
        raise ValueError(f"column {name!r} is infinite at index {row!r}: set it to NaN, or drop the row.")
    return values


_SUPPORTS = {
    "positive numbers": (POSITIVE, lambda x: x > 0),
    "numbers between 0 and 1, without the ends": (("beta",), lambda x: (x > 0) & (x < 1)),
    "counts (whole numbers from 0 on)": (COUNTS, lambda x: (x >= 0) & (x == np.rint(x))),
}


def _check_support(column: Column, values: np.ndarray, series: Any) -> None:
    for what, (families, inside) in _SUPPORTS.items():
        if column.family not in families:
            continue
        bad = ~np.isnan(values) & ~inside(values)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"column {column.name!r} has {int(bad.sum())} value(s) that family {column.family!r} can't have, the "
                f"first {values[row]:g} at index {series.index[row]!r}: it takes {what}. Choose another family, as in "
                f"families={{{column.name!r}: 'student_t'}}, or set them to NaN."
            )
