"""Tables of an evaluation, as text: pages, Markdown and terminals show the same cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaattn_bench.models import TORCH
from adaattn_core.report.svg import short

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
    makers = (perplexity, _needle, _greedy, _choices, _heads, _ablations)
    for name, make in zip(
        ("perplexity", "needle", "greedy", "choices", "totals", "ablations"),
        makers,
        strict=True,
    ):
        if report.get(name):
            yield make(report)


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['share']:.3f}" if "share" in row else "-"


def perplexity(report: Report) -> Sheet:
    """Perplexity of every text and column."""
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
                _share(known[0]),
                short(max((r["upper_max"] for r in known if "upper_max" in r), default=None)),
            )
        )
    asked = report["settings"]
    remark = (
        f"{asked['windows']} window{'s' * (asked['windows'] > 1)} of {asked['tokens']:,} tokens"
        " of each text, each alone."
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
        f" mean nats a token, over depths {', '.join(map(str, report['settings']['depths']))}."
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
