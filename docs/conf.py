"""Sphinx configuration: MyST pages, autodoc of the public API, no warning allowed."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.domains.python import PyObject
from sphinx.util.docfields import TypedField

from adaattn_core import __version__

project = "AdaAttn"
author = "the AdaAttn authors"
project_copyright = "2026, the AdaAttn authors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples/**", "figures/*.py"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"AdaAttn {release}"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Types in docstrings are prose ("ndarray of float64, shape (len_q,)"): without this, Sphinx
# takes every word of them for a reference.
for field in PyObject.doc_field_types:
    if isinstance(field, TypedField):
        field.typerolename = ""

# Only full names of this project are held to exist; bare names of exceptions and of other
# libraries' classes are not.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!adaattn_).*")]

# Formulas are turned into MathML here, so that pages show them without a network: the default
# renderer loads a script from one. Without the package (it is in the extra `docs`) that is what
# is left.
try:
    from latex2mathml.converter import convert
except ImportError:
    convert = None


def _formula(translator: Any, node: nodes.Node) -> None:
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register the renderer."""
    if convert is not None:
        app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))


if convert is not None:
    html_math_renderer = "mathml"
    myst_update_mathjax = False
