"""One problem of gpu_adaptive.py: times, errors, certificates and stages of every contender."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptive_clock import side_by_side, synchronize, whole_calls
from adaptive_data import CUDNN, DENSE, name_of
from adaptive_peers import Contender, Heads, contenders, ours
from adaptive_truth import Truth, errors


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    budgets: tuple[float, ...]
    peers: tuple[str, ...]
    rounds: int
    burst_ms: float
    whole_repeats: int


def escalated(result: Any) -> int:
    """Heads that were computed again because their first certificate missed the budget."""
    noted = result.provenance.get("escalated")
    if noted is None:
        return 0
    if isinstance(noted, Mapping | list | tuple | set | frozenset):
        return len(noted)
    return int(np.count_nonzero(np.asarray(noted)))


def stages(result: Any) -> dict[str, float]:
    """Milliseconds of each stage: the device's where it planned, else the host's."""
    provenance = result.provenance
    if (found := provenance.get("stage_ms")) is not None:
        return {stage: float(ms) for stage, ms in found.items()}
    return {
        n.removesuffix("_seconds") + " (host)": 1e3 * float(x)
        for n, x in provenance.items()
        if n.endswith("_seconds")
    }


def facts(result: Any, heads: int) -> dict[str, Any]:
    """Return what a result says of itself, head by head."""
    certificate = result.certificate
    indices = [(0, head) for head in range(heads)]
    kinds = Counter(result.plan[index].structure.kind for index in indices)
    return {
        "upper": [float(x) for x in np.asarray(certificate.upper)[0]],
        "estimate": [float(x) for x in np.asarray(certificate.estimate)[0]],
        "guarantee": sorted({str(x) for x in np.asarray(certificate.guarantee).ravel()}),
        "share": [float(result.facts[index].share) for index in indices],
        "structures": dict(kinds),
        "escalated": escalated(result),
    }


def _stage_times(heads: Heads, rel: float, repeats: int) -> dict[str, float]:
    call = ours(heads, rel, profile=True)
    call()
    seen = []
    for _ in range(repeats):
        result = call()
        synchronize()
        seen.append(stages(result))
    names = dict.fromkeys(name for entry in seen for name in entry)
    return {n: statistics.median(entry.get(n, 0.0) for entry in seen) for n in names}


def _known(entry: dict[str, Any], name: str, make: Any) -> None:
    """Add what `make` returns to an entry, or why it could not be had."""
    try:
        entry[name] = make()
    except Exception as error:  # one missing figure must not cost the others
        entry.setdefault("missing", {})[name] = f"{type(error).__name__}: {error}"[:300]


def _entry(name: str, contender: Contender, truth: Truth, heads: Heads) -> dict[str, Any]:
    result = contender.call()
    entry: dict[str, Any] = {"errors": errors(contender.out_of(result), truth)}
    if name.startswith("budget"):
        _known(entry, "facts", lambda: facts(result, heads.count))
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
            entries[name] = _entry(name, contender, truth, heads)
        except Exception as error:  # as in side_by_side
            absent[name] = f"{type(error).__name__}: {error}"[:300]
    bursts = {name: found[name].burst for name in entries}
    times, failed = side_by_side(bursts, settings.rounds, settings.burst_ms)
    absent |= failed
    entries = {name: entries[name] | {"ms": ms} for name, ms in times.items()}
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
