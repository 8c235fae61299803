"""``adaattn demo``: the whole idea on real heads of a language model, in seconds."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from adaattn_core.api import attention
from adaattn_core.budget import ErrorBudget
from adaattn_core.cli.compute import Outcome, compute
from adaattn_core.cli.inputs import Inputs, read_inputs
from adaattn_core.cli.options import parse_budget
from adaattn_core.errors import ArgumentError
from adaattn_core.files import atomic_write_text, check_writable
from adaattn_core.mask import Mask
from adaattn_core.report.figure import can_draw, check_figure, draw_choices
from adaattn_core.report.predict import Prediction, joined, prediction_lines
from adaattn_core.report.run_page import render_report
from adaattn_core.report.summary import HeadRow, Totals, totals
from adaattn_core.report.tables import console, head_table, print_json, progress, total_lines

DEFAULT_FIGURE = Path("adaattn-demo.png")
TITLE = "SmolLM2-135M-Instruct, 8,192 tokens of prose, causal, heads of two layers"
START_ROWS = 256
PREDICTED_ON = "sm90"
"""Machine whose time is predicted beside what is measured here."""


def demo(
    budget: Annotated[
        str, typer.Option(help="tolerated row error relative to the rms output row, or 'exact'")
    ] = "0.1",
    backend: Annotated[str, typer.Option(help="backend by name")] = "auto",
    figure: Annotated[
        Path | None,
        typer.Option(help=f"write the map of choices there [default: {DEFAULT_FIGURE}]"),
    ] = None,
    no_figure: Annotated[bool, typer.Option("--no-figure", help="write no figure")] = False,
    report: Annotated[
        Path | None, typer.Option(help="write a self-contained HTML page")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON instead of tables")
    ] = False,
) -> None:
    """Show plans, certificates and true errors on shipped real data."""
    error_budget = parse_budget(budget)
    drawn = _figure_path(figure, no_figure=no_figure)
    if report is not None:
        check_writable(report)
    outcomes = _run_layers(budget=error_budget, backend=backend)
    rows = [row for outcome in outcomes.values() for row in outcome.rows]
    seconds = sum(outcome.totals.seconds for outcome in outcomes.values())
    dense_seconds = sum(outcome.totals.dense_seconds or 0.0 for outcome in outcomes.values())
    sums = totals(rows, seconds, dense_seconds)
    prediction = joined(o.prediction for o in outcomes.values() if o.prediction is not None)
    if drawn is not None:
        draw_choices(drawn, rows, "Structure and formats per head; share of scores kept")
    body = {
        "heads": [row.to_json() for row in rows],
        "totals": sums.to_json(),
        "prediction": prediction.to_json(),
        "settings": {"budget": "exact" if error_budget is None else str(error_budget)},
        "provenance": dict(next(iter(outcomes.values())).result.provenance),
        "figure": None if drawn is None else str(drawn),
    }
    if report is not None:
        rel = None if error_budget is None else error_budget.rel
        atomic_write_text(report, render_report(TITLE, body, budget=rel))
    if as_json:
        print_json(body)
        return
    _show(rows, sums, prediction, drawn, no_figure=no_figure)


def _figure_path(figure: Path | None, *, no_figure: bool) -> Path | None:
    """Where the figure goes; without matplotlib the default one is left out, and said so."""
    if no_figure and figure is not None:
        raise ArgumentError(
            got=f"--no-figure together with --figure {figure}",
            needed="one of the two",
            do="drop one of them",
        )
    if no_figure or (figure is None and not can_draw()):
        return None
    path = figure or DEFAULT_FIGURE
    check_figure(path)
    return path


def demo_layers() -> list[str]:
    """Names of the shipped files, in the order of their layers."""
    folder = files("adaattn_core").joinpath("demo_data")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".npz"))


def _run_layers(**choices: Any) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    folder = files("adaattn_core").joinpath("demo_data")
    with progress() as bar:
        names = demo_layers()
        task = bar.add_task("layers", total=len(names))
        for name in names:
            with as_file(folder.joinpath(name)) as path:
                inputs = read_inputs(path)
            if not outcomes:
                _start(inputs, **choices)
            layer = name.removesuffix(".npz").removeprefix("smollm2_layer").lstrip("0") or "0"
            outcomes[layer] = compute(
                inputs,
                mask=Mask.causal(),
                measure=True,
                layer=layer,
                predicted_on=PREDICTED_ON,
                **choices,
            )
            bar.advance(task)
    return outcomes


def _start(inputs: Inputs, *, budget: ErrorBudget | None, backend: str) -> None:
    """Run a few rows, so that no clock counts what a library does once in a process."""
    first = (x[:, :, :START_ROWS] for x in (inputs.query, inputs.key, inputs.value))
    attention(*first, mask=Mask.causal(), budget=budget, backend=backend)


def _show(
    rows: list[HeadRow],
    sums: Totals,
    prediction: Prediction,
    drawn: Path | None,
    *,
    no_figure: bool,
) -> None:
    screen = console()
    screen.print(head_table(rows, TITLE))
    screen.print()
    for line in (*total_lines(sums), *prediction_lines(prediction.to_json())):
        screen.print(line)
    if drawn is not None:
        screen.print(f"map of choices: {drawn}")
    elif not no_figure:
        screen.print("no figure: matplotlib is not installed (pip install matplotlib)")
