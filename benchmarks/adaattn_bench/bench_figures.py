"""What a bench report shows: curves, speed against error, tables; in HTML, Markdown and PNG."""

from __future__ import annotations

import importlib
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaattn_bench.again import command_of
from adaattn_bench.contenders import EXACT
from adaattn_core.files import atomic_write, write_all
from adaattn_core.report.charts import Guide, Series, xy_chart
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
from adaattn_core.report.svg import COLOURS, Axis, Mark, short, text_of

Cell = Mapping[str, Any]

_COLUMNS: tuple[tuple[str, Callable[[Cell], str]], ...] = (
    ("ms", lambda e: _ms(e)),
    ("spread", lambda e: f"{e['ms']['spread']:.0%}"),
    ("cold, ms", lambda e: short(e["cold_ms"])),
    ("tokens/s", lambda e: short(e["tokens_per_second"])),
    ("TFLOP/s", lambda e: short(e["tflops"])),
    ("of matmul", lambda e: _percent(e["matmul_share"])),
    ("GB/s", lambda e: short(e["bandwidth"] / 1e9)),
    ("of copy", lambda e: _percent(e["copy_share"])),
    ("peak, MB", lambda e: _megabytes(e["peak_bytes"])),
    ("GPU busy", lambda e: "-" if e["busy_percent"] is None else f"{e['busy_percent']:.0f}%"),
    ("share kept", lambda e: _mean_of(e, "share")),
    ("certified", lambda e: _most_of(e, "upper")),
    ("true rows", lambda e: short(_largest(e["errors"]["rows"]))),
    ("Frobenius", lambda e: short(_largest(e["errors"]["frobenius"]))),
)
ON_PAGES_ONLY = ("TFLOP/s", "GB/s", "Frobenius")
"""Columns for which a terminal has no room."""
NOTES = (
    "Milliseconds are medians of warm calls, the contenders in turn and in random order; spread"
    " is the distance of the quartiles over the median. Cold is a problem's first call.",
    "TFLOP/s count the scores that were computed; GB/s count query, key and value read and the"
    " output written once, the least that any computation moves. Both are held against what"
    " this machine reached in the same process in a large product and a large copy.",
    "True rows: 95% of a head's rows err by at most this, relative to the root-mean-square row;"
    " largest of all heads, against float64 on rows drawn apart from any certificate's.",
)


