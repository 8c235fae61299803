"""Tables for the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from adaattn_core.cli.summary import HeadRow, Totals

_PIPE_WIDTH = 120
"""Columns where the output is not a terminal (a pipe, a file, a test)."""


def console() -> Console:
    """Return a console for results (standard output)."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


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
    """Plan, certificate and true error of every head."""
    rows = list(rows)
    layered, measured = any(row.layer for row in rows), any(row.true for row in rows)
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    if layered:
        table.add_column("layer")
    for name in ("batch", "head"):
        table.add_column(name, justify="right")
    for name in ("structure", "qk", "pv"):
        table.add_column(name)
    for name in ("rank", "share", "upper"):
        table.add_column(name, justify="right")
    table.add_column("guarantee")
    table.add_column("estimate", justify="right")
    if measured:
        table.add_column("true error", justify="right")
        table.add_column("true rows", justify="right")
        table.add_column("held")
    table.add_column("why", overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, layered=layered, measured=measured))
    return table


def _cells(row: HeadRow, *, layered: bool, measured: bool) -> list[str]:
    certificate = row.certificate
    cells = [row.layer] if layered else []
    cells += [str(row.index[0]), str(row.index[1])]
    cells += [row.plan.structure.kind, row.plan.qk, row.plan.pv]
    cells += [str(row.rank), number(row.share, 3), number(certificate.upper)]
    cells += [f"{certificate.guarantee} {certificate.rows:g}/{certificate.confidence:g}"]
    cells += [number(certificate.estimate)]
    if measured:
        cells += [number(row.true_frobenius), number(row.true_rows)]
        cells += ["-" if row.covered is None else "yes" if row.covered else "NO"]
    return [*cells, row.plan.reason]


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
