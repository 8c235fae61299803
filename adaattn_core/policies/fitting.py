"""Reading structures between those that were tried: errors and shares as powers of one knob.

The knob is what a structure leaves out, `Landmark.tau` or `ScoreSkip.lam`. Between two values
that were tried on held-out rows (and a little beyond), the error and the share kept are taken
as powers of it::

    error(x) = error(b) (x / b)^s,    s = ln(error(a) / error(b)) / ln(a / b)
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

from adaattn_core.policies.base import ERROR_EXPONENT
from adaattn_core.stats import HeadStats, StructureEstimate
from adaattn_core.structure import BlockSparse, Landmark, ScoreSkip, Structure

LEAST_SLOPE, MOST_SLOPE = 0.35, 1.0
"""Powers of the knob by which errors are taken to fall, at the least and at the most."""
LARGEST_LOG = 600.0
"""Logarithm of the largest power; its inverse is still far from the smallest number."""
NO_ERROR = 1e-6
"""Errors below this tell nothing about a power."""


def knob(structure: Structure) -> float:
    """Return what the structure leaves out: a mass, or a weight threshold.

    Raises
    ------
    TypeError
        If it is neither a landmark nor a score-then-skip structure.
    """
    if isinstance(structure, Landmark):
        return structure.tau
    if isinstance(structure, ScoreSkip):
        return structure.lam
    raise TypeError(f"{structure.kind} has no knob")


def tried(stats: HeadStats, kind: type[Structure]) -> list[StructureEstimate]:
    """Estimates of one kind whose error and share have a logarithm, loosest first."""
    found = {
        knob(e.structure): e
        for e in stats.structures
        if isinstance(e.structure, kind)
        and NO_ERROR < e.row_error_estimate < math.inf
        and e.share > 0
    }
    return [found[value] for value in sorted(found, reverse=True) if value > 0]


def fitted(
    stats: HeadStats, kind: type[Structure], aim: float
) -> tuple[Structure, float] | None:
    """Structure whose predicted error is `aim`, and its share; None where nothing was tried.

    Fitted through the two tightest values that were tried.
    """
    known = tried(stats, kind)
    if not known:
        return None
    tightest = known[-1]
    slope = ERROR_EXPONENT
    if len(known) > 1:
        slope = _slope(known[-2], tightest)
    value = knob(tightest.structure) * _power(aim / tightest.row_error_estimate, 1 / slope)
    structure = with_knob(tightest.structure, value)
    return structure, share_of(structure, stats)


def _power(ratio: float, exponent: float) -> float:
    """Return a power of a positive number that neither overflows nor becomes 0.

    Budgets may be as loose or as tight as float64 can say.
    """
    logarithm = math.log(max(ratio, sys.float_info.min)) * exponent
    return math.exp(min(max(logarithm, -LARGEST_LOG), LARGEST_LOG))


def with_knob(structure: Structure, value: float) -> Structure:
    """Return the structure with another mass or threshold, in [0, 0.9]."""
    value = min(value, 0.9)
    if isinstance(structure, Landmark):
        return replace(structure, tau=value)
    if isinstance(structure, ScoreSkip):
        return replace(structure, lam=value)
    raise TypeError(f"{structure.kind} has no knob")


def share_of(structure: Structure, stats: HeadStats) -> float:
    """Share of the visible scores that a structure should keep, by those that were tried."""
    known = tried(stats, type(structure))
    least = least_share(structure, stats)
    if len(known) < 2:
        return min(1.0, max(2 * least, known[-1].share if known else 0.0))
    looser, tighter = known[-2:]
    apart = math.log(knob(looser.structure) / knob(tighter.structure))
    slope = max(math.log(tighter.share / looser.share) / apart, 0.0)
    share = tighter.share * _power(knob(tighter.structure) / knob(structure), slope)
    return min(1.0, max(share, least))


def least_share(structure: Structure, shape: HeadStats) -> float:
    """Least share of the visible scores that a structure can come to on such a head."""
    mean_keys = max(shape.visible / max(shape.len_q, 1), 1)
    if isinstance(structure, Landmark):
        pools = 1 / structure.pool if structure.pool else 0.0
        return min(1.0, (structure.band + structure.tile / 2 + 64) / mean_keys + pools)
    if isinstance(structure, BlockSparse):
        return min(1.0, (structure.band + structure.tile_q) / mean_keys)
    if isinstance(structure, ScoreSkip):
        return min(1.0, 2 * structure.tile_kv / mean_keys)
    return 1.0


def _slope(looser: StructureEstimate, tighter: StructureEstimate) -> float:
    fall = math.log(looser.row_error_estimate / tighter.row_error_estimate)
    apart = math.log(knob(looser.structure) / knob(tighter.structure))
    return min(max(fall / apart, LEAST_SLOPE), MOST_SLOPE)
