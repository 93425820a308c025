"""Sphinx's settings. The pages are gathered by gather.py; nothing is fetched, while building or while reading."""
import configparser
import inspect
import re
from pathlib import Path

from docutils.nodes import SkipNode
from fastcore.docments import docments
from latex2mathml.converter import convert

parser = configparser.ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent.parent / "settings.ini")
settings = parser["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
html_title = f"{project} {release}"
copyright = settings["copyright"]
extensions = ["myst_nb", "sphinx.ext.autodoc"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
suppress_warnings = ["myst.header", "ref.python"]  # a report's headings may skip a level; fields of two classes can have the name of a type
html_math_renderer = "mathml"


def _escaped(text: str) -> str:
    "Prose of docstrings, which is no reStructuredText."
    return re.sub(r"([*|_\\])", r"\\\1", text).replace("`", "``")


def with_comments(app, what, name, thing, options, lines) -> None:
    "Below a docstring, what the comments behind parameters and fields say."
    lines[:] = [] if lines and lines[0].startswith("Alias for field number") else [_escaped(line) for line in lines]
    try:
        found = docments(thing, full=True) if inspect.isroutine(thing) or inspect.isclass(thing) else {}
    except (TypeError, ValueError, OSError, SyntaxError):
        return
    said = {key: about["docment"] for key, about in found.items() if about.get("docment") and key != "self"}
    if said:
        lines += ["", *(f"- {'returns' if key == 'return' else f'``{key}``'}: {_escaped(' '.join(text.split()))}" for key, text in said.items())]


def _inline(self, node) -> None:
    self.body.append(convert(node.astext()))


def _block(self, node) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')


def setup(app) -> None:
    "Formulas are MathML, which browsers show by themselves."
    def then_skip(visit):
        def visitor(self, node):
            visit(self, node)
            raise SkipNode
        return visitor

    app.add_html_math_renderer("mathml", (then_skip(_inline), None), (then_skip(_block), None))
    app.connect("autodoc-process-docstring", with_comments)
