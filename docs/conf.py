"""Configuration of the documentation: Sphinx with MyST, every page with code executed, warnings as errors."""

import hashlib
import os
import re
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # figures become part of the page
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # a bar of text will do
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks of these pages are too small to share among cores

from sphinx.domains.python import PyObject

import pyro_hvae

ROOT = Path(__file__).parent.parent


def sources() -> str:
    """A hash of the package, so that pages run again when the code they show has changed."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "pyro_hvae").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


project = "pyro_hvae"
author = "the pyro_hvae developers"
copyright = author
release = version = pyro_hvae.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # the pages carry their own MathJax: equations render without a network
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "pyro_hvae"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["copy.js"]
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "tango"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = True

nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "docs" / "_build" / f"executed-{sources()}")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
autoclass_content = "class"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Use", "example_section"), ("References", "returns_style")]


def escape_stars(app, what, name, obj, options, lines):
    """Shapes such as (N, *event_shape) are no emphasis."""
    for index, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[index] = re.sub(r"(?<=[ (])\*(?=[a-z_]+(\[[^]]*\])?[),])", r"\\*", line)


GROUP = re.compile(r":ivar (\w+(?:, \w+)+):(.*)")


def separate_attributes(app, what, name, obj, options, lines):
    """Write attributes that share a description as fields of their own: Sphinx takes the first for a type."""
    found, left = [], list(lines)
    while left:
        line = left.pop(0)
        match = GROUP.match(line)
        if match is None:
            found.append(line)
            continue
        rest = []
        while left and left[0].startswith(" "):
            rest.append(left.pop(0))
        for attribute in match[1].split(", "):
            found += [f":ivar {attribute}:{match[2]}", *rest]
    lines[:] = found


def link_notebook(app, pagename, templatename, context, doctree):
    """Put a link to the notebook of a page above it."""
    if doctree is not None and (ROOT / "docs" / f"{pagename}.md").is_file() and "/" not in pagename:
        link = f'<a href="notebooks/{pagename}.ipynb" download>download as a notebook</a>'
        context["body"] = f'<p class="notebook">{link}</p>{context["body"]}'


def notebooks(app, error):
    """Write the notebooks beside the pages."""
    sys.path.insert(0, str(ROOT / "docs"))
    from notebooks import write_notebooks

    if error is None and app.builder.format == "html":
        write_notebooks(ROOT / "docs", Path(app.outdir) / "notebooks")


def setup(app):
    app.connect("html-page-context", link_notebook)
    app.connect("build-finished", notebooks)
    for field in PyObject.doc_field_types:
        if field.name == "variable":  # the name of an attribute is no reference to others of that name
            field.rolename = ""
    app.connect("autodoc-process-docstring", separate_attributes)
    app.connect("autodoc-process-docstring", escape_stars)
