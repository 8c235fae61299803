"""Figures and tables of heads: what was decided, certified and, where measured, is true.

All of them are made from the rows of ``--json`` (`HeadRow.to_json`), so that a run of yesterday
can be drawn like one of now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaattn_core.report.charts import Cell, Face, Guide, Series, grid_chart, xy_chart
from adaattn_core.report.page import Column, Figure, Row, table
from adaattn_core.report.svg import Axis, Mark, ramp, short, text_of

Head = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a structure is drawn: its letter in cells, its place among colours and shapes."""

    letter: str
    colour: str
    style: int


KINDS = {
    "dense": Kind("D", "#d8d8d8", 6),
    "score_skip": Kind("S", "#56b4e9", 4),
    "low_rank": Kind("R", "#e3b4cf", 3),
    "block_sparse": Kind("B", "#e69f00", 5),
    "landmark": Kind("L", "#4fc3a1", 2),
}
_OTHER = Kind("?", "#ffffff", 0)


def key_of(head: Head) -> str:
    """Name of a head on a page."""
    return f"{head['layer']}/{head['batch']}/{head['head']}"


def upper_of(head: Head) -> float:
    """Certified error; JSON says null where it is infinite."""
    upper = head["certificate"]["upper"]
    return math.inf if upper is None else float(upper)


def name_of(head: Head) -> str:
    """Say which head it is."""
    batch = f" batch {head['batch']}" if head["batch"] else ""
    layer = f"layer {head['layer']}" if head["layer"] else ""
    return f"{layer}{batch} head {head['head']}".strip()


def tip_of(head: Head) -> str:
    """Everything that a reader who points at a head wants to know."""
    certificate = head["certificate"]
    lines = [
        name_of(head),
        f"{head['structure']} {head['qk']}/{head['pv']}"
        + (f", {head['rank']} far columns" if head["rank"] else ""),
        f"{head['share']:.1%} of its scores computed",
        f"certified: {certificate['rows']:.0%} of rows err by at most {short(upper_of(head))}"
        f" ({certificate['guarantee']}, confidence {certificate['confidence']:g})",
    ]
    if head["measured_rows"] is not None:
        held = "" if held_of(head) else ": the certificate is false"
        lines.append(f"true: {short(head['measured_rows'])}{held}")
    if head.get("reason"):
        lines.append(str(head["reason"]))
    return "\n".join(lines)


def held_of(head: Head) -> bool | None:
    """Whether the certificate is true; None where nobody knows."""
    true = head["measured_rows"]
    return None if true is None else bool(true <= upper_of(head))


def map_figure(heads: Sequence[Head], note: Callable[[Head], str] = lambda _: "") -> Figure:
    """Layers x heads: colours and letters of structures; buttons show shares and errors.

    Parameters
    ----------
    heads : sequence of mapping
    note : callable
        What to add to a head's text, if anything.
    """
    rows = list(dict.fromkeys((h["layer"], h["batch"]) for h in heads))
    batched = len({batch for _, batch in rows}) > 1
    names = [
        f"{layer or 'layer'}{f' batch {batch}' if batched else ''}" for layer, batch in rows
    ]
    columns = sorted({h["head"] for h in heads})
    known = any(h["measured_rows"] is not None for h in heads)
    largest = max((upper_of(h) for h in heads if upper_of(h) < math.inf), default=1.0) or 1.0

    def faces(head: Head) -> list[Face]:
        kind = KINDS.get(head["structure"], _OTHER)
        share, upper, true = head["share"], upper_of(head), head["measured_rows"]
        found = [
            Face(kind.colour, f"{kind.letter} {share:.0%}"),
            Face(ramp(share), f"{share:.0%}"),
            Face(ramp(upper / largest), short(upper)),
        ]
        if known:
            found.append(Face(ramp((true or 0.0) / largest), short(true)))
        return found

    cells = [
        Cell(
            rows.index((h["layer"], h["batch"])),
            columns.index(h["head"]),
            faces(h),
            "\n".join(filter(None, (tip_of(h), note(h)))),
            key_of(h),
        )
        for h in heads
    ]
    seen = dict.fromkeys(h["structure"] for h in heads)
    legend = ", ".join(f"<b>{KINDS.get(k, _OTHER).letter}</b> {text_of(k)}" for k in seen)
    svg = grid_chart(
        "Structure and share of scores of every head", cells, names, list(map(str, columns)),
        row_label="layer", column_label="head",
    )  # fmt: skip
    caption = (
        f"What was decided for every head, and the share of its scores computed. {legend}."
    )
    shown = ("structure", "share kept", "certified error", "true error")
    return Figure(svg, caption, shown if known else shown[:3], wide=True)


