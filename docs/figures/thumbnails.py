"""Thumbnails of the gallery: pictures of the pages and examples, shrunk.

    python docs/figures/thumbnails.py PICTURE.png ... [--out docs/_static/gallery]

Pictures are those that examples write (``python examples/NAME.py --out runs``), those of this folder, and figures that
pages show, saved from them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 420, 300

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "_static" / "gallery")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.pictures:
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        picture.quantize(64).save(options.out / path.name, optimize=True)
