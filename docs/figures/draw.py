"""Draw the figures of the documentation: python docs/figures/draw.py [NAME ...]

Every figure is made from data in this repository: the heads that the demo ships, and the tables
of docs/benchmarks. No download, no GPU; all of them take under a minute on two cores. One is
photographed, and needs Chromium.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib as mpl

mpl.use("Agg")

from ablations import draw_ablations
from architecture import draw_architecture
from budgets import draw_budgets
from certificate import draw_certificate
from diagrams import draw_call, draw_pipeline
from far_field import draw_far_field
from one_setting import draw_one_setting
from report_page import draw_report_page
from running_text import write_tables
from speed_error import draw_speed_error
from structures import draw_landmark, draw_structures

FIGURES: dict[str, Callable[[], Path]] = {
    "one_setting": draw_one_setting,
    "budgets": draw_budgets,
    "ablations": draw_ablations,
    "structures": draw_structures,
    "landmark": draw_landmark,
    "certificate": draw_certificate,
    "far_field": draw_far_field,
    "speed_error": draw_speed_error,
    "report_page": draw_report_page,
    "architecture": draw_architecture,
    "call": draw_call,
    "pipeline": draw_pipeline,
}


TABLES = "tables"
"""Besides the figures: the benchmark's numbers in running text."""


def main(names: list[str]) -> int:
    """Draw the named figures, or all of them."""
    known = {**FIGURES, TABLES: write_tables}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    for name in names or known:
        print(known[name]())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
