"""Cost models: what an operation costs on a machine, as data: a laptop can plan for an H100."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from adaattn_core.checks import shown
from adaattn_core.errors import ArgumentError
from adaattn_core.formats import get_format
from adaattn_core.plan import HeadPlan
from adaattn_core.stats import HeadStats
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, ScoreSkip, Structure


@dataclass(frozen=True, slots=True)
class CostModel:
    """Rates of one machine; a predicted cost is the time of one head in seconds.

    Attributes
    ----------
    name : str
    flops : mapping of str to float
        Sustained rate of Q·Kᵀ and P·V by operand format, in floating point operations a second.
        A format that is missing cannot be run there.
    softmax_rate : float
        Scores per second through maximum, exponential and sum.
    overlap : bool
        Whether softmax and products run at the same time or one after the other.
    gathers_single_keys : bool
        Whether keys are as cheap to gather one by one (CPU) as in tiles of neighbours (GPU).
    efficiency : mapping of str to float
        Share of these rates that a structure's gathers and small tiles leave, by kind, and
        that single probe and certificate rows (``"rows"``) reach.
    head_seconds : float
        Fixed time of measuring a head beyond the rows it computes.
    key_seconds : float
        Time of measuring a head for each of its keys of 64 + 64 elements: gathers and pools.
    call_seconds : float
        Fixed time of measuring, deciding and certifying a call, which its heads share.
    quantise_rate : float
        Numbers per second that become 8-bit operands; inf where nothing is made beforehand.
    rows_format : str
        Format in which probe and certificate rows are computed there.
    source : str
        Where the figures come from.
    """

    name: str
    flops: Mapping[str, float]
    softmax_rate: float
    overlap: bool
    gathers_single_keys: bool
    efficiency: Mapping[str, float] = field(default_factory=dict)
    head_seconds: float = 0.0
    key_seconds: float = 0.0
    call_seconds: float = 0.0
    quantise_rate: float = math.inf
    rows_format: str = "f32"
    source: str = ""

    def runs(self, qk: str, pv: str) -> bool:
        """Whether the machine has both formats."""
        return qk in self.flops and pv in self.flops

    def scores_seconds(
        self, qk_scores: float, pv_scores: float, dim_qk: float, dim_v: float, qk: str, pv: str
    ) -> float:
        """Time of computing `qk_scores` scores and using `pv_scores` of them."""
        products = (
            2 * qk_scores * dim_qk / self.flops[qk] + 2 * pv_scores * dim_v / self.flops[pv]
        )
        softmax = pv_scores / self.softmax_rate
        return max(products, softmax) if self.overlap else products + softmax

    def head_cost(
        self, stats: HeadStats, plan: HeadPlan, share: float, *, measured: bool = False
    ) -> float:
        """Predicted seconds of one head: the plan, and what it takes to measure and certify it.

        Parameters
        ----------
        share : float
            Share of the visible scores that enter the softmax.
        measured : bool
            Whether the head has been measured already, so that this costs nothing more.
        """
        n, d, dv = float(stats.visible), float(stats.dim_qk), float(stats.dim_v)
        structure, kind = plan.structure, plan.structure.kind
        rate = self.efficiency.get(kind, 1.0)
        if isinstance(structure, ScoreSkip):
            seconds = self.scores_seconds(n, share * n, d, dv, plan.qk, plan.pv)
        elif isinstance(structure, LowRank):
            seconds = self.scores_seconds(n, n, structure.rank, dv, plan.qk, plan.pv)
        else:
            seconds = self.scores_seconds(share * n, share * n, d, dv, plan.qk, plan.pv)
        seconds = seconds / rate + self.quantise_seconds(stats, plan)
        return seconds + self.extra_seconds(stats, structure, measured=measured)

    def quantise_seconds(self, stats: HeadStats, plan: HeadPlan) -> float:
        """Time of making 8-bit operands, as if no other head shared the keys."""
        numbers = 0
        if get_format(plan.qk).is_quantised:
            numbers += (stats.len_q + stats.len_kv) * stats.dim_qk
        if get_format(plan.pv).is_quantised:
            numbers += stats.len_kv * stats.dim_v
        return numbers / self.quantise_rate

    def extra_seconds(
        self, stats: HeadStats, structure: Structure, *, measured: bool = False
    ) -> float:
        """Time of probe rows, pools and certificate rows of a sampled structure."""
        if not isinstance(structure, Landmark | BlockSparse | ScoreSkip):
            return 0.0
        n, d, dv = float(stats.visible), float(stats.dim_qk), float(stats.dim_v)
        share = 0.0 if isinstance(structure, ScoreSkip) else structure.samples / structure.group
        certify = min(CERTIFY_ROWS / max(stats.len_q, 1), 1.0)
        rows = n * (certify if measured else certify + min(share, 1.0))
        wide = self.rows_format
        seconds = self.scores_seconds(rows, rows, d, dv, wide, wide)
        keys = stats.len_kv * (d + dv) / 128
        fixed = 0.0 if measured else self.head_seconds + keys * self.key_seconds
        return fixed + seconds / self.efficiency.get("rows", 1.0)

    def certify_seconds(self, stats: HeadStats) -> float:
        """Time of the exact rows that a sampled certificate compares a head with."""
        rows = float(stats.visible) * min(CERTIFY_ROWS / max(stats.len_q, 1), 1.0)
        wide, dims = self.rows_format, (float(stats.dim_qk), float(stats.dim_v))
        seconds = self.scores_seconds(rows, rows, *dims, wide, wide)
        return seconds / self.efficiency.get("rows", 1.0)

    def dense_cost(self, stats: HeadStats, qk: str = "f32", pv: str = "f32") -> float:
        """Predicted seconds of the dense head."""
        return self.head_cost(stats, _dense(qk, pv), 1.0)


@cache
def _dense(qk: str, pv: str) -> HeadPlan:
    """Return one plan per pair of formats: plans are checked when made, and prices are many."""
    return HeadPlan(structure=Dense(), qk=qk, pv=pv)


CERTIFY_ROWS = 300
"""Rows that a sampled certificate typically evaluates (for cost prediction only)."""

COST_MODELS: dict[str, CostModel] = {
    model.name: model
    for model in (
        CostModel(
            name="cpu",
            # Emulated formats multiply in float32 after rounding: never cheaper than f32.
            flops={
                "f64": 3.5e10,
                "f32": 7.5e10,
                "tf32": 6e10,
                "f16": 5e10,
                "bf16": 5e10,
                "i8": 4e10,
                "e4m3": 1e10,
            },
            softmax_rate=6e8,
            overlap=False,
            gathers_single_keys=True,
            efficiency={
                "landmark": 0.55,
                "block_sparse": 0.5,
                "score_skip": 0.55,
                "rows": 0.55,
            },
            head_seconds=1.2e-2,
            source="one Xeon core, NumPy 2.4, OpenBLAS: f32, softmax and efficiencies fitted to"
            " timed heads of 8,192 tokens; f64 and emulated formats assumed",
        ),
        CostModel(
            name="torch_cpu",
            # PyTorch's fused kernel on two cores; 16-bit formats gain nothing without AMX.
            flops={"f64": 5.8e10, "f32": 1.9e11, "f16": 1.85e11, "bf16": 1.85e11},
            softmax_rate=1.75e9,
            overlap=False,
            gathers_single_keys=True,
            efficiency={"landmark": 0.55, "rows": 0.35},
            head_seconds=3e-3,
            key_seconds=2.5e-7,
            source="two cores of an AMD EPYC (AVX-512), PyTorch 2.13: dense in four formats"
            " timed; efficiencies fitted to landmark heads of 8,192 to 32,768 tokens",
        ),
        CostModel(
            name="sm90",
            flops={
                "f32": 6.2e13,
                "tf32": 1.17e14,
                "f16": 6.2e14,
                "bf16": 6.2e14,
                "i8": 7.9e14,
                "e4m3": 7.9e14,
            },
            softmax_rate=2.4e12,
            overlap=True,
            gathers_single_keys=False,
            efficiency={
                "landmark": 0.6,
                "block_sparse": 0.9,
                "score_skip": 0.85,
                "rows": 0.6,
            },
            head_seconds=2e-6,
            key_seconds=1e-9,
            call_seconds=2.5e-4,
            quantise_rate=1e12,
            rows_format="bf16",
            source="H100, as measured with this project's kernels: all formats at head dim 128,"
            " 4,096 keys, 8-bit ones without quantisation, which has its own rate;"
            " softmax_rate from 8 bits at dim 64; landmarks and planning fitted to stages of"
            " heads of dim 64, 8k to 128k; the other efficiencies assumed",
        ),
        CostModel(
            name="sm80",
            flops={
                "f32": 4.5e13,
                "tf32": 1e14,
                "f16": 2e14,
                "bf16": 2e14,
                "i8": 3.8e14,
            },
            softmax_rate=2.4e12,
            overlap=False,
            gathers_single_keys=False,
            efficiency={
                "landmark": 0.75,
                "block_sparse": 0.9,
                "score_skip": 0.85,
                "rows": 0.6,
            },
            head_seconds=2e-6,
            rows_format="bf16",
            source="A100: assumed, about 65% of nominal rates; nothing measured",
        ),
    )
}


def get_cost_model(name: str) -> CostModel:
    """Return the cost model of a target.

    Raises
    ------
    ArgumentError
        If there is no such target.
    """
    if not isinstance(name, str) or name not in COST_MODELS:
        raise ArgumentError(
            got=f"target {shown(name)}",
            needed=f"one of {', '.join(COST_MODELS)}",
            do="leave the target out to plan for the machine that runs",
        )
    return COST_MODELS[name]
