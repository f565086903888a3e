"""The gallery shows the pictures that are there, and leads to pages and examples that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "gallery.md").read_text()


def test_pictures_are_those_of_the_folder():
    shown = re.findall(r"_static/gallery/([\w.]+)\)", PAGE)
    assert sorted(shown) == sorted(path.name for path in (ROOT / "docs" / "_static" / "gallery").iterdir())
    assert all(alternative.strip() for alternative in re.findall(r"!\[([^\]]*)\]", PAGE))


def test_pages_and_scripts_that_are_named_exist():
    pages = set(re.findall(r"\]\((\w+\.md)\)", PAGE))
    scripts = set(re.findall(r"`(\w+\.py)`", PAGE))
    assert {name for name in pages if not (ROOT / "docs" / name).exists()} == set()
    assert {name for name in scripts if not (ROOT / "examples" / name).exists()} == set()
    assert {"tables.md", "counts.md", "images.md", "sequences.md"} <= pages
