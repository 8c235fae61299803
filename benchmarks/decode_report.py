"""Tables and the picture of gpu_decode.py's figures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

LABELS = {
    "cudnn": "cuDNN", "fa2": "FlashAttention-2", "wide": "16-bit pages", "i8": "i8 pages",
    "e4m3": "e4m3 pages", "wide_skip": "16-bit, skipping", "i8_skip": "i8, skipping",
}  # fmt: skip
COLOURS = {
    "cudnn": "#8c8c8c", "fa2": "#c8c8c8", "wide": "#2b6cb0", "i8": "#2f9e5b", "e4m3": "#d08700",
    "wide_skip": "#7fb1e3", "i8_skip": "#86d3a5",
}  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in lines]


def _synthetic(report: dict[str, Any]) -> list[str]:
    rows = []
    for r in report["synthetic"]:
        us = r["us"]
        rows.append([
            str(r["batch"]), f"{r['len'] // 1024}k", f"{r['copy_us']:.1f}",
            *(f"{us[name]:.1f}" for name in ("cudnn", "fa2", "wide", "i8", "e4m3")),
            f"{r['copy_us'] / us['wide']:.2f}", f"{us['cudnn'] / us['wide']:.2f}",
            f"{us['cudnn'] / us['i8']:.2f}", f"{r['host_us']:.0f}",
        ])  # fmt: skip
    head = ["batch", "keys", "at copy rate", "cuDNN", "FlashAttention-2", "16-bit pages",
            "i8 pages", "e4m3 pages", "16-bit: share of copy rate", "cuDNN / 16-bit",
            "cuDNN / i8", "host"]  # fmt: skip
    return _table(head, rows)


def _real(report: dict[str, Any]) -> list[str]:
    times = []
    for r in report["real"]:
        us = r["us"]
        names = ("cudnn", "fa2", "wide", "i8", "wide_skip", "i8_skip")
        times.append([
            r["file"].removeprefix("qkv-"), *(f"{us[name]:.0f}" for name in names),
            f"{us['cudnn'] / us['wide_skip']:.2f}", f"{us['cudnn'] / us['i8_skip']:.2f}",
        ])  # fmt: skip
    losses = []
    for r in report["real"]:
        errors = (r["error"][name] for name in ("wide", "wide_skip", "i8", "i8_skip"))
        losses.append([
            r["file"].removeprefix("qkv-"), f"{r['light']:.2f}", f"{r['skipped']:.2f}",
            f"{r['dropped'][0]:.1e}, {r['dropped'][1]:.1e}",
            f"{r['bound'][0]:.1e}, {r['bound'][1]:.2f}",
            *(f"{median:.1e}, {most:.1e}" for median, most in errors),
        ])  # fmt: skip
    head = ["cache", "cuDNN", "FlashAttention-2", "16-bit", "i8", "16-bit, skipping",
            "i8, skipping", "cuDNN / 16-bit, skipping", "cuDNN / i8, skipping"]  # fmt: skip
    more = ["cache", "light runs", "runs left", "share of mass left", "bound of it",
            "error 16-bit", "error 16-bit, skipping", "error i8",
            "error i8, skipping"]  # fmt: skip
    return [*_table(head, times), "", *_table(more, losses)]


def markdown(report: dict[str, Any]) -> str:
    """Render the page."""
    sizes = ", ".join(f"{n // 1024}k {ratio:.3f}" for n, ratio in report["footprint"])
    lines = [
        "# Decode steps over pages",
        "",
        f"{report['device']}, PyTorch {report['torch']}, cuDNN {report['cudnn']},"
        f" {report['date']}, revision {report['revision']}: `python benchmarks/gpu_decode.py"
        " --heads DIR`. Microseconds of device time of a call among many in a row, each over"
        " another cache of the same size, so that none is in L2; medians of rounds in which"
        f" all take turns. Copy rate of the same run: {report['copy'] / 1e12:.2f} TB/s, read"
        " and written. Host: what a step keeps the host, 300 in a row.",
        "",
        "One row, 32 query heads over 8 key/value heads of dim 128, bf16, normal numbers:",
        "",
        *_synthetic(report),
        "",
        *(line for note in report.get("notes", []) for line in (note, "")),
        f"Bytes of `AdaptiveCache` (i8) against 16 bits: {sizes}.",
    ]
    if report["real"]:
        lines += [
            "",
            "SmolLM2-135M, captured by `benchmarks/gpu_capture.py`: the last row of 8 layers"
            " side by side, 9 query heads over 3 key/value heads of dim 64. Skipping: the"
            f" values of 64 keys whose mean weight is below {report['budget']} / keys, for all"
            " query heads of a group, are not read.",
            "",
            *_real(report),
            "",
            "Light runs: share of runs of 64 keys below the threshold by exact scores; runs"
            " left: those that the kernel left over 16-bit pages. Share of mass left, over i8"
            " pages, its bound and errors: median and worst of the heads; errors of a row"
            " against float64 over the 16-bit cache, relative to its norm. The bound is theorem"
            " 11's for what was left: a head whose bound misses its budget runs again.",
        ]
    lines += ["", "![Time against cuDNN's](gpu_decode.png)", ""]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw cuDNN's time over everybody's."""
    plt = importlib.import_module("matplotlib.pyplot")
    sides = [
        (report["synthetic"], ("fa2", "wide", "i8", "e4m3"),
         [f"{r['batch']} x {r['len'] // 1024}k" for r in report["synthetic"]],
         "32 heads over 8, dim 128"),
        (report["real"], ("wide", "i8", "wide_skip", "i8_skip"),
         [r["file"].removeprefix("qkv-").replace("-", "\n") for r in report["real"]],
         "SmolLM2's caches, dim 64"),
    ]  # fmt: skip
    sides = [side for side in sides if side[0]]
    size = (5.2 * len(sides), 3.4)
    figure, axes = plt.subplots(
        1, len(sides), figsize=size, layout="constrained", squeeze=False
    )
    for axis, (rows, names, ticks, title) in zip(axes[0], sides, strict=True):
        width = 0.8 / len(names)
        for k, name in enumerate(names):
            places = [i - 0.4 + width * (k + 0.5) for i in range(len(rows))]
            heights = [r["us"]["cudnn"] / r["us"][name] for r in rows]
            axis.bar(places, heights, width, color=COLOURS[name], label=LABELS[name])
        axis.axhline(1.0, color="0.3", linewidth=0.8)
        axis.set_xticks(range(len(rows)), ticks)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("cuDNN's time / its time")
        axis.tick_params(labelsize=8)
        axis.legend(frameon=False, fontsize=7, ncols=2)
        axis.set_ylim(top=1.25 * axis.get_ylim()[1])
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
