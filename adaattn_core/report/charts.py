"""Figures of reports: curves and points, grids of cells, bars. Each returns one inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adaattn_core.report.svg import (
    COLOURS,
    SHAPES,
    Axis,
    Mark,
    drawing,
    focusable,
    frame,
    ink_on,
    label,
    shape,
    text_of,
)

_LEFT, _RIGHT, _TOP, _FOOT = 66.0, 14.0, 12.0, 46.0
_LEGEND_LINE = 20.0


@dataclass(frozen=True, slots=True)
class Series:
    """Marks that belong together.

    Attributes
    ----------
    name : str
        For the legend; "" leaves it out of there.
    marks : sequence of Mark
    joined : bool
        Whether a line joins them, in the order given.
    style : int, optional
        Colour and shape; by default the series' place.
    dashed : bool
    bare : bool
        Whether the line is all that is drawn: its points are marks of other series.
    """

    name: str
    marks: Sequence[Mark]
    joined: bool = True
    style: int | None = None
    dashed: bool = False
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Guide:
    """A line across the plot at a value of y, with its name; `diagonal`: where y = x."""

    name: str
    y: float = math.nan
    diagonal: bool = False


def xy_chart(
    name: str,
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    guides: Sequence[Guide] = (),
    width: float = 520.0,
    height: float = 330.0,
) -> str:
    """Points and curves.

    Parameters
    ----------
    name : str
        What the figure shows, for readers who do not see it.
    series : sequence of Series
    x_axis, y_axis : Axis
    guides : sequence of Guide
    width, height : float
        Of the plot with its labels; the legend comes on top.
    """
    shown = [s for s in series if s.marks]
    rows = _legend_rows([s for s in shown if s.name], width)
    top = _TOP + _LEGEND_LINE * len(rows)
    marks = [mark for s in shown for mark in s.marks]
    x = x_axis.scaled((m.x for m in marks), _LEFT, width - _RIGHT)
    levels = [m.y for m in marks] + [g.y for g in guides if not g.diagonal]
    y = y_axis.scaled(levels, top + height - _FOOT, top)
    body = [*_legend(rows, series), *frame(x, y, x_axis, y_axis)]
    for guide in guides:
        if guide.diagonal:
            ends = max(x.low, y.low), min(x.high, y.high)
            path = "L".join(f"{x(e):.1f},{y(e):.1f}" for e in ends)
            body.append(f'<path class="guide" d="M{path}"/>')
            body.append(
                label(x(ends[1]) - 6, y(ends[1]) + 16, guide.name, "end", 'class="quiet"')
            )
        else:
            level = y(guide.y)
            body.append(f'<path class="guide" d="M{x.start:.1f},{level:.1f}H{x.stop:.1f}"/>')
            body.append(label(x.start + 4, level - 4, guide.name, "start", 'class="quiet"'))
    for one in shown:
        colour, sign = _style(series, one)
        if one.joined and len(one.marks) > 1:
            path = "L".join(f"{x(m.x):.1f},{y(m.y):.1f}" for m in one.marks)
            dashes = ' stroke-dasharray="6 4"' if one.dashed else ""
            body.append(
                f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
            )
        size = 5.0 if len(marks) < 200 else 3.5
        body += [
            focusable(
                shape(sign, round(x(m.x), 1), round(y(m.y), 1), colour, size), m.tip, m.key
            )
            for m in one.marks
            if not one.bare
        ]
    return drawing(width, top + height, name, body)


def _style(series: Sequence[Series], one: Series) -> tuple[str, str]:
    number = one.style if one.style is not None else list(series).index(one)
    return COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]


def _legend_rows(named: Sequence[Series], width: float) -> list[list[tuple[float, Series]]]:
    rows: list[list[tuple[float, Series]]] = []
    at = width
    for one in named:
        need = 30.0 + 7.0 * len(one.name)
        if at + need > width:
            rows.append([])
            at = _LEFT
        rows[-1].append((at, one))
        at += need
    return rows


def _legend(rows: list[list[tuple[float, Series]]], series: Sequence[Series]) -> list[str]:
    parts = []
    for number, row in enumerate(rows):
        y = 12.0 + _LEGEND_LINE * number
        for x, one in row:
            colour, sign = _style(series, one)
            parts += [shape(sign, x + 6, y, colour), label(x + 16, y + 4, one.name, "start")]
    return parts


@dataclass(frozen=True, slots=True)
class Face:
    """One way to colour a cell: its colour and the text on it."""

    colour: str
    text: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a grid, with a face for every way to look at it."""

    row: int
    column: int
    faces: Sequence[Face]
    tip: str
    key: str = ""


