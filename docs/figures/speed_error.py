"""Speed against error of the GPU benchmark, drawn from docs/benchmarks/gpu_adaptive.json.

python docs/figures/draw.py speed_error
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from style import BLUE, FOLDER, GREEN, GREY, ORANGE, PURPLE, save

REPORT = FOLDER.parent / "benchmarks" / "gpu_adaptive.json"
BASE = "cuDNN"
STYLES = {
    BASE: ("s", "0.25", "cuDNN"),
    "FA3": ("^", GREY, "FlashAttention-3"),
    "SageAttention": ("v", PURPLE, "SageAttention"),
    "dense": ("D", GREEN, "AdaAttn, exact"),
    "budget 0.1": ("o", BLUE, "AdaAttn, budget 0.1"),
    "budget 0.2": ("o", ORANGE, "AdaAttn, budget 0.2"),
}


@dataclass(frozen=True)
class Point:
    """A contender at one length: its speed beside the base's, and its errors.

    Attributes
    ----------
    speed : float
        Above 1 is faster than the base.
    error, worst : float
        95% row error over the rms row: of the median head, and of the worst one.
    """

    speed: float
    error: float
    worst: float


def points(report: dict[str, Any], length: int) -> dict[str, Point]:
    """Contenders of the calls with most heads at one length, all texts and layers together."""
    cells = [cell for cell in report["cells"] if cell["len"] == length]
    heads = max(cell["heads"] for cell in cells)
    cells = [cell for cell in cells if cell["heads"] == heads]
    found = {}
    for name in STYLES:
        entries = [cell["contenders"].get(name) for cell in cells]
        if any(entry is None or "ms" not in entry for entry in entries):
            continue
        errors = [x for entry in entries for x in entry["errors"]["rows"]]
        found[name] = Point(
            _total(cell["contenders"][BASE] for cell in cells) / _total(entries),
            statistics.median(errors),
            max(errors),
        )
    return found


def _total(entries: Iterable[dict[str, Any]]) -> float:
    return sum(entry["ms"]["median"] for entry in entries)


def draw_speed_error() -> Path:
    """A panel per length; what is slower than cuDNN lies in a field that says so."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    lengths = sorted({cell["len"] for cell in report["cells"]})
    heads = max(cell["heads"] for cell in report["cells"])
    figure, axes = plt.subplots(1, len(lengths), figsize=(8.2, 3.5), sharey=True, sharex=True)
    by_length = {length: points(report, length) for length in lengths}
    top = max(1.1, *(p.speed for found in by_length.values() for p in found.values()))
    for axis, (length, found) in zip(axes, by_length.items(), strict=True):
        for name, point in found.items():
            marker, colour, label = STYLES[name]
            axis.plot([point.error, point.worst], [point.speed] * 2, color=colour, lw=1.2)
            axis.plot(
                point.error, point.speed, marker, color=colour, ms=7, label=label, zorder=3
            )
            axis.plot(point.worst, point.speed, "|", color=colour, ms=9, mew=1.6)
        axis.axhline(1, color="0.4", lw=0.8)
        axis.axhspan(0, 1, color="#f3e3e0", zorder=0, lw=0)
        axis.set(xscale="log", xlim=(1.5e-3, 0.4), ylim=(0, 1.1 * top))
        axis.set_title(f"{length // 1024}k tokens")
        axis.grid(alpha=0.25, lw=0.5)
    axes[0].text(1.7e-3, 0.04, "slower than cuDNN", fontsize=8, color="#8c3b2e")
    axes[0].set_ylabel("cuDNN's time / time")
    axes[len(axes) // 2].set_xlabel(
        "measured error of 95% of a head's rows, relative to the rms row: median and worst head"
    )
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(handles), fontsize=8,
                  handletextpad=0.2, columnspacing=1.2)  # fmt: skip
    device = report["device"].removeprefix("NVIDIA ").split(" HBM")[0]
    figure.suptitle(
        f"bf16, causal, {heads} heads of SmolLM2 a call, one {device}; "
        "planning and certificates included",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return save(figure, "speed_error", source=REPORT)
