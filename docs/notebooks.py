"""Pages as notebooks: text as Markdown, blocks of code as cells, for readers to download."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["as_notebook", "write_notebooks"]

_HEADER = re.compile(r"\A---\n.*?\n---\n", re.S)
_CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(---\n.*?\n---\n|(?::[^\n]*\n)*)(.*?)^```$", re.S | re.M)
_DIRECTIVE = re.compile(r"^(`{3,}|:{3,})\{[a-z-]+\}.*?^\1$\n?", re.S | re.M)
_LINK = re.compile(r"!?\[([^\[\]]*)\]\((?!https?:|mailto:)[\w/.#-]+\)")
_ROLE = re.compile(r"\{doc\}`([^`<]+?)(?: *<[^>]*>)?`")


def as_notebook(page: str) -> dict[str, Any]:
    """Convert a page of MyST Markdown to a notebook of version 4, without outputs.

    Links to other pages become plain text, since a notebook lies beside no other page; directives for Sphinx, and cells
    that read files of this folder, are left out.
    """
    text, cells, start = _HEADER.sub("", page), [], 0
    for match in _CELL.finditer(text):
        cells.append(_prose(text[start : match.start()]))
        code = match[2].strip("\n")
        if '"results/' not in code:
            cells.append({"cell_type": "code", "execution_count": None, "outputs": [], **_source(code)})
        start = match.end()
    cells.append(_prose(text[start:]))
    kept = [cell for cell in cells if cell["source"]]
    for number, cell in enumerate(kept):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": kept}


def write_notebooks(pages: Path, folder: Path) -> list[str]:
    """Write a notebook for each page of a folder, and return the names of the pages."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for path in sorted(pages.glob("*.md")):
        notebook = as_notebook(path.read_text(encoding="utf-8"))
        (folder / f"{path.stem}.ipynb").write_text(json.dumps(notebook, indent=1, ensure_ascii=False), encoding="utf-8")
        names.append(path.stem)
    return names


def _prose(text: str) -> dict[str, Any]:
    text = _LINK.sub(r"\1", _DIRECTIVE.sub("", text))
    return {"cell_type": "markdown", **_source(_ROLE.sub(r"\1", text).strip())}


def _source(text: str) -> dict[str, Any]:
    return {"metadata": {}, "source": text.splitlines(keepends=True)}