def _ms(entry: Cell) -> str:
    return short(entry["ms"]["median"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f}"


def _largest(values: Sequence[float | None]) -> float:
    return max((float("inf") if x is None else x for x in values), default=0.0)


def _mean_of(entry: Cell, name: str) -> str:
    return f"{statistics.fmean(entry['facts'][name]):.3f}" if "facts" in entry else "-"


def _most_of(entry: Cell, name: str) -> str:
    return short(_largest(entry["facts"][name])) if "facts" in entry else "-"


def timed(cell: Cell) -> dict[str, Any]:
    """Contenders that have warm times."""
    return {name: e for name, e in cell["contenders"].items() if "ms" in e}


def title_of(cell: Cell) -> str:
    """Say which problem it is."""
    shape = cell["shape"]
    rows = "" if shape["len_q"] == shape["len_kv"] else f"{shape['len_q']:,} rows of "
    return (
        f"{rows}{shape['len_kv']:,} tokens, {shape['batch']} x {shape['heads_q']} heads"
        f" ({shape['heads_kv']} of keys), dim {shape['dim']}"
    )


def table_rows(cell: Cell) -> list[tuple[str, ...]]:
    """Name and figures of everybody, the fastest first."""
    entries = sorted(timed(cell).items(), key=lambda item: item[1]["ms"]["median"])
    return [(name, *(show(entry) for _, show in _COLUMNS)) for name, entry in entries]


def header() -> tuple[str, ...]:
    """Names of the columns of `table_rows`."""
    return ("contender", *(name for name, _ in _COLUMNS))


# --- curves -----------------------------------------------------------------------------------
def names_in(cells: Sequence[Cell]) -> list[str]:
    """All contenders with times, in the order in which they were asked for."""
    return list(dict.fromkeys(name for cell in cells for name in timed(cell)))


def length_series(cells: Sequence[Cell], value: str) -> list[Series]:
    """One curve a contender over the lengths."""
    found = []
    for number, name in enumerate(names_in(cells)):
        marks = [
            Mark(
                c["shape"]["len_kv"],
                timed(c)[name][value],
                f"{name}\n{title_of(c)}\n{_ms(timed(c)[name])} ms,"
                f" {short(timed(c)[name]['tokens_per_second'])} tokens/s",
                name,
            )
            for c in cells
            if name in timed(c)
        ]
        found.append(Series(name, marks, style=number))
    return found


def share_series(cells: Sequence[Cell]) -> list[Series]:
    """Mean share of scores kept over the lengths, one curve a budget."""
    found = []
    for number, name in enumerate(names_in(cells)):
        marks = []
        for cell in cells:
            facts = timed(cell).get(name, {}).get("facts")
            if facts is None:
                continue
            share = statistics.fmean(facts["share"])
            kinds = ", ".join(f"{n} {kind}" for kind, n in facts["structures"].items())
            tip = f"{name}\n{title_of(cell)}\n{share:.1%} kept: {kinds}"
            marks.append(Mark(cell["shape"]["len_kv"], share, tip, name))
        if marks:
            found.append(Series(name, marks, style=number))
    return found


def error_series(cell: Cell) -> list[Series]:
    """Speed against error: this library's budgets joined, everybody else a point."""
    entries, least = timed(cell), 1e-8
    base = EXACT if EXACT in entries else next(iter(entries))
    budgets, others = [], []
    for number, (name, entry) in enumerate(entries.items()):
        error = max(_largest(entry["errors"]["rows"]), least)
        speed = entries[base]["ms"]["median"] / entry["ms"]["median"]
        tip = f"{name}\n{_ms(entry)} ms, {speed:.2f} times as fast as {base}\n"
        tip += f"true error of 95% of rows {short(error)}"
        mark = Mark(error, speed, tip, name)
        if "facts" in entry:
            budgets.append(mark)
        else:
            others.append(Series(name, [mark], joined=False, style=number))
    budgets.sort(key=lambda m: m.x or 0.0)
    return [Series("within budgets", budgets, style=0), *others] if budgets else others


def figures(report: Mapping[str, Any]) -> list[tuple[str, list[Figure]]]:
    """Title and figures of every head dimension."""
    found = []
    for dim in sorted({c["shape"]["dim"] for c in report["cells"]}):
        cells = [c for c in report["cells"] if c["shape"]["dim"] == dim and timed(c)]
        if not cells:
            continue
        lengths = tuple(sorted({c["shape"]["len_kv"] for c in cells}))
        names = tuple((float(n), _tokens(n)) for n in lengths)
        x = Axis("tokens", log=True, names=names)
        last = cells[-1]
        drawn = [
            Figure(
                xy_chart(
                    "Speed against error", error_series(last),
                    Axis("true error of 95% of rows, largest head", log=True),
                    Axis("times as fast as exact", low=0.0), guides=[Guide("", 1.0)],
                ),
                f"Up is faster, left is more accurate: {title_of(last)}.",
            ),
            Figure(
                xy_chart(
                    "Milliseconds over tokens", length_series_ms(cells), x,
                    Axis("ms a call", log=True),
                ),
                "Median of warm calls.",
            ),
            Figure(
                xy_chart(
                    "Tokens a second over tokens",
                    length_series(cells, "tokens_per_second"), x,
                    Axis("tokens/s", log=True),
                ),
                "Query rows a second, all heads of the problem.",
            ),
        ]  # fmt: skip
        shares = share_series(cells)
        if shares:
            chart = xy_chart(
                "Share of scores kept over tokens", shares, x,
                Axis("mean share of scores kept", low=0.0, high=1.05),
            )  # fmt: skip
            drawn.append(Figure(chart, "What budgets leave to compute."))
        found.append((f"Head dimension {dim}", drawn))
    return found


def length_series_ms(cells: Sequence[Cell]) -> list[Series]:
    """Milliseconds over lengths."""
    return [
        Series(
            one.name,
            [
                Mark(m.x, timed(c)[one.name]["ms"]["median"], m.tip, m.key)
                for c in cells
                for m in one.marks
                if m.x == c["shape"]["len_kv"] and one.name in timed(c)
            ],
            style=one.style,
        )
        for one in length_series(cells, "tokens_per_second")
    ]


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


# --- whole reports ----------------------------------------------------------------------------
def page(report: Mapping[str, Any]) -> str:
    """Return the HTML page."""
    sections = [Section(title, figures=drawn) for title, drawn in figures(report)]
    for number, cell in enumerate(report["cells"]):
        columns = [Column(name, text=not i) for i, name in enumerate(header())]
        rows = [Row([text_of(x) for x in row], row[0]) for row in table_rows(cell)]
        absent = facts_table(cell["absent"]) if cell["absent"] else ""
        absent = f"<p>Not here:</p>{absent}" if absent else ""
        lead = f"Keys and values take {cell['cache_bytes'] / 1e6:,.2f} MB."
        body = table(f"cell{number}", columns, rows) + absent
        sections.append(Section(title_of(cell), lead, body=body))
    notes = "".join(f"<p>{text_of(note)}</p>" for note in NOTES)
    sections.append(Section("How it was measured", body=notes + facts_table(_facts(report))))
    lines = [f"Not measured: {text}" for text in report["cut_short"]]
    return Page("adaattn bench", lines, _tiles(report), sections, report).render()


def _tiles(report: Mapping[str, Any]) -> list[Tile]:
    tiles = [Tile(str(report["machine"]["device"]), str(report["date"]))]
    if report["rates"]:
        tiles.append(Tile(f"{report['rates']['matmul'] / 1e12:.3g} TFLOP/s", "a large product"))
        tiles.append(Tile(f"{report['rates']['copy'] / 1e9:.3g} GB/s", "a large copy"))
    return tiles


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    return {**report["machine"], **report["settings"]}


def markdown(report: Mapping[str, Any], figure: str | None = None) -> str:
    """Return the report as a page of documentation."""
    machine, settings = report["machine"], report["settings"]
    versions = ", ".join(
        f"{n} {machine[n]}"
        for n in ("driver", "cuda", "cudnn", "torch", "numpy")
        if machine.get(n)
    )
    lines = [
        f"# `adaattn bench` on {machine['device']}",
        "",
        "```console",
        f"$ {command_of(report)}",
        "```",
        "",
        f"{machine['device']}, {versions}, {report['date']}; {settings['dtype']}, causal,"
        f" heads: {Path(settings['source']).name}, {settings['rounds']} rounds of"
        f" {settings['burst_ms']:g} ms.",
        "",
    ]
    if report["rates"]:
        lines += [
            f"This machine, in the same process: {report['rates']['matmul'] / 1e12:.4g} TFLOP/s"
            f" in a large product, {report['rates']['copy'] / 1e9:.4g} GB/s in a large copy.",
            "",
        ]
    lines += [line for note in NOTES for line in (f"- {note}",)] + [""]
    if figure is not None:
        lines += [f"![Time and speed against error]({figure})", ""]
    for cell in report["cells"]:
        lines += [f"## {title_of(cell)}", ""]
        lines += [f"Keys and values: {cell['cache_bytes'] / 1e6:,.2f} MB.", ""]
        rows = table_rows(cell)
        lines += [f"| {' | '.join(header())} |", "|" + "---|" * len(header())]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
        lines += [f"- not here: {name}: {why}" for name, why in cell["absent"].items()]
        lines.append("")
    lines += [f"- not measured: {text}" for text in report["cut_short"]]
    return "\n".join(lines).rstrip() + "\n"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write time over length, shares and speed against error as a picture."""
    cells = [c for c in report["cells"] if timed(c)]
    figure_class = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    dims = sorted({c["shape"]["dim"] for c in cells})
    mine = [c for c in cells if c["shape"]["dim"] == dims[0]] if dims else []
    lines = ("-", "--", ":", "-.")
    for axis, series in ((axes[0], length_series_ms(mine)), (axes[1], share_series(mine))):
        for one in series:
            number = one.style or 0
            axis.plot(
                [m.x for m in one.marks], [m.y for m in one.marks], marker="o", ms=4,
                color=COLOURS[number % len(COLOURS)], ls=lines[number // len(COLOURS) % 4],
                label=one.name,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
    axes[0].set(ylabel="ms a call", yscale="log")
    axes[1].set(ylabel="mean share of scores kept", ylim=(0, 1.05))
    for one in error_series(mine[-1]) if mine else ():
        style = "-o" if one.joined else "o"
        number = one.style or 0
        xs, ys = [m.x for m in one.marks], [m.y for m in one.marks]
        axes[2].plot(xs, ys, style, color=COLOURS[number % len(COLOURS)], label=one.name)
    axes[2].set(xscale="log", xlabel="true error of 95% of rows", ylabel="times exact's speed")
    axes[2].set_ylim(bottom=0)
    axes[1].set_xlim(axes[0].get_xlim())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=140)
    atomic_write(path, lambda stream: write_all(stream, buffer.getvalue()))