def certificate_figure(heads: Sequence[Head], budget: float | None) -> Figure:
    """Certified against true error with the diagonal, or against the budget alone."""
    known = [h for h in heads if h["measured_rows"] is not None]
    guides = [] if budget is None else [Guide(f"budget {budget:g}", budget)]
    if known:
        least = min((h["measured_rows"] for h in known if h["measured_rows"] > 0), default=1e-6)
        series = _by_kind(known, lambda h, _: (max(h["measured_rows"], least), upper_of(h)))
        false = sum(not held_of(h) for h in known)
        caption = (
            "Each mark is a head. On or above the diagonal its certificate is true: "
            f"{len(known) - false} of {len(known)}. The distance is what the bound gives away."
        )
        values = [v for h in known for v in (h["measured_rows"], upper_of(h))]
        finite = [v for v in values if 0 < v < math.inf] or [1e-6, 1.0]
        low, high = min(finite), max([*finite, *([budget] if budget else [])])
        rows = f"{known[0]['certificate']['rows']:.0%} of rows"
        svg = xy_chart(
            "Certified error of every head against its true error", series,
            Axis(f"true error of {rows}, by rms output row", log=True, low=low, high=high),
            Axis("certified error", log=True, low=low, high=high),
            guides=[Guide("certified = true", diagonal=True), *guides],
        )  # fmt: skip
        return Figure(svg, caption)
    order = sorted(heads, key=upper_of)
    series = _by_kind(order, lambda h, n: (n + 1, upper_of(h)))
    svg = xy_chart(
        "Certified error of every head, smallest first", series,
        Axis("heads, sorted", low=0.5, high=len(order) + 0.5),
        Axis("certified error", low=0.0), guides=guides,
    )  # fmt: skip
    caption = "Certified errors, smallest first; <code>--measure</code> adds the true ones."
    return Figure(svg, caption)


def share_figure(heads: Sequence[Head]) -> Figure:
    """Shares of all heads, smallest first: the area below is the work that is left."""
    order = sorted(heads, key=lambda h: h["share"])
    series = _by_kind(order, lambda h, n: (n + 1, h["share"]))
    points = [Mark(n + 1, h["share"], "") for n, h in enumerate(order)]
    curve = Series("", points, style=6, bare=True)
    svg = xy_chart(
        "Share of scores computed by each head, smallest first", [curve, *series],
        Axis("heads, sorted", low=0.5, high=len(order) + 0.5),
        Axis("share of its scores computed", low=0.0, high=1.0),
    )  # fmt: skip
    mean = sum(h["share"] for h in heads) / max(len(heads), 1)
    return Figure(svg, f"The area under the curve is the work left: {mean:.1%} of dense.")


def _by_kind(
    heads: Sequence[Head], place: Callable[[Head, int], tuple[float, float]]
) -> list[Series]:
    marks: dict[str, list[Mark]] = {}
    for number, head in enumerate(heads):
        at = place(head, number)
        marks.setdefault(head["structure"], []).append(Mark(*at, tip_of(head), key_of(head)))
    return [
        Series(kind, found, joined=False, style=KINDS.get(kind, _OTHER).style)
        for kind, found in marks.items()
    ]


_COLUMNS = (
    Column("layer", text=True),
    Column("batch"),
    Column("head"),
    Column("structure", text=True),
    Column("qk/pv", text=True),
    Column("rank"),
    Column("share of scores", text=True),
    Column("certified upper"),
    Column("guarantee", text=True),
    Column("estimate"),
    Column("true Frobenius"),
    Column("true rows"),
    Column("held", text=True),
    Column("why", text=True),
)
_SILENT = {"batch": "0", "rank": "0", "estimate": "-", "true Frobenius": "-", "true rows": "-"}
"""What columns say that have nothing to say: where all cells do, there is no column."""


def heads_table(heads: Sequence[Head]) -> str:
    """Every head in a row."""
    held = {None: "-", True: "yes", False: '<span class="broken">no</span>'}
    rows = []
    for head in heads:
        certificate, share = head["certificate"], head["share"]
        bar = f'<span class="bar" style="--w:{100 * share:.1f}%"></span>'
        rows.append(
            Row(
                (
                    text_of(head["layer"]),
                    str(head["batch"]),
                    str(head["head"]),
                    text_of(head["structure"]),
                    text_of(f"{head['qk']}/{head['pv']}"),
                    str(head["rank"]),
                    f"{bar}{share:.3f}",
                    short(upper_of(head)),
                    text_of(
                        f"{certificate['guarantee']}, {certificate['rows']:g} of rows"
                        f" at {certificate['confidence']:g}"
                    ),
                    short(certificate["estimate"]),
                    short(head["measured"]),
                    short(head["measured_rows"]),
                    held[held_of(head)],
                    text_of(head["reason"]),
                ),
                key_of(head),
            )
        )
    kept = [
        k
        for k, column in enumerate(_COLUMNS)
        if any(row.cells[k] != _SILENT.get(column.name) for row in rows)
    ]
    rows = [Row([row.cells[k] for k in kept], row.key) for row in rows]
    return table("heads", [_COLUMNS[k] for k in kept], rows)
