"""What a target offers a policy: structures in sizes that suit it, formats that save time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from adaattn_core.formats import get_format
from adaattn_core.policies.base import PolicyContext
from adaattn_core.stats import HeadStats
from adaattn_core.structure import Landmark, ScoreSkip

__all__ = ["FORMAT_PAIRS", "format_pairs", "landmark_of", "score_skip_of"]

FORMAT_PAIRS = (
    ("e4m3", "e4m3"),
    ("i8", "e4m3"),
    ("i8", "f16"),
    ("i8", "bf16"),
    ("bf16", "bf16"),
    ("f16", "f16"),
    ("tf32", "tf32"),
    ("f32", "f32"),
)
"""Operand formats of Q·Kᵀ and P·V that are considered, cheapest first on most machines."""
LONG_GROUPS = 40
"""Groups that a sequence must have before larger ones are taken, where both are offered."""


def format_pairs(shape: HeadStats, context: PolicyContext) -> Iterator[tuple[str, str]]:
    """Format pairs that the backend runs and that save time on heads like this, there.

    Pairs with 8 bits only where heads are measured: their errors differ from head to head,
    and theorems say too little of them to try them first.
    """
    capabilities, costs = context.capabilities, context.costs
    widest = context.exact_format
    usual = math.inf
    if costs.runs(widest, widest):
        usual = costs.dense_cost(shape, widest, widest)
    for qk, pv in FORMAT_PAIRS:
        known = qk in capabilities.qk_formats and pv in capabilities.pv_formats
        narrow = get_format(qk).is_quantised or get_format(pv).is_quantised
        known = known and (context.measures or not narrow)
        known = known and costs.runs(qk, pv) and (qk, pv) != (widest, widest)
        if known and costs.dense_cost(shape, qk, pv) < usual:
            yield qk, pv
    yield widest, widest


def landmark_of(tau: float, context: PolicyContext) -> Landmark:
    """Landmarks that suit the target: clusters where gathers are cheap, else a screen."""
    offered = [s for s in context.capabilities.sizes if isinstance(s, Landmark)]
    if offered:
        # A group's probe is shared by its rows: the longer the keys, the larger the groups.
        longest = max((s.len_kv for s in context.shapes.values()), default=1)
        offered.sort(key=lambda s: s.group)
        fitting_ones = [s for s in offered if LONG_GROUPS * s.group <= longest]
        return replace((fitting_ones or offered[:1])[-1], tau=tau)
    if context.costs.gathers_single_keys:
        return Landmark(tau=tau, band=192, clusters=8, samples=64, tail=64, screen_rank=0)
    return Landmark(tau=tau)


def score_skip_of(lam: float, context: PolicyContext) -> ScoreSkip:
    """Score-then-skip with tiles that suit the target: single keys where gathers are cheap."""
    for sizes in context.capabilities.sizes:
        if isinstance(sizes, ScoreSkip):
            return replace(sizes, lam=lam)
    if context.costs.gathers_single_keys:
        return ScoreSkip(lam=lam, tile_q=256, tile_kv=1)
    return ScoreSkip(lam=lam, tile_kv=64)