def grid_chart(
    name: str,
    cells: Sequence[Cell],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_label: str,
    column_label: str,
) -> str:
    """Cells in rows and columns; the page's buttons switch between their faces."""
    longest = max((len(face.text) for cell in cells for face in cell.faces), default=3)
    wide = max(7.5 * longest + 10, 30.0 if len(columns) > 12 else 56.0)
    tall = 26.0
    left = max(30.0 + 7.0 * max(map(len, rows), default=1), 60.0)
    width, height = left + wide * len(columns) + 10, 44 + tall * len(rows)
    body = [label(left + wide * len(columns) / 2, 14, column_label)]
    body += [label(left + wide * (i + 0.5), 34, column) for i, column in enumerate(columns)]
    middle = 40 + tall * len(rows) / 2
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    body.append(label(14, middle, row_label, "middle", turned))
    body += [label(left - 6, 58 + tall * i, row, "end") for i, row in enumerate(rows)]
    for cell in cells:
        x, y = left + wide * cell.column, 40 + tall * cell.row
        first = cell.faces[0]
        faces = " ".join(
            f'data-fill{i}="{f.colour}" data-ink{i}="{ink_on(f.colour)}"'
            f' data-text{i}="{text_of(f.text)}"'
            for i, f in enumerate(cell.faces)
        )
        inner = (
            f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}"'
            f' height="{tall - 2:.1f}" rx="3" fill="{first.colour}" {faces}/>'
            + label(
                x + wide / 2, y + 17, first.text, extra=f'style="fill:{ink_on(first.colour)}"'
            )
        )
        body.append(
            focusable(inner, cell.tip, cell.key, row=cell.row + 1, column=cell.column + 1)
        )
    return drawing(width, height, name, body)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its name, its length, what it says; `style` as in `Series`."""

    name: str
    value: float
    tip: str
    style: int = 0
    key: str = ""


def bar_chart(
    name: str,
    bars: Sequence[Bar],
    axis_label: str,
    *,
    base: float = 0.0,
    log: bool = False,
    width: float = 520.0,
) -> str:
    """Bars to the right or left of `base`, one below the other, with their numbers."""
    left = 20.0 + 7.0 * max((len(bar.name) for bar in bars), default=1)
    tall = 24.0
    foot = 10 + tall * len(bars)
    axis = Axis(axis_label, log=log)
    values = [bar.value for bar in bars]
    x = axis.scaled([*values, base], left, width - 70)
    body = []
    for tick in x.ticks():
        body.append(f'<path class="grid" d="M{x(tick):.1f},6V{foot:.1f}"/>')
        body.append(label(x(tick), foot + 16, f"{tick:.4g}"))
    body.append(f'<path class="guide" d="M{x(base):.1f},6V{foot:.1f}"/>')
    body.append(label((left + width - 70) / 2, foot + 36, axis_label))
    for number, bar in enumerate(bars):
        y = 10 + tall * number
        ends = sorted((x(base), x(bar.value)))
        inner = (
            f'<rect x="{ends[0]:.1f}" y="{y + 3:.1f}" width="{max(ends[1] - ends[0], 1):.1f}"'
            f' height="{tall - 7:.1f}" fill="{COLOURS[bar.style % len(COLOURS)]}"/>'
        )
        body.append(label(left - 6, y + 16, bar.name, "end"))
        body.append(focusable(inner, bar.tip, bar.key, row=number + 1, column=1))
        body.append(label(ends[1] + 5, y + 16, f"{bar.value:.4g}", "start"))
    return drawing(width, foot + 46, name, body)
