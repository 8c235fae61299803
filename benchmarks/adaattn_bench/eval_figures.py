"""What an evaluation shows: figures and tables, in HTML, Markdown, PNG and for a terminal."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

Report = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table with its title and what is to be known about it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    remark: str = ""


def sheets(report: Report) -> Iterator[Sheet]:
    """Every table of a report, in the order of its parts."""
    makers = (_perplexity, _needle, _greedy, _choices, _heads, _ablations)
    for name, make in zip(
        ("perplexity", "needle", "greedy", "choices", "totals", "ablations"),
        makers,
        strict=True,
    ):
        if report.get(name):
            yield make(report)


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['share']:.3f}" if "share" in row else "-"


def _perplexity(report: Report) -> Sheet:
    found, rows = report["perplexity"], []
    names = list(found)
    columns = dict.fromkeys(c for by in found.values() for c in by)
    for column in columns:
        known = [found[name][column] for name in names if column in found[name]]
        base = [found[name].get(TORCH) for name in names if column in found[name]]
        changes = [
            r["perplexity"] / b["perplexity"] - 1
            for r, b in zip(known, base, strict=True)
            if b is not None
        ]
        largest = max(changes, key=abs, default=0.0)
        rows.append(
            (
                column,
                *(
                    f"{found[n][column]['perplexity']:.4f}" if column in found[n] else "-"
                    for n in names
                ),
                "" if column == TORCH else f"{largest:+.2%}",
                f"{known[0].get('share', 1.0):.3f}",
                short(max(r.get("upper_max", 0.0) for r in known)),
            )
        )
    asked = report["settings"]
    remark = (
        f"{asked['windows']} windows of {asked['tokens']:,} tokens of each text, each alone."
    )
    header = ("attention", *names, "largest change", "share kept", "largest upper")
    return Sheet("Perplexity", header, rows, remark)


def _needle(report: Report) -> Sheet:
    rows = []
    lengths = list(dict.fromkeys(r["length"] for x in report["needle"].values() for r in x))
    for column, found in report["needle"].items():
        cells = []
        for length in lengths:
            mine = [r for r in found if r["length"] == length]
            right, tokens = sum(r["right"] for r in mine), sum(r["tokens"] for r in mine)
            nats = sum(r["nats"] for r in mine) / max(len(mine), 1)
            cells.append(f"{right} of {tokens}, {nats:.3f}")
        shares = [r["share"] for r in found if "share" in r]
        cells.append(f"{sum(shares) / len(shares):.3f}" if shares else "-")
        rows.append((column, *cells))
    remark = (
        "A 12-digit code, asked for at the end: tokens of it that are the most likely ones, and"
        f" mean nats a token, over depths {report['settings']['depths']}."
    )
    header = ("attention", *(f"{n:,} tokens" for n in lengths), "share kept")
    return Sheet("Needle", header, rows, remark)


def _greedy(report: Report) -> Sheet:
    rows = [
        (
            column,
            f"{row['agreement']:.0%}",
            "none" if row["first_difference"] is None else f"token {row['first_difference']}",
            _share(row),
        )
        for column, row in report["greedy"].items()
    ]
    asked = report["settings"]
    remark = (
        f"{asked['greedy_tokens']} tokens after {asked['prompt_tokens']:,} of prose; one row at"
        " a time runs dense, so what a budget did to the prompt is what shows."
    )
    header = ("attention", "same tokens", "first difference", "share kept in the prompt")
    return Sheet("Greedy text", header, rows, remark)


def _choices(report: Report) -> Sheet:
    base = report["choices"].get(TORCH, {}).get("answers", [])
    rows = []
    for column, row in report["choices"].items():
        same = sum(a == b for a, b in zip(row["answers"], base, strict=False))
        rows.append((column, f"{row['right']} of {row['asked']}", f"{same}", _share(row)))
    remark = (
        "Which paragraph of Python's language reference goes on, of four, by mean nats a token"
        f" after {report['settings']['context_tokens']:,} tokens; guessing finds a quarter."
    )
    header = ("attention", "right", f"answers as {TORCH}'s", "share kept")
    return Sheet("Multiple choice", header, rows, remark)


def _heads(report: Report) -> Sheet:
    totals, asked = report["totals"], report["settings"]
    rows = [
        ("heads", str(totals["heads"])),
        ("mean share of scores kept", f"{totals['share']:.3f}"),
        ("certificates within the budget", f"{totals['within']:.1%}"),
        ("coverage: true row error at most the certified", f"{totals['coverage']:.1%}"),
        ("tightness: certified over true, median", short(totals["tightness"])),
        ("largest true row error", short(totals["rows"])),
        ("mean relative Frobenius error", short(totals["frobenius"])),
        ("structures", ", ".join(f"{n} {k}" for k, n in totals["structures"].items())),
    ]
    where = "the shipped heads" if asked["heads"] == "demo" else asked["model"]
    remark = f"Budget {asked['budgets'][0]:g}, {where}, {asked['head_tokens']:,} tokens."
    return Sheet("Single heads", ("what", "how much"), rows, remark)


def _ablations(report: Report) -> Sheet:
    rows = []
    for row in report["ablations"]:
        if "refused" in row:
            rows.append((row["part"], *["-"] * 9, f"refused: {row['refused']}"))
            continue
        rows.append(
            (
                row["part"],
                f"{row['speedup']:.2f}",
                f"{row['speedup_whole']:.2f}",
                f"{row['share']:.3f}",
                short(row["rows"]),
                short(row["frobenius"]),
                f"{row['within']:.0%}",
                f"{row['coverage']:.0%}",
                short(row["tightness"]),
                str(row["escalated"]),
                ", ".join(f"{n} {kind}" for kind, n in row["structures"].items()),
            )
        )
    asked = report["settings"]
    remark = (
        f"Budget {asked['budgets'][0]:g}, layers {', '.join(report['ablated_layers'])}; each"
        f" row switches off one part. Speeds are predictions of {asked['target']}'s cost model,"
        " dense over planned: of the plans alone, and with measuring and certifying; plans are"
        " chosen as if these were free. Errors are measured, formats emulated."
    )
    header = (
        "switched off", "speed, plans", "speed, whole", "share kept", "true rows", "Frobenius",
        "within", "coverage", "tightness", "escalated", "structures",
    )  # fmt: skip
    return Sheet("Ablations", header, rows, remark)


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
        row = _perplexity(report).rows[-1]
        tiles.append(Tile(row[-3], f"perplexity, budget {row[0]}"))
    if report.get("totals"):
        totals = report["totals"]
        tiles.append(Tile(f"{totals['share']:.1%}", "of scores kept"))
        tiles.append(Tile(f"{totals['coverage']:.1%}", "of certificates true"))
        tiles.append(Tile(short(totals["tightness"]), "certified over true, median"))
    return tiles


def _what(report: Report) -> str:
    asked = report["settings"]
    runs_model = asked["heads"] == "model" or set(asked["parts"]) - {"heads", "ablations"}
    return str(asked["model"]) if runs_model else "the shipped heads"


def _html(sheet: Sheet) -> str:
    columns = [
        Column(n, text=i in (0, len(sheet.header) - 1)) for i, n in enumerate(sheet.header)
    ]
    rows = [Row([text_of(x) for x in row], str(row[0])) for row in sheet.rows]
    return table(sheet.title.replace(" ", "-").lower(), columns, rows)


def markdown(report: Report, figure: str | None = None) -> str:
    """Return the report as a page of documentation."""
    machine, asked = report["machine"], report["settings"]
    lines = [
        "# adaattn eval", "",
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
    """Write perplexity, certificates against truth, and ablations as a picture."""
    figure_class = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(12, 3.6), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    for number, (name, by) in enumerate(report.get("perplexity", {}).items()):
        within = [(r.get("share", 1.0), r["perplexity"]) for c, r in by.items() if c != TORCH]
        base = by[TORCH]["perplexity"] if TORCH in by else within[0][1]
        within.sort()
        changes = [100 * (p / base - 1) for _, p in within]
        first.plot([s for s, _ in within], changes, "-o", color=COLOURS[number], label=name)
    first.set(xlabel="share of scores kept", ylabel="change of perplexity, %")
    true = [(h["measured_rows"], h["certificate"]["upper"]) for h in report.get("heads", ())]
    true = [(t, u) for t, u in true if t and u]
    if true:
        second.plot(*zip(*true, strict=True), "o", ms=4, alpha=0.6, color=COLOURS[0])
        ends = [min(t for t, _ in true), max(u for _, u in true)]
        second.plot(ends, ends, color="0.4", lw=1)
        second.set(xscale="log", yscale="log")
    second.set(xlabel="true error of 95% of rows", ylabel="certified (below: false)")
    rows = [r for r in report.get("ablations", ()) if "refused" not in r][::-1]
    bars = third.barh([r["part"] for r in rows], [r["speedup"] for r in rows], color=COLOURS[0])
    labels = [f"{r['speedup']:.2f}x, {r['share']:.0%}, {r['rows']:.3f}" for r in rows]
    third.bar_label(bars, labels, fontsize=7, padding=3)
    third.set(xlabel="predicted speed without it; share kept; error", xmargin=0.35)
    for axis in (first, second, third):
        axis.spines[["top", "right"]].set_visible(False)
    if first.get_legend_handles_labels()[0]:
        first.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=140)
    atomic_write(path, lambda stream: write_all(stream, buffer.getvalue()))
