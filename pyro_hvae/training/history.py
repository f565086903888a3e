"""Records of a training run, in memory and as JSON lines."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pyro_hvae.notebook import html_table
from pyro_hvae.training.files import write_atomically

__all__ = ["History", "shown"]

_SHOWN = 10
"""Number of records that a notebook displays."""

Record = dict[str, Any]


class History(Sequence[Record]):
    """Records of a training run, in order of steps.

    A record holds ``step`` and ``epoch``, and some of: ``loss`` (nats a datum, averaged over the steps since the
    last record), ``rate``, ``seconds``, ``divergence_weight`` (of :class:`~pyro_hvae.bounds.Regularised`, at the
    step), the bound's terms by name (nats), and ``validation_loss`` with ``validation_<term>``.  With a ``path`` each
    record is also a line of JSON there, written when it is made.

    Example:
        >>> history = History()
        >>> history.append({"step": 1, "epoch": 0, "loss": 3.5})
        >>> history.append({"step": 2, "epoch": 0, "loss": 2.5, "kl_z": 0.25})
        >>> history["loss"]
        [3.5, 2.5]
        >>> history.to_pandas().loc[2, "kl_z"]
        np.float64(0.25)
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, records: Sequence[Record] = ()) -> None:
        self.path = None if path is None else Path(path)
        self._records = list(records)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> History:
        """Read the history of an earlier run; an incomplete last line is dropped.

        Raises:
            FileNotFoundError: if there is none.
        """
        records = []
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return cls(records=records)

    def append(self, record: Record) -> None:
        """Add a record, and its line to the file."""
        self._records.append(record)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(_plain(record)) + "\n")

    def truncate(self, size: int) -> None:
        """Drop all but the first ``size`` records, in the file too; a resumed run makes the others again."""
        if len(self) < size:
            warnings.warn(
                f"{self.path or 'the history'} has {len(self)} records, and the checkpoint was written after {size}: "
                "the file was damaged or changed, and the other records are lost",
                UserWarning,
                stacklevel=2,
            )
        del self._records[size:]
        if self.path is not None:
            lines = "".join(json.dumps(_plain(record)) + "\n" for record in self._records)
            write_atomically(self.path, lines.encode())

    def to_pandas(self) -> Any:
        """Convert to a DataFrame: one row per step, one column per quantity, NaN where none was recorded."""
        import pandas

        rows: dict[int, Record] = {}
        for record in self._records:
            rows.setdefault(record["step"], {}).update(record)
        frame = pandas.DataFrame(list(rows.values()))
        return frame if frame.empty else frame.set_index("step")

    def to_xarray(self) -> Any:
        """Convert to a Dataset over the dim ``step``."""
        return self.to_pandas().to_xarray()

    def names(self) -> list[str]:
        """Return the names of all recorded quantities, in order of first appearance."""
        return list(dict.fromkeys(name for record in self._records for name in record))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    @overload
    def __getitem__(self, index: str) -> list[Any]: ...
    def __getitem__(self, index: int | slice | str) -> Any:
        if isinstance(index, str):
            values = [record[index] for record in self._records if index in record]
            if not values:
                raise KeyError(f"nothing was recorded as {index!r}; recorded: {', '.join(self.names()) or 'nothing'}")
            return values
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {shown(value)}" for name, value in self._records[-1].items()) if self._records else ""
        return f"History({len(self)} records{last and f'; last: {last}'})"

    def _repr_html_(self) -> str:
        names, few = self.names(), self._records[-_SHOWN:]
        rows = [[shown(record.get(name)) for name in names] for record in few]
        title = f"History: {len(self)} records" + (f", the last {len(few)}" if len(few) < len(self) else "")
        return html_table(title, rows, header=names)


def shown(value: Any) -> str:
    """Return a recorded value as text: numbers to six digits, nothing for None."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(record: Record) -> Record:
    """Replace NaN and infinities by None, since strict JSON has neither."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
