"""One self-contained HTML page: pictures first, tables after; nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from adaattn_core.report.svg import text_of

DATA_ID = "adaattn-data"
"""Name of the element that holds the page's numbers as JSON."""

FILTER_FROM = 8
"""Rows from which a table is worth filtering."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy: a page that tried to load something could not."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number that a reader sees first, and what it is."""

    value: str
    name: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with what it says.

    Attributes
    ----------
    svg : str
        From `adaattn_core.report.charts`.
    caption : str
        HTML.
    faces : sequence of str
        Names of the faces of a grid's cells, for the buttons that switch between them.
    wide : bool
    """

    svg: str
    caption: str
    faces: Sequence[str] = ()
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table; `text` columns are aligned to the left."""

    name: str
    text: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Cells of a row as HTML, and what it stands for (`Mark.key`)."""

    cells: Sequence[str]
    key: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, what is said below it, figures side by side, then HTML."""

    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    body: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Everything on a page.

    Attributes
    ----------
    title : str
    lines : sequence of str
        What is to be read first, in sentences.
    tiles : sequence of Tile
    sections : sequence of Section
    data : mapping
        The numbers behind the page; kept in it as JSON (`page_data`).
    """

    title: str
    lines: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """Return the page as text."""
        names = [f"s{number}" for number in range(len(self.sections))]
        links = "".join(
            f'<a href="#{name}">{escape(section.title)}</a>'
            for name, section in zip(names, self.sections, strict=True)
        )
        sections = "\n".join(
            _section(name, section) for name, section in zip(names, self.sections, strict=True)
        )
        tiles = "".join(
            f"<li><b>{text_of(tile.value)}</b>{text_of(tile.name)}</li>" for tile in self.tiles
        )
        lines = "".join(f"<p>{text_of(line)}</p>" for line in self.lines)
        return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width">
<title>AdaAttn: {text_of(self.title)}</title>
<style>{_asset("page.css")}</style></head>
<body>
<header><h1>{text_of(self.title)}</h1>
<ul class="tiles">{tiles}</ul>
{lines}
<nav aria-label="Sections">{links}</nav></header>
<main>
{sections}
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="{DATA_ID}">{_json(self.data)}</script>
<script>{_asset("page.js")}</script>
</body>
</html>
"""


def page_data(text: str) -> Any:
    """Return the numbers that a page was made from.

    Raises
    ------
    ValueError
        If the text is no such page.
    """
    _, found, rest = text.partition(f'id="{DATA_ID}">')
    if not found:
        raise ValueError("a page without AdaAttn's data")
    return json.loads(rest.partition("</script>")[0])


def _asset(name: str) -> str:
    return files("adaattn_core.report").joinpath("assets", name).read_text("utf-8")


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element that holds it."""
    return json.dumps(data, allow_nan=False, default=str).replace("<", "\\u003c")


def _section(name: str, section: Section) -> str:
    lead = f"<p>{section.lead}</p>" if section.lead else ""
    figures = "".join(_figure(name, n, figure) for n, figure in enumerate(section.figures))
    figures = f'<div class="figures">{figures}</div>' if figures else ""
    return (
        f'<section id="{name}"><h2>{escape(section.title)}</h2>{lead}{figures}'
        f"{section.body}</section>"
    )


def _figure(section: str, number: int, figure: Figure) -> str:
    buttons = ""
    if len(figure.faces) > 1:
        group = f"{section}-{number}"
        choices = "".join(
            f'<label><input type="radio" name="{group}" value="{i}"{" checked" * (i == 0)}>'
            f" {escape(face)}</label>"
            for i, face in enumerate(figure.faces)
        )
        # Hidden until the script shows it: without one it would switch nothing.
        buttons = f'<fieldset class="faces" hidden>Colour by: {choices}</fieldset>'
    css = ' class="wide"' if figure.wide else ""
    return (
        f"<figure{css}>{buttons}{figure.svg}<figcaption>{figure.caption}</figcaption></figure>"
    )


def table(name: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return a table that its headings sort and a field filters."""
    heads = "".join(
        f'<th scope="col"{_css(column)}>'
        f'<button type="button">{escape(column.name)}</button></th>'
        for column in columns
    )
    lines = []
    for row in rows:
        cells = "".join(
            f"<td{_css(column)}>{cell}</td>"
            for column, cell in zip(columns, row.cells, strict=True)
        )
        key = f' data-key="{text_of(row.key)}"' if row.key else ""
        lines.append(f"<tr{key}>{cells}</tr>")
    field = f'<label hidden>Filter <input type="search" data-table="{name}"></label>'
    return (
        (field if len(rows) > FILTER_FROM else "")
        + f'<div class="scroll"><table class="sortable" id="{name}">'
        f"<thead><tr>{heads}</tr></thead><tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def facts_table(facts: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    lines = "".join(
        f'<tr><th scope="row" class="text">{text_of(name)}</th>'
        f'<td class="text">{text_of(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f'<div class="scroll"><table>{lines}</table></div>'


def _css(column: Column) -> str:
    return ' class="text"' if column.text else ""
