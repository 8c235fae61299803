"""Tables for the terminal."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from adaattn_core.errors import printable
from adaattn_core.report.summary import HeadRow, Totals

_LEAST_WIDTH = 132
"""Columns assumed at least: rather lines that wrap than numbers that are cut off."""


_OPTIONAL = ("layer", "batch")
"""Columns left out where every row would say the same."""

_HELD = {None: "-", True: "yes", False: "NO"}


class PlainConsole(Console):
    """A console that prints text of files and plans as text: nothing in it is a command."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape every control character but the line break."""
        lines = (printable(line) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options)


def console() -> Console:
    """Return a console for results (standard output)."""
    width = max(_LEAST_WIDTH, shutil.get_terminal_size().columns)
    # No markup: a file name may hold brackets.
    return PlainConsole(highlight=False, markup=False, emoji=False, width=width)


def progress() -> Progress:
    """Return a progress display on standard error; silent where that is not a terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


def print_json(body: Any) -> None:
    """Print strict JSON; a NaN or infinity that slipped through is an error, not output."""
    sys.stdout.write(json.dumps(body, indent=1, allow_nan=False, default=str) + "\n")


def number(value: float | None, digits: int = 4) -> str:
    """Format for a table: a dash where there is no number."""
    if value is None or math.isnan(value):
        return "-"
    return "inf" if math.isinf(value) else f"{value:.{digits}f}"


def head_table(rows: Iterable[HeadRow], title: str) -> Table:
    """Plan, certificate and true error of every head; columns that say nothing are left out."""
    rows = list(rows)
    columns: list[tuple[str, JustifyMethod, list[str]]] = [
        ("layer", "left", [row.layer for row in rows]),
        ("batch", "right", [str(row.index[0]) for row in rows]),
        ("head", "right", [str(row.index[1]) for row in rows]),
        ("structure", "left", [row.plan.structure.kind for row in rows]),
        ("qk/pv", "left", [f"{row.plan.qk}/{row.plan.pv}" for row in rows]),
        ("rank", "right", [str(row.rank) for row in rows]),
        ("share", "right", [number(row.share, 3) for row in rows]),
        ("upper", "right", [number(row.certificate.upper) for row in rows]),
        ("guarantee", "left", [_guarantee(row) for row in rows]),
        ("estimate", "right", [number(row.certificate.estimate) for row in rows]),
        ("true", "right", [number(row.true_frobenius) for row in rows]),
        ("true rows", "right", [number(row.true_rows) for row in rows]),
        ("held", "left", [_HELD[row.covered] for row in rows]),
        ("why", "left", [row.plan.reason for row in rows]),
    ]
    silent = {name for name, _, cells in columns if len(set(cells)) < 2 and name in _OPTIONAL}
    if not any(row.true for row in rows):
        silent |= {"true", "true rows", "held"}
    shown = [column for column in columns if column[0] not in silent]
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for name, justify, cells in shown:
        # Numbers are never cut; the reason takes what room is left.
        width = None if name == "why" else max(len(cell) for cell in (name, *cells))
        table.add_column(
            name, justify=justify, no_wrap=True, overflow="ellipsis", min_width=width
        )
    for row_cells in zip(*(cells for _, _, cells in shown), strict=True):
        table.add_row(*row_cells)
    return table


def _guarantee(row: HeadRow) -> str:
    certificate = row.certificate
    return f"{certificate.guarantee} {certificate.rows:.3g}/{certificate.confidence:.3g}"


def total_lines(totals: Totals) -> list[str]:
    """Sentences that sum a run up."""
    lines = [f"{totals.share:.1%} of the visible scores computed, {totals.seconds:.2f} s"]
    if totals.dense_seconds is not None:
        ratio = totals.dense_seconds / totals.seconds if totals.seconds else math.inf
        lines[0] += f"; exact on the same backend {totals.dense_seconds:.2f} s ({ratio:.2f}x)"
    if totals.coverage is not None:
        lines.append(
            f"certificate at least the true row error in {totals.coverage:.1%} of the heads;"
            f" worst true relative Frobenius error {number(totals.worst_measured)}"
        )
    return lines
