"""What tables and figures of gpu_adaptive.py read out of its report."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

CUDNN, DENSE = "cuDNN", "dense"
AIMS = {
    0.1: {8192: 1.4, 32_768: 2.5, 131_072: 3.5},
    0.2: {8192: 1.7, 32_768: 3.5, 131_072: 4.5},
}
"""Speed-up against cuDNN that each budget is meant to reach, by length."""
SLOWDOWN_MAX, SLOWDOWN_FROM = 1.03, 16_384
"""Largest time, as a multiple of dense, and the length from which that is asked for."""
COVERAGE_MIN = 0.95
PARTS = {
    "exact rows": ("exact", "merge"),
    "probes": ("probe_stats", "probe_mass", "probe_lse", "select"),
    "gather, pool, fit": ("nest", "gather", "pool", "fit"),
    "judge, decide": ("work_judge", "judge", "decide"),
    "attend": ("work_attend", "list", "attend", "attend_exact"),
    "certify, escalate": ("prove", "certify", "list_again", "escalate", "certify_again"),
}
"""Stages of a call by what they are for; those named nowhere are `REST`."""
REST = "rest"

Cell = dict[str, Any]


def numbers(values: Iterable[float | None]) -> list[float]:
    """Floats of a report; what was not finite is infinite."""
    return [math.inf if x is None else x for x in values]


def name_of(rel: float) -> str:
    """Name of a contender within a budget."""
    return f"budget {rel:g}"


def groups(report: Cell) -> dict[tuple[str, int, int], list[Cell]]:
    """Cells by text, length and number of heads."""
    found: dict[tuple[str, int, int], list[Cell]] = defaultdict(list)
    for cell in report["cells"]:
        found[cell["text"], cell["len"], cell["heads"]].append(cell)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][2], item[0][0])))


def sizes(report: Cell) -> dict[tuple[int, int], list[Cell]]:
    """Cells by length and number of heads, all texts together."""
    found: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    for (_, length, heads), cells in groups(report).items():
        found[length, heads] += cells
    return found


def milliseconds(cells: list[Cell], name: str) -> list[float] | None:
    """Median times of a contender in each cell; None unless it has one in all of them."""
    times = [c["contenders"].get(name, {}).get("ms", {}).get("median") for c in cells]
    return None if None in times else times  # type: ignore[return-value]


def speedups(cells: list[Cell], name: str, base: str = CUDNN) -> tuple[float, float] | None:
    """Total time of `base` over a contender's, and the least of single cells."""
    times, bases = milliseconds(cells, name), milliseconds(cells, base)
    if times is None or bases is None:
        return None
    single = [b / t for b, t in zip(bases, times, strict=True)]
    return sum(bases) / sum(times), min(single)


def pooled(cells: list[Cell], name: str) -> dict[str, list[float]]:
    """Shares, certificates and true errors of all heads of some cells."""
    found: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        entry = cell["contenders"].get(name, {})
        if (facts := entry.get("facts")) is None:
            continue
        for key in ("share", "upper", "estimate"):
            found[key] += numbers(facts[key])
        for key in ("rows", "frobenius", "worst"):
            found[key] += numbers(entry["errors"][key])
        found["escalated"].append(facts["escalated"])
    return found


def structures(cells: list[Cell], name: str) -> str:
    """Structures of all heads, most frequent first."""
    counts: Counter[str] = Counter()
    for cell in cells:
        counts.update(cell["contenders"].get(name, {}).get("facts", {}).get("structures", {}))
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def coverage(heads: dict[str, list[float]]) -> float:
    """Share of the heads whose true row quantile is at most the certified one."""
    pairs = zip(heads["rows"], heads["upper"], strict=True)
    return statistics.fmean(true <= upper for true, upper in pairs)


def part_means(cells: list[Cell], name: str) -> dict[str, float]:
    """Mean milliseconds of `PARTS` and `REST`, over the cells that know their stages."""
    part_of = {stage: part for part, stages in PARTS.items() for stage in stages}
    known = [cell["contenders"].get(name, {}).get("stages") for cell in cells]
    known = [stages for stages in known if stages]
    total = dict.fromkeys((*PARTS, REST), 0.0) if known else {}
    for stages in known:
        for stage, ms in stages.items():
            total[part_of.get(stage, REST)] += ms / len(known)
    return total
