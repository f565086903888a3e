"""Findings about a guide, the worst first, each with its meaning and advice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from pyro_hvae.notebook import html_table

__all__ = ["LEVELS", "Finding", "Report"]

LEVELS = ("wrong", "doubtful", "note", "good")
"""Levels of findings, the worst first."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        level: of :data:`LEVELS`.
        what: the finding, with its number.
        meaning: its meaning for the posterior.
        advice: possible remedies.
        source: the reference of the threshold.
    """

    level: str
    what: str
    meaning: str
    advice: str = ""
    source: str = ""


@dataclass(frozen=True, repr=False)
class Report:
    """The result of :func:`pyro_hvae.diagnose`.  It prints as text, is a table in notebooks, and converts to JSON.

    Attributes:
        findings: the worst first.
        numbers: by name, the numbers behind the findings: ``khat`` and ``layers`` (``xarray.Dataset``), ``elbo``,
            ``ess``, ``draws``, ``predictive``, ``loo``, ``calibration``, ``evidence``, ``error``, ``elbos``,
            ``rhat``, as far as they apply.
    """

    findings: tuple[Finding, ...]
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The worst level of the findings."""
        return self.findings[0].level if self.findings else "good"

    def to_json(self) -> str:
        """Return findings and numbers as JSON text; not-a-number as null.

        Example:
            >>> json.loads(Report((Finding("note", "K = 3", "few"),)).to_json())["findings"][0]["level"]
            'note'
        """
        return json.dumps(
            {"findings": [asdict(f) for f in self.findings], "numbers": _plain(dict(self.numbers))}, indent=1
        )

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level.upper():<9}{finding.what}")
            if finding.meaning:
                lines.append(f"{'':<9}{finding.meaning}")
            if finding.advice:
                lines.append(f"{'':<9}-> {finding.advice}")
            if finding.source:
                lines.append(f"{'':<9}({finding.source})")
        for title, table in self.tables().items():
            lines += ["", title, table.to_string()]
        return "\n".join(lines)

    __repr__ = __str__

    def table(self) -> Any:
        """Return a ``pandas.DataFrame`` with a row per layer; None where no latent is local to a datum."""
        layers = self.numbers.get("layers")
        return None if layers is None else layers.to_dataframe().round(3)

    def tables(self) -> dict[str, Any]:
        """Return the tables below the findings by title, each a ``pandas.DataFrame``.

        Those are, as far as they apply: a row per site of the largest differences between the draws and the weighted
        draws, of the means in standard deviations and of the standard deviations as a ratio; and a row per layer.
        """
        import pandas as pd

        found, sites = {}, self.numbers.get("draws")
        if sites:
            rows = {
                name: {
                    "mean off by (sd)": round(one["shift"], 2),
                    "sd / weighted sd": round(one["ratio"], 2),
                    "entries off": one["off"],
                    "entries": one["entries"],
                }
                for name, one in sites.items()
            }
            found["the draws against the draws once weighted"] = pd.DataFrame.from_dict(rows, orient="index")
        table = self.table()
        return found if table is None else found | {"layers": table}

    def _repr_html_(self) -> str:
        header = ("", "finding", "meaning", "try", "reference")
        pages = [html_table("Diagnosis", [astuple(finding) for finding in self.findings], header=header)]
        for title, table in self.tables().items():
            columns = [table.index.name or "", *table.columns]
            pages.append(html_table(title, table.astype(object).itertuples(), header=columns))
        return "".join(pages)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict") and hasattr(value, "data_vars"):
        return {name: _plain(array.values.tolist()) for name, array in {**value.coords, **value.data_vars}.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)
