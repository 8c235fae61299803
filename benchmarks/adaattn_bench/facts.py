"""What a result says of itself: shares, certificates, plans, stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sized
from typing import Any

import numpy as np


def facts_of(result: Any) -> dict[str, Any]:
    """Return what was kept, certified and planned, head by head or counted."""
    certificate, plans = result.certificate, [result.plan[index] for index in result.plan]
    return {
        "share": [float(result.facts[index].share) for index in result.plan],
        "upper": _numbers(certificate.upper),
        "estimate": _numbers(certificate.estimate),
        "guarantee": sorted({str(x) for x in np.asarray(certificate.guarantee).ravel()}),
        "structures": dict(Counter(plan.structure.kind for plan in plans)),
        "formats": dict(Counter(f"{plan.qk}/{plan.pv}" for plan in plans)),
        "escalated": _count(result.provenance.get("escalated")),
    }


def stages_of(result: Any) -> dict[str, float]:
    """Milliseconds of each stage: the device's where it planned, else the host's."""
    provenance = result.provenance
    if (found := provenance.get("stage_ms")) is not None:
        return {stage: float(ms) for stage, ms in found.items()}
    return {
        n.removesuffix("_seconds") + " (host)": 1e3 * float(x)
        for n, x in provenance.items()
        if n.endswith("_seconds")
    }


def _numbers(values: Any) -> list[float]:
    return [float(x) for x in np.asarray(values).ravel()]


def _count(noted: Any) -> int:
    """Heads that were computed again; backends note their names, or a mark for each head."""
    if noted is None:
        return 0
    if isinstance(noted, Sized) and not hasattr(noted, "shape"):
        return len(noted)
    return int(np.count_nonzero(np.asarray(noted)))
