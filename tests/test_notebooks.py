"""Every page can be downloaded as a notebook that has its code."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def converter():
    spec = importlib.util.spec_from_file_location("docs_notebooks", DOCS / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source(cell):
    return "".join(cell["source"])


def test_text_and_code_in_their_order():
    page = (
        "---\nfile_format: mystnb\n---\n\n# Title\n\n"
        "See [another page](other.md#part), [a site](https://a.org), {doc}`evidence` and $E[a]$ in [0, 1].\n\n"
        "```{code-cell} python\n:tags: [hide-input]\n\nx = [1](2) if False else 1\nx\n```\n\nEnd.\n\n"
        "```{toctree}\na\n```\n\n```{code-cell} python\nopen(\"results/a.csv\")\n```\n"
    )
    cells = converter().as_notebook(page)["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown"]
    assert source(cells[0]) == "# Title\n\nSee another page, [a site](https://a.org), evidence and $E[a]$ in [0, 1]."
    assert source(cells[1]) == "x = [1](2) if False else 1\nx"
    assert source(cells[2]) == "End."


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_notebook_has_the_code_of_its_page(path):
    page = path.read_text()
    notebook = converter().as_notebook(page)
    code = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    blocks = re.findall(r"^```\{code-cell\}.*?^```$", page, re.S | re.M)
    assert len(code) == len([block for block in blocks if '"results/' not in block])
    for text in code:
        ast.parse(text)
        assert text in page
    prose = "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    assert "{code-cell}" not in prose
    assert not re.search(r"\]\([\w/]+\.md", prose)
    json.dumps(notebook)


def test_notebooks_are_valid(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    names = converter().write_notebooks(DOCS, tmp_path)
    assert names == [path.stem for path in PAGES]
    for name in names:
        nbformat.validate(nbformat.read(tmp_path / f"{name}.ipynb", as_version=4))
