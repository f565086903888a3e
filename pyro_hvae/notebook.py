"""Results as tables of HTML, which notebooks display."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["html_of_lines", "html_table"]


def html_table(
    title: str,
    rows: Iterable[Sequence[Any]] | Mapping[str, Any],
    *,
    header: Sequence[Any] = (),
    notes: Iterable[str] = (),
) -> str:
    """Return a table as HTML, every text in it escaped.

    Args:
        title: text above the table.
        rows: cells of each row, the first of which names it; or a mapping from names to values.
        header: names of the columns; none by default.
        notes: lines below the table.

    Example:
        >>> print(html_table("loss", {"first": 3.5, "a < b": 2}))
        <table><caption>loss</caption>
        <tr><th style="text-align: left">first</th><td style="text-align: left">3.5</td></tr>
        <tr><th style="text-align: left">a &lt; b</th><td style="text-align: left">2</td></tr>
        </table>
    """
    lines = [list(row) for row in (rows.items() if isinstance(rows, Mapping) else rows)]
    parts = [f"<table><caption>{_escaped(title)}</caption>"]
    if header:
        parts.append("<tr>" + "".join(_cell("th", name) for name in header) + "</tr>")
    parts += [
        "<tr>" + _cell("th", line[0]) + "".join(_cell("td", value) for value in line[1:]) + "</tr>" for line in lines
    ]
    return "\n".join([*parts, "</table>", *(f"<p>{_escaped(note)}</p>" for note in notes)])


def html_of_lines(title: str, text: str) -> str:
    """Return lines of the form ``name: value`` as a table; a line without a colon is a note below it.

    Example:
        >>> html_of_lines("log p(x)", "mean: -2.5 nats").count("<td")
        1
    """
    pairs = [line.strip().split(": ", 1) for line in text.splitlines() if line.strip()]
    notes = [pair[0] for pair in pairs if len(pair) == 1]
    return html_table(title, [pair for pair in pairs if len(pair) == 2], notes=notes)


def _cell(tag: str, value: Any) -> str:
    return f'<{tag} style="text-align: left">{_escaped(value)}</{tag}>'


def _escaped(value: Any) -> str:
    return html.escape(str(value))
