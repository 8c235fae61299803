"""One problem of gpu_adaptive.py: times, errors, certificates and stages of every contender."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from adaattn_bench.clock import reason, synchronize, take_turns, whole_calls
from adaattn_bench.contenders import Contender
from adaattn_bench.facts import facts_of, stages_of
from adaattn_bench.truth import Truth
from adaptive_data import CUDNN, DENSE, name_of
from adaptive_peers import Heads, contenders, ours


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    budgets: tuple[float, ...]
    peers: tuple[str, ...]
    rounds: int
    burst_ms: float
    whole_repeats: int


def _stage_times(heads: Heads, rel: float, repeats: int) -> dict[str, float]:
    call = ours(heads, rel, profile=True)
    call()
    seen = []
    for _ in range(repeats):
        result = call()
        synchronize()
        seen.append(stages_of(result))
    names = dict.fromkeys(name for entry in seen for name in entry)
    return {n: statistics.median(entry.get(n, 0.0) for entry in seen) for n in names}


def _known(entry: dict[str, Any], name: str, make: Any) -> None:
    """Add what `make` returns to an entry, or why it could not be had."""
    try:
        entry[name] = make()
    except Exception as error:  # one missing figure must not cost the others
        entry.setdefault("missing", {})[name] = reason(error)


def _entry(name: str, contender: Contender, truth: Truth) -> dict[str, Any]:
    result = contender.call()
    entry: dict[str, Any] = {"errors": truth.errors(contender.out_of(result))}
    if name.startswith("budget"):
        _known(entry, "facts", lambda: facts_of(result))
    return entry


def measure(heads: Heads, truth: Truth, settings: Settings) -> dict[str, Any]:
    """Run every contender on one problem.

    Returns
    -------
    dict
        ``heads``, ``len``, ``dim``; ``contenders``: by name, ``ms`` (median, low, high),
        ``errors`` by head and, within a budget, ``facts``, ``whole`` (single calls on an idle
        device) and ``stages``; ``absent``: why others are not there.
    """
    found, absent = contenders(heads, list(settings.budgets), list(settings.peers))
    entries: dict[str, dict[str, Any]] = {}
    for name, contender in found.items():
        try:
            entries[name] = _entry(name, contender, truth)
        except Exception as error:  # as in take_turns
            absent[name] = reason(error)
    bursts = {name: found[name].burst for name in entries}
    timings = take_turns(bursts, settings.rounds, settings.burst_ms)
    absent |= timings.failed
    entries = {
        name: entries[name] | {"ms": times.to_json()}
        for name, times in timings.summaries().items()
    }
    for rel in settings.budgets:
        if (entry := entries.get(name_of(rel))) is not None:
            call = found[name_of(rel)].call
            repeats = settings.whole_repeats
            _known(
                entry,
                "whole",
                lambda c=call, n=repeats: whole_calls(c, lambda r: r.certificate.upper, n),
            )
            _known(entry, "stages", lambda r=rel, n=repeats: _stage_times(heads, r, n))
    for name in {CUDNN, DENSE} & entries.keys():
        call, repeats = found[name].call, settings.whole_repeats
        entries[name]["whole"] = whole_calls(call, lambda _: None, repeats)
    return {
        "heads": heads.count,
        "len": heads.length,
        "dim": int(heads.q.shape[3]),
        "contenders": entries,
        "absent": absent,
    }


def line(cell: dict[str, Any]) -> str:
    """Return one printed line of a cell: times against cuDNN, shares, certificates."""
    entries = cell["contenders"]
    base = entries.get(CUDNN, {}).get("ms", {}).get("median")
    parts = []
    for name, entry in entries.items():
        ms = entry["ms"]["median"]
        text = f"{name} {ms:.3f}"
        if base:
            text += f" ({base / ms:.2f}x)"
        if (known := entry.get("facts")) is not None:
            worst, true = max(known["upper"]), max(entry["errors"]["rows"])
            text += f" share {statistics.fmean(known['share']):.2f} upper {worst:.3f}"
            text += f" true {true:.3f} esc {known['escalated']}"
        parts.append(text)
    return "; ".join(parts)
