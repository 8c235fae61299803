"""What each adaptive part is worth, from docs/benchmarks/ablations.json (`adaattn eval`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from style import BLUE, FOLDER, GREEN, ORANGE, save

REPORT = FOLDER.parent / "benchmarks" / "ablations.json"
COLUMNS = (
    ("speedup", "predicted speed on sm90,\nplans alone (dense = 1)", BLUE),
    ("share", "share of the\nscores computed", ORANGE),
    ("frobenius", "mean relative\nFrobenius error", GREEN),
)


def read() -> dict[str, Any]:
    """The report of `adaattn eval --parts ablations`."""
    report: dict[str, Any] = json.loads(REPORT.read_text(encoding="utf-8"))
    return report


def draw_ablations() -> Path:
    """Three columns of bars, a row for each part that is switched off."""
    rows = [row for row in read()["ablations"] if "refused" not in row]
    names = [row["part"] if n == 0 else f"without {row['part']}" for n, row in enumerate(rows)]
    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(8.4, 3.2), sharey=True)
    for axis, (key, title, colour) in zip(axes, COLUMNS, strict=True):
        values = [row[key] for row in rows]
        bars = axis.barh(range(len(rows)), values, color=colour, height=0.6)
        bars[0].set_hatch("///")
        bars[0].set_edgecolor("white")
        axis.axvline(values[0], color="0.3", lw=0.8, ls=":")
        for y, value in enumerate(values):
            axis.text(value, y, f" {value:.3f}" if value < 0.1 else f" {value:.2f}",
                      va="center", fontsize=7.5)  # fmt: skip
        axis.set_title(title, fontsize=8.5)
        axis.set_xlim(0, 1.25 * max(values))
        axis.set_xticks([])
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return save(figure, "ablations", source=REPORT)


def table() -> str:
    """The same numbers, and what became of certificates, as a table."""
    lines = [
        "| switched off | speed predicted on sm90: plans alone, whole call | share | "
        "row error, worst head | Frobenius, mean | certificates true | structures |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in read()["ablations"]:
        if "refused" in row:
            lines.append(f"| {row['part']} | refused: {row['refused']} | | | | | |")
            continue
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(row["structures"].items()))
        true = round(row["coverage"] * row["heads"])
        lines.append(
            f"| {row['part']} | {row['speedup']:.2f}, {row['speedup_whole']:.2f} | "
            f"{row['share']:.2f} | {row['rows']:.3f} | {row['frobenius']:.3f} | "
            f"{true} of {row['heads']} | {kinds} |"
        )
    return "\n".join(lines)
