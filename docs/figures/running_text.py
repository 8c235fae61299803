"""Figures of benchmarks in running text: written into the pages, not copied by hand.

    python docs/figures/draw.py tables

A page holds a block between two comments; what stands there is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablations
from speed_error import BASE, REPORT, STYLES, Point, points

ROOT = REPORT.parents[2]
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/how-to/gpu.md",
    "docs/explanation/comparison.md",
    "docs/explanation/report.md",
    "docs/benchmarks/ablations.md",
)
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
OURS = "dense"

Report = dict[str, Any]


def lengths(report: Report) -> list[int]:
    """Lengths measured, rising."""
    return sorted({cell["len"] for cell in report["cells"]})


def name_of(rel: float) -> str:
    """A budget as a contender."""
    return f"budget {rel:g}"


def _joined(numbers: list[str]) -> str:
    return ", ".join(numbers[:-1]) + " and " + numbers[-1]


def coverage(report: Report, rel: float) -> tuple[float, int]:
    """Share of certificates that the truth does not exceed, and how many there are."""
    entries = [cell["contenders"][name_of(rel)] for cell in report["cells"]]
    pairs = [
        (true, upper)
        for entry in entries
        for true, upper in zip(entry["errors"]["rows"], entry["facts"]["upper"], strict=True)
    ]
    return sum(true <= upper for true, upper in pairs) / len(pairs), len(pairs)


def slowest(report: Report) -> float:
    """Largest time of a budget over that of our dense kernel, over the hard inputs."""
    return max(
        case["contenders"][name_of(rel)]["ms"]["median"]
        / case["contenders"][OURS]["ms"]["median"]
        for case in report["hard"]
        for rel in report["budgets"]
        if name_of(rel) in case["contenders"]
    )


def sentence(report: Report) -> str:
    """What was measured, in words and numbers."""
    sizes = lengths(report)
    found = {length: points(report, length) for length in sizes}
    heads = max(cell["heads"] for cell in report["cells"])
    names = _joined([f"{length // 1024}k" for length in sizes])
    lines = [f"Three layers ({heads} heads) a call, at {names} tokens:"]
    for rel in report["budgets"]:
        speeds = [found[length][name_of(rel)].speed for length in sizes]
        own = [s / found[length][OURS].speed for s, length in zip(speeds, sizes, strict=True)]
        share, count = coverage(report, rel)
        ours, theirs = (_joined([f"{s:.2f}" for s in x]) for x in (own, speeds))
        lines.append(
            f"- budget {rel:g}: {theirs} times as fast as cuDNN, "
            f"{ours} times as fast as our own exact\n  kernel; "
            f"{100 * share:.1f}% of {count} certificates covered the true error."
        )
    lines.append(
        f"- inputs that leave nothing out (16k tokens and more): up to {slowest(report):.2f} "
        "times the time of our own exact kernel."
    )
    return "\n".join([lines[0], "", *lines[1:]])


def by_length(report: Report) -> str:
    """Speeds against cuDNN as a table."""
    budgets = report["budgets"]
    head = "| tokens | exact | " + " | ".join(name_of(rel) for rel in budgets) + " |"
    rows = [head, "|---|" + "---|" * (len(budgets) + 1)]
    for length in lengths(report):
        found = points(report, length)
        speeds = [found[name].speed for name in (OURS, *map(name_of, budgets))]
        rows.append(f"| {length // 1024}k | " + " | ".join(f"{s:.2f}" for s in speeds) + " |")
    return "\n".join(rows)


def peers(report: Report) -> str:
    """Contenders side by side: speed, and errors of the median and the worst head."""
    sizes = lengths(report)
    found = {length: points(report, length) for length in sizes}
    rows = [
        "| | " + " | ".join(f"{length // 1024}k tokens" for length in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for name, (_, _, label) in STYLES.items():
        cells = [_cell(found[length].get(name)) for length in sizes]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*rows, "", carried(report)]).rstrip()


def carried(report: Report) -> str:
    """Who was measured at another time, in a sentence; nothing if nobody was."""
    names = [
        label for name, (_, _, label) in STYLES.items() if name in report.get("carried", {})
    ]
    if not names:
        return ""
    who = " and ".join(names) + (" were" if len(names) > 1 else " was")
    return f"{who} measured in an earlier run, as multiples of cuDNN's time in it."


def _cell(point: Point | None) -> str:
    if point is None:
        return "-"
    return f"{point.speed:.2f}; {point.error:.3f}, {point.worst:.3f}"


WRITERS: dict[str, Callable[[Report], str]] = {
    "sentence": sentence,
    "by_length": by_length,
    "peers": peers,
    "carried": carried,
    "ablations": lambda _: ablations.table(),
}


def filled(text: str, report: Report) -> str:
    """A page with every block written anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{WRITERS[m[2]](report)}\n{m[3]}", text)


def read() -> Report:
    """The report of the GPU benchmark."""
    report: Report = json.loads(REPORT.read_text(encoding="utf-8"))
    assert BASE in report["cells"][0]["contenders"]
    return report


def write_tables() -> Path:
    """Write the blocks of every page."""
    report = read()
    for name in PAGES:
        page = ROOT / name
        if page.exists():
            page.write_text(filled(page.read_text(encoding="utf-8"), report), encoding="utf-8")
    return REPORT
