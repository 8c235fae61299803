"""Figures of gpu_adaptive.py's report."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from adaptive_data import AIMS, PARTS, REST, name_of, part_means, pooled, sizes, speedups

COLOURS = {0.1: "#1b6ca8", 0.2: "#e07b39"}
OTHERS = ("#76b900", "#8e6bbf", "#b8b8b8")
PART_COLOURS = ("#4c78a8", "#72b7b2", "#54a24b", "#eeca3b", "#e45756", "#b279a2", "#bab0ac")
SMALLEST = 1e-4
"""Errors are drawn from here on."""


def _speed(axis: Any, report: dict[str, Any]) -> None:
    lengths = sorted({cell["len"] for cell in report["cells"]})
    for rel, colour in zip(report["budgets"], _colours(report), strict=True):
        for batched, style in ((False, "-"), (True, "--")):
            points = []
            for length in lengths:
                cells = [
                    c for c in report["cells"]
                    if c["len"] == length and (len(c["layers"]) > 1) == batched
                ]  # fmt: skip
                found = speedups(cells, name_of(rel)) if cells else None
                if found is not None:
                    points.append((length, found[0]))
                    if not batched:
                        single = [speedups([c], name_of(rel)) for c in cells]
                        heights = [s[0] for s in single if s is not None]
                        axis.scatter(
                            [length] * len(heights), heights, s=9, color=colour, alpha=0.35
                        )
            label = f"budget {rel:g}" + (", three layers" if batched else "")
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
        aims = {n: x for n, x in AIMS.get(rel, {}).items() if n in lengths}
        if aims:
            axis.scatter(
                list(aims), list(aims.values()), marker="_", s=220, lw=4, color=colour,
                label=f"aim of budget {rel:g}",
            )  # fmt: skip
    for name, colour in zip(("dense", "FA3", "SageAttention"), OTHERS, strict=True):
        points = []
        for length in lengths:
            cells = [c for c in report["cells"] if c["len"] == length]
            cells = [c for c in cells if name in c["contenders"]]
            if cells and (found := speedups(cells, name)) is not None:
                points.append((length, found[0]))
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, lw=1, label=name)
    axis.axhline(1, color="0.6", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n / 1024:g}k" for n in lengths])
    axis.set(xlabel="tokens (dots: single layers)", ylabel="times as fast as cuDNN")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7, frameon=False)


def _colours(report: dict[str, Any]) -> list[str]:
    return [COLOURS.get(rel, "0.3") for rel in report["budgets"]]


def _shown(values: list[float]) -> list[float]:
    return [max(x, SMALLEST) if math.isfinite(x) else math.nan for x in values]


def _errors(axis: Any, report: dict[str, Any]) -> None:
    for rel, colour in zip(report["budgets"], _colours(report), strict=True):
        known = pooled(report["cells"], name_of(rel))
        axis.scatter(
            known["share"], _shown(known["rows"]), s=6, alpha=0.4, color=colour,
            label=f"budget {rel:g}",
        )  # fmt: skip
        axis.axhline(rel, color=colour, lw=0.8, ls=":")
    axis.set(
        xlabel="share of scores kept", ylabel="true error of 95% of the rows", yscale="log"
    )
    axis.legend(fontsize=7, frameon=False)


def _certificates(axis: Any, report: dict[str, Any]) -> None:
    for rel, colour in zip(report["budgets"], _colours(report), strict=True):
        known = pooled(report["cells"] + report["hard"], name_of(rel))
        axis.scatter(
            _shown(known["rows"]), _shown(known["upper"]), s=6, alpha=0.4, color=colour,
            label=f"budget {rel:g}",
        )  # fmt: skip
        axis.axhline(rel, color=colour, lw=0.8, ls=":")
    ends = (SMALLEST, 1.0)
    axis.plot(ends, ends, color="0.4", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="true error of 95% of the rows")
    axis.set(ylabel="certified (below the line: false)")
    axis.legend(fontsize=7, frameon=False)


def _stages(axis: Any, report: dict[str, Any]) -> None:
    rel = report["budgets"][0]
    bars = {
        f"{length // 1024}k\n{heads} heads": means
        for (length, heads), cells in sizes(report).items()
        if (means := part_means(cells, name_of(rel)))
    }
    foot = [0.0] * len(bars)
    for part, colour in zip((*PARTS, REST), PART_COLOURS, strict=True):
        shares = [means[part] / (sum(means.values()) or 1.0) for means in bars.values()]
        axis.bar(list(bars), shares, bottom=foot, label=part, color=colour)
        foot = [a + b for a, b in zip(foot, shares, strict=True)]
    axis.set(ylabel=f"share of the time, budget {rel:g}")
    if bars:
        names = axis.get_legend_handles_labels()
        axis.legend(
            *(x[::-1] for x in names), fontsize=7, frameon=False,
            loc="center left", bbox_to_anchor=(1, 0.5),
        )  # fmt: skip


def plot(report: dict[str, Any], path: Path) -> None:
    """Four panels: speed-up, error, certificate against truth, stages."""
    mpl = importlib.import_module("matplotlib")
    mpl.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    if report["cells"]:
        for axis, draw in zip(
            axes.flat, (_speed, _errors, _certificates, _stages), strict=True
        ):
            draw(axis, report)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['device']}, {report['date']}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
