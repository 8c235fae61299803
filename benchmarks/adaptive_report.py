"""Tables of gpu_adaptive.py's report."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict

from adaptive_data import (
    AIMS,
    COVERAGE_MIN,
    CUDNN,
    DENSE,
    PARTS,
    REST,
    SLOWDOWN_FROM,
    SLOWDOWN_MAX,
    Cell,
    coverage,
    groups,
    milliseconds,
    name_of,
    numbers,
    part_means,
    pooled,
    sizes,
    speedups,
    structures,
)


def _kilo(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _estimate(values: list[float]) -> str:
    """Mean of the heads that were sampled."""
    finite = [x for x in values if math.isfinite(x)]
    return f"{statistics.fmean(finite):.3f}" if finite else "-"


def _times(value: tuple[float, float] | None) -> list[str]:
    return ["-", "-"] if value is None else [f"{x:.2f}" for x in value]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown of a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


# --- sections ---------------------------------------------------------------------------------
def speed_rows(report: Cell) -> list[list[str]]:
    """Rows of the main table."""
    rows = []
    for rel in report["budgets"]:
        for (text, length, heads), cells in groups(report).items():
            name = name_of(rel)
            known, times = pooled(cells, name), milliseconds(cells, name)
            base = milliseconds(cells, CUDNN)
            if times is None or not known["share"]:
                rows.append([f"{rel:g}", _kilo(length), text, str(heads)] + ["-"] * 12)
                continue
            total = len(known["share"])
            within = sum(upper <= rel for upper in known["upper"])
            aim = AIMS.get(rel, {}).get(length)
            rows.append(
                [
                    f"{rel:g}", _kilo(length), text, str(heads),
                    "-" if base is None else f"{statistics.median(base):.3g}",
                    f"{statistics.median(times):.3g}",
                    *_times(speedups(cells, name)),
                    "-" if aim is None else f"{aim:g}",
                    _times(speedups(cells, name, DENSE))[0],
                    f"{statistics.fmean(known['share']):.2f},"
                    f" {statistics.median(known['share']):.2f}",
                    f"{sum(known['escalated'])} of {total}",
                    f"{within} of {total}",
                    f"{coverage(known):.3f}",
                    f"{_estimate(known['estimate'])},"
                    f" {statistics.fmean(known['frobenius']):.3f}",
                    structures(cells, name),
                ]
            )  # fmt: skip
    return rows


SPEED_HEAD = [
    "budget", "len", "text", "heads", "cuDNN, ms", "ours, ms", "speed-up", "worst layer", "aim",
    "against our dense", "share kept: mean, median", "escalated", "certificate within budget",
    "coverage", "Frobenius: estimate, true", "structures",
]  # fmt: skip


def peer_rows(report: Cell) -> list[list[str]]:
    """Everybody's time beside everybody's measured error, both over all texts."""
    rows = []
    for (length, heads), cells in sizes(report).items():
        names = dict.fromkeys(name for cell in cells for name in cell["contenders"])
        for name in names:
            times = milliseconds(cells, name)
            if times is None:
                continue
            errors = [cell["contenders"][name]["errors"] for cell in cells]
            quantiles = numbers(x for e in errors for x in e["rows"])
            frobenius = numbers(x for e in errors for x in e["frobenius"])
            rows.append(
                [
                    _kilo(length), str(heads), name, f"{statistics.median(times):.3g}",
                    _times(speedups(cells, name))[0],
                    f"{statistics.fmean(frobenius):.4f}",
                    f"{statistics.median(quantiles):.4f}, {max(quantiles):.4f}",
                ]
            )  # fmt: skip
    return rows


def hard_rows(report: Cell) -> list[list[str]]:
    """Synthetic cases: never slower than dense, never wrong."""
    rows = []
    for cell in report["hard"]:
        for rel in report["budgets"]:
            name = name_of(rel)
            known, times = pooled([cell], name), milliseconds([cell], name)
            label = [cell["case"], str(cell["dim"]), _kilo(cell["len"]), f"{rel:g}"]
            if times is None or not known["share"]:
                rows.append([*label, cell["absent"].get(name, "-")] + ["-"] * 6)
                continue
            dense = milliseconds([cell], DENSE)
            slowdown = times[0] / dense[0] if dense else math.nan
            slow = slowdown > SLOWDOWN_MAX and cell["len"] >= SLOWDOWN_FROM
            mark = " (!)" if slow else ""
            rows.append(
                [
                    *label, f"{times[0]:.3g}", "-" if not dense else f"{dense[0]:.3g}",
                    f"{slowdown:.3f}{mark}", f"{statistics.fmean(known['share']):.2f}",
                    f"{max(known['upper']):.3g}", f"{max(known['rows']):.3g}",
                    structures([cell], name),
                ]
            )  # fmt: skip
    return rows


def stage_rows(report: Cell) -> tuple[list[str], list[list[str]]]:
    """Return column names and rows of mean milliseconds by what they were spent on."""
    rows = [
        [f"{rel:g}", _kilo(length), str(heads), *(f"{ms:.3f}" for ms in means.values())]
        for rel in report["budgets"]
        for (length, heads), cells in sizes(report).items()
        if (means := part_means(cells, name_of(rel)))
    ]
    return ["budget", "len", "heads", *PARTS, REST], rows


def whole_rows(report: Cell) -> list[list[str]]:
    """Single calls on an idle device, and graph replays."""
    graphs: dict[tuple[int, str], list[float]] = defaultdict(list)
    for entry in report["graphs"]:
        for name, ms in entry.items():
            if isinstance(ms, float):
                graphs[entry["len"], name].append(ms)
    rows = []
    for (length, heads), cells in sizes(report).items():
        for name in dict.fromkeys(n for cell in cells for n in cell["contenders"]):
            whole = [c["contenders"].get(name, {}).get("whole") for c in cells]
            if None in whole:
                continue
            times = [
                f"{statistics.median(w[key] for w in whole):.3g}"
                for key in ("returned", "done", "looked")
            ]
            replay = graphs.get((length, name)) if len(cells[0]["layers"]) == 1 else None
            shown = f"{statistics.median(replay):.3g}" if replay else "-"
            rows.append([_kilo(length), str(heads), name, *times, shown])
    return rows


def aim_rows(report: Cell) -> list[list[str]]:
    """Speed-ups over all texts, one layer a call and three, beside the aims."""
    rows = []
    lengths = sorted({c["len"] for c in report["cells"]})
    for rel in report["budgets"]:
        for length in lengths:
            found = []
            for batched in (False, True):
                cells = [
                    c for c in report["cells"]
                    if c["len"] == length and (len(c["layers"]) > 1) == batched
                ]  # fmt: skip
                found.append(_times(speedups(cells, name_of(rel)) if cells else None)[0])
            aim = AIMS.get(rel, {}).get(length)
            rows.append([f"{rel:g}", _kilo(length), *found, "-" if aim is None else f"{aim:g}"])
    return rows


AIM_HEAD = ["budget", "tokens", "one layer a call", "three layers a call", "aim"]


def verdict(report: Cell) -> list[str]:
    """Whether the aims are met, in words and figures."""
    lines = []
    for rel in report["budgets"]:
        name = name_of(rel)
        known = pooled(report["cells"], name)
        if not known["share"]:
            continue
        within = sum(upper <= rel for upper in known["upper"])
        lines.append(
            f"- Budget {rel:g}: coverage {coverage(known):.3f} over {len(known['rows'])} heads"
            f" (aim {COVERAGE_MIN}); {within} certificates within the budget; worst true"
            f" 95%-row error {max(known['rows']):.3g}; Frobenius error mean"
            f" {statistics.fmean(known['frobenius']):.3f}."
        )
    slow = [
        (
            times[0] / dense[0],
            cell.get("case") or f"{cell['text']} {cell['layers']}",
            cell["len"],
        )
        for cell in report["cells"] + report["hard"]
        for rel in report["budgets"]
        if cell["len"] >= SLOWDOWN_FROM
        and (times := milliseconds([cell], name_of(rel)))
        and (dense := milliseconds([cell], DENSE))
    ]
    if slow:
        worst = max(slow)
        count = sum(x > SLOWDOWN_MAX for x, _, _ in slow)
        lines.append(
            f"- From {_kilo(SLOWDOWN_FROM)} on, {count} of {len(slow)} problems took over"
            f" {SLOWDOWN_MAX - 1:.0%} longer than our dense kernel, the worst {worst[0]:.3f}"
            f" times its time ({worst[1]}, {_kilo(worst[2])})."
        )
    for found in report["needles"]:
        lines += [
            f"- Needles ({name}): {x['found']} of {x['planted']} retrieved"
            + (f"; {n} false certificates." if (n := x.get("false_certificates")) else ".")
            for name, x in found.items()
            if isinstance(x, dict) and x["planted"]
        ]
    return lines


def gaps(report: Cell) -> list[str]:
    """Return what is not there, and why."""
    why: Counter[str] = Counter()
    for cell in report["cells"] + report["hard"]:
        for name, reason in cell["absent"].items():
            why[f"{name}: {reason}"] += 1
        for name, entry in cell["contenders"].items():
            for figure, reason in entry.get("missing", {}).items():
                why[f"{name}, {figure}: {reason}"] += 1
    for entry in report["graphs"]:
        for name, reason in entry.get("missing", {}).items():
            why[f"{name}, graph: {reason}"] += 1
    for found in report["needles"]:
        why.update(found["errors"])
    lines = [
        f"- {reason.replace(chr(10), '; ')} ({n} times)" for reason, n in why.most_common()
    ]
    return lines + [f"- not begun: {what}" for what in report["cut_short"]]


def summary(report: Cell) -> str:
    """Return the short text that ends a run."""
    lines = ["", *table(AIM_HEAD, aim_rows(report)), "", *verdict(report), ""]
    if report["cells"]:
        lines += table(SPEED_HEAD, speed_rows(report))
    return "\n".join(lines + gaps(report))


def _carried(report: Cell) -> str:
    """Say which peers were measured in another run."""
    runs = report.get("carried", {})
    if not runs:
        return ""
    told = ", ".join(f"{name} ({run})" for name, run in sorted(runs.items()))
    return (
        f" Missing on this machine and taken from an earlier run on the same inputs: {told};"
        " their times are scaled so that each keeps its ratio to cuDNN's of its own run."
    )


def markdown(report: Cell) -> str:
    """Return the documentation page."""
    versions = ", ".join(
        f"{label} {report[key]}"
        for key, label in (
            ("driver", "driver"), ("cuda", "CUDA"), ("cudnn", "cuDNN"), ("torch", "PyTorch")
        )
        if key in report
    )  # fmt: skip
    perplexities = ", ".join(
        f"{c['text']} {_kilo(c['len'])} {c['perplexity']:.1f}" for c in report["captures"]
    )
    stage_head, stages = stage_rows(report)
    lines = [
        "# What a budget gains on a GPU",
        "",
        f"{report['device']}, {versions}, {report['date']}. `{report['command']}` at revision"
        f" {report['revision']}.",
        "",
        "Queries, keys and values of SmolLM2-135M (bf16; 9 query and 3 key/value heads of"
        " dimension 64), captured by `benchmarks/gpu_capture.py`, layers 1, 5, 9, …, 29, on two"
        " texts that nothing was tuned on: *prose*"
        " is The Debian Administrator's Handbook, *code* the Python sources of scipy.stats. 8k"
        " is what the model was trained for; beyond, positions are stretched by YaRN."
        f" Perplexity of these (4-bit) weights: {perplexities}.",
        "",
        "The timed region holds everything: probe, plan, gather, attend, certify, escalate."
        f" CUDA events, medians of {report['rounds']} rounds of bursts of"
        f" {report['burst_ms']:g} ms in random order; peers take turns on the same inputs."
        " A budget speaks of 95% of a head's rows with confidence 0.95. The truth is attention"
        f" in float64 on at least {report['rows']:,} rows a head drawn independently. cuDNN is"
        " PyTorch's backend; its keys and values are widened to all heads beforehand."
        " *dense* is this library's own kernel without a budget.",
        "",
        "cuDNN's time over ours, everything included; below 1 the budget costs time:",
        "",
        *table(AIM_HEAD, aim_rows(report)),
        "",
        *verdict(report),
        *(f"- {remark}" for remark in report.get("remarks", ())),
        "",
        "![Speed-up, error, certificates and stages](gpu_adaptive.png)",
        "",
        "## Speed and certificates",
        "",
        "Milliseconds are medians over layers; the speed-up is that of all layers together.",
        "",
        *table(SPEED_HEAD, speed_rows(report)),
        "",
        "## Peers at their measured error",
        "",
        "All texts together. Milliseconds are medians; the speed-up is that of the total time."
        + _carried(report),
        "",
        *table(
            ["len", "heads", "by", "ms", "speed-up", "Frobenius, mean",
             "95%-row error: median, worst head"],
            peer_rows(report),
        ),
    ]  # fmt: skip
    if report["hard"]:
        lines += [
            "",
            "## Hard inputs",
            "",
            "Eight heads. *Slowdown* is our time over that of our own dense kernel, marked (!)"
            f" where it is over {SLOWDOWN_MAX:g}; upper and true are of the worst head.",
            "",
            *table(
                ["case", "dim", "len", "budget", "ms", "dense, ms", "slowdown", "share",
                 "upper", "true", "structures"],
                hard_rows(report),
            ),
        ]  # fmt: skip
    if stages:
        lines += [
            "",
            "## Where the time goes",
            "",
            "Milliseconds a call, mean over layers and texts.",
            "",
        ]
        lines += table(stage_head, stages)
    if rows := whole_rows(report):
        lines += [
            "",
            "## Single calls on an idle device",
            "",
            "Milliseconds by the host's clock: until the call returns, until the device is"
            " done, until the certificate has been read. Last, a CUDA graph of the call,"
            " replayed, where one was recorded.",
            "",
            *table(["len", "heads", "by", "returned", "done", "looked at", "graph"], rows),
        ]
    if missing := gaps(report):
        lines += ["", "## Not measured", "", *missing]
    return "\n".join(lines) + "\n"
