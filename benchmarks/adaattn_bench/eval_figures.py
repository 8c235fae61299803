"""What an evaluation shows: figures and tables, in HTML, Markdown, PNG and for a terminal."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

from adaattn_bench.again import command_of
from adaattn_bench.eval_tables import Report, Sheet, perplexity, sheets
from adaattn_bench.models import TORCH
from adaattn_core.files import atomic_write, write_all
from adaattn_core.report.charts import (
    Bar,
    Cell,
    Face,
    Guide,
    Series,
    bar_chart,
    grid_chart,
    xy_chart,
)
from adaattn_core.report.heads import (
    certificate_figure,
    heads_table,
    map_figure,
    share_figure,
)
from adaattn_core.report.page import (
    Column,
    Figure,
    Page,
    Row,
    Section,
    Tile,
    facts_table,
    table,
)
from adaattn_core.report.svg import COLOURS, Axis, Mark, ramp, short, text_of


# --- figures ----------------------------------------------------------------------------------
def _perplexity_figure(report: Report) -> Figure:
    series = []
    for number, (name, by) in enumerate(report["perplexity"].items()):
        if TORCH not in by:
            continue
        marks = []
        for column, row in by.items():
            if column == TORCH:
                continue
            change = 100 * (row["perplexity"] / by[TORCH]["perplexity"] - 1)
            share = row.get("share", 1.0)
            tip = f"{name}, {column}\nperplexity {row['perplexity']:.4f} ({change:+.3f}%)"
            marks.append(Mark(share, change, f"{tip}\n{share:.1%} of scores kept", column))
        series.append(Series(name, sorted(marks, key=lambda m: m.x or 0), style=number))
    svg = xy_chart(
        "Change of perplexity over the share of scores kept", series,
        Axis("share of scores kept", low=0.0, high=1.02), Axis("change of perplexity, %"),
        guides=[Guide("as torch", 0.0)],
    )  # fmt: skip
    return Figure(svg, "What leaving scores out does to perplexity; right is exact.")


def _needle_figure(report: Report) -> list[Figure]:
    figures = []
    for column, found in report["needle"].items():
        lengths = list(dict.fromkeys(r["length"] for r in found))
        depths = list(dict.fromkeys(r["depth"] for r in found))
        cells = [
            Cell(
                depths.index(r["depth"]),
                lengths.index(r["length"]),
                [
                    Face(ramp(r["right"] / r["tokens"]), f"{r['right']}/{r['tokens']}"),
                    Face(ramp(min(r["nats"], 5.0) / 5.0), f"{r['nats']:.2f}"),
                ],
                f"{column}: depth {r['depth']:g} of {r['length']:,} tokens\n"
                f"{r['right']} of {r['tokens']} tokens found, {r['nats']:.3f} nats a token",
                f"{r['length']}/{r['depth']}",
            )
            for r in found
        ]
        svg = grid_chart(
            f"Needle found by depth and length, {column}", cells,
            [f"{d:g}" for d in depths], [f"{n:,}" for n in lengths],
            row_label="depth", column_label="tokens",
        )  # fmt: skip
        figures.append(Figure(svg, f"<b>{text_of(column)}</b>", ("tokens found", "nats")))
    return figures


def _ablation_figures(report: Report) -> list[Figure]:
    rows = [row for row in report["ablations"] if "refused" not in row]
    speed, share, error = [], [], []
    for row in rows:
        tip = f"{row['part']}\n{row['left'] or 'the whole policy'}\n"
        tip += f"predicted {row['speedup']:.2f}x, {row['share']:.1%} kept\n"
        tip += f"largest true row error {short(row['rows'])}\n"
        tip += ", ".join(f"{n} {pair}" for pair, n in row["formats"].items())
        style = 6 if row is rows[0] else 0
        name = row["part"]
        speed.append(Bar(name, row["speedup"], tip, style, name))
        share.append(Bar(name, row["share"], tip, style, name))
        error.append(Bar(name, row["rows"], tip, style, name))
    what = f"predicted on {report['settings']['target']}: dense over planned"
    budget = report["settings"]["budgets"][0]
    return [
        Figure(bar_chart("Predicted speed without each part", speed, what, base=1.0),
               "Shorter than the first: the part is worth that much speed."),
        Figure(bar_chart("Share kept without each part", share, "share of scores kept"),
               "Longer than the first: the part saves that many scores."),
        Figure(bar_chart("Error without each part", error, "largest true error of 95% of rows"),
               f"The budget is {budget:g}; what a part costs or saves in error."),
    ]  # fmt: skip


def page(report: Report) -> str:
    """Return the HTML page."""
    tables = {sheet.title: sheet for sheet in sheets(report)}
    sections = []
    heads = report.get("heads")
    for title, sheet in tables.items():
        figures: list[Figure] = []
        if title == "Perplexity":
            figures = [_perplexity_figure(report)]
        elif title == "Needle":
            figures = _needle_figure(report)
        elif title == "Single heads" and heads:
            rel = report["settings"]["budgets"][0]
            figures = [map_figure(heads), certificate_figure(heads, rel), share_figure(heads)]
        elif title == "Ablations":
            figures = _ablation_figures(report)
        sections.append(Section(title, text_of(sheet.remark), figures, _html(sheet)))
    if heads:
        sections.append(Section("Every head", body=heads_table(heads)))
    facts = {**report["machine"], **report["settings"]}
    sections.append(Section("How it was measured", body=facts_table(facts)))
    lines = [f"Not evaluated: {text}" for text in report["cut_short"]]
    title = f"adaattn eval: {_what(report)}"
    return Page(title, lines, _tiles(report), sections, report).render()


def _tiles(report: Report) -> list[Tile]:
    tiles = []
    if report.get("perplexity"):
        row = perplexity(report).rows[-1]
        tiles.append(Tile(row[-3], f"perplexity, budget {row[0]}"))
    if report.get("totals"):
        totals = report["totals"]
        tiles.append(Tile(f"{totals['share']:.1%}", "of scores kept"))
        tiles.append(Tile(f"{totals['coverage']:.1%}", "of certificates true"))
        tiles.append(Tile(short(totals["tightness"]), "certified over true, median"))
    return tiles


def _title(report: Report) -> str:
    only_heads = set(report["settings"]["parts"]) <= {"heads", "ablations"}
    return "What each adaptive part is worth" if only_heads else "A whole model within budgets"


def _what(report: Report) -> str:
    asked = report["settings"]
    runs_model = asked["heads"] == "model" or set(asked["parts"]) - {"heads", "ablations"}
    return str(asked["model"]) if runs_model else "the shipped heads"


_WORDS = ("structures", "how much", "first difference")
"""Columns of words, beside the first one of every table."""


def _html(sheet: Sheet) -> str:
    columns = [Column(n, text=not i or n in _WORDS) for i, n in enumerate(sheet.header)]
    rows = [Row([text_of(x) for x in row], str(row[0])) for row in sheet.rows]
    return table(sheet.title.replace(" ", "-").lower(), columns, rows)


def markdown(report: Report, figure: str | None = None) -> str:
    """Return the report as a page of documentation."""
    machine, asked = report["machine"], report["settings"]
    lines = [
        f"# {_title(report)}", "", "```console", f"$ {command_of(report)}", "```", "",
        f"{_what(report)}, {machine['device']}, torch {machine['torch']}, {report['date']};"
        f" plans {'pay' if asked['hurried'] else 'do not pay'} for measuring and certifying.",
        "",
    ]  # fmt: skip
    lines += [f"![Perplexity and ablations]({figure})", ""] if figure else []
    for sheet in sheets(report):
        lines += [f"## {sheet.title}", "", sheet.remark, ""]
        lines += [f"| {' | '.join(sheet.header)} |", "|" + "---|" * len(sheet.header)]
        lines += [f"| {' | '.join(row)} |" for row in sheet.rows] + [""]
    lines += [f"- not evaluated: {text}" for text in report["cut_short"]]
    return "\n".join(lines).rstrip() + "\n"


def plot(report: Report, path: Path) -> None:
    """Write perplexity, certificates against truth, and ablations, as far as they are there."""
    panels = [
        (name, draw)
        for name, draw in (
            ("perplexity", _plot_perplexity),
            ("heads", _plot_certificates),
            ("ablations", _plot_ablations),
        )
        if report.get(name)
    ]
    figure_class = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(max(4.2 * len(panels), 4.2), 3.6), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (_, draw) in zip(axes, panels, strict=False):
        draw(axis, report)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=140)
    atomic_write(path, lambda stream: write_all(stream, buffer.getvalue()))


def _plot_perplexity(axis: Any, report: Report) -> None:
    for number, (name, by) in enumerate(report["perplexity"].items()):
        within = [(r.get("share", 1.0), r["perplexity"]) for c, r in by.items() if c != TORCH]
        base = by[TORCH]["perplexity"] if TORCH in by else within[0][1]
        within.sort()
        changes = [100 * (p / base - 1) for _, p in within]
        colour = COLOURS[number % len(COLOURS)]
        axis.plot([s for s, _ in within], changes, "-o", color=colour, label=name)
    axis.set(xlabel="share of scores kept", ylabel="change of perplexity, %")
    axis.legend(frameon=False, fontsize=8)


def _plot_certificates(axis: Any, report: Report) -> None:
    true = [(h["measured_rows"], h["certificate"]["upper"]) for h in report["heads"]]
    true = [(t, u) for t, u in true if t and u]
    if true:
        axis.plot(*zip(*true, strict=True), "o", ms=4, alpha=0.6, color=COLOURS[0])
        ends = [min(t for t, _ in true), max(u for _, u in true)]
        axis.plot(ends, ends, color="0.4", lw=1)
    axis.set(xlabel="true error of 95% of rows", ylabel="certified (below the line: false)")


def _plot_ablations(axis: Any, report: Report) -> None:
    rows = [r for r in report["ablations"] if "refused" not in r][::-1]
    colours = [COLOURS[0]] * (len(rows) - 1) + [COLOURS[6]]
    bars = axis.barh([r["part"] for r in rows], [r["speedup"] for r in rows], color=colours)
    labels = [f"{r['share']:.0%} kept, error {r['rows']:.3f}" for r in rows]
    axis.bar_label(bars, labels, fontsize=7, padding=3)
    axis.set(xlabel=f"speed without it, predicted on {report['settings']['target']}")
    axis.margins(x=0.6)
