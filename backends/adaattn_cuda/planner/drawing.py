"""Rows that certify: how many, which of their errors counts; how many landmarks may pay."""

from __future__ import annotations

import math

import numpy as np

from adaattn_core import bounds
from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.theorem import theorem_certificate
from adaattn_core.facts import RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_core.policies.table import DecisionTable
from adaattn_cuda.facts import REPAIR_STEP_KEYS, kernel_arithmetic
from adaattn_cuda.planner.specs import ROWS_MAX
from adaattn_cuda.work.far import FarTables
from adaattn_cuda.work.far_geometry import TILE, FarGeometry

__all__ = [
    "certifying_orders",
    "certifying_rows",
    "most_landmarks",
    "oracle_factors",
    "theorem_factors",
]

_TILE_ROWS, _FEW_ROWS, _LONG = 128, 256, 16_384
_FIRST_SHARES = (0.9, 0.5)


def certifying_rows(len_q: int, budget: ErrorBudget, *, retried: bool) -> int | None:
    """Return how many rows of a head are drawn to certify it; None if even the most are few.

    The more there are, the nearer the certified quantile is to the budget's, and the less must
    be kept: 128 rows certify the 99% quantile where 95% of the rows are asked for, 256 the 98%,
    512 the 97%. They cost as much of dense attention as they are of its rows, so a short head
    draws fewer; where nothing is planned, dense passes by far with one tile of them.
    """
    least = _TILE_ROWS if not retried else ROWS_MAX if len_q >= _LONG else _FEW_ROWS
    counts = [count for count in (_TILE_ROWS, _FEW_ROWS, ROWS_MAX) if count >= least]
    for count in counts:
        if certifying_orders(count, budget, retried=retried):
            return count
    return None


def certifying_orders(
    drawn: int, budget: ErrorBudget, *, retried: bool
) -> tuple[int, ...] | None:
    """Return which of the sorted errors counts, for each output that is tested on the rows.

    Where a head that fails runs again and is tested on the same rows, both sentences must hold
    together: the failures allowed are split between them. The second output is dense and passes
    by far, so it gets the smaller part where the rows suffice for that. None if they do not.
    """
    failing = 1 - budget.confidence
    for first in _FIRST_SHARES if retried else (1.0,):
        shares = (first, 1 - first) if retried else (first,)
        orders = [
            bounds.order_statistic(drawn, budget.rows, 1 - share * failing) for share in shares
        ]
        if None not in orders:
            return tuple(order for order in orders if order is not None)
    return None


def most_landmarks(table: DecisionTable, tables: FarTables) -> float:
    """Return the landmarks of a far tile, in the mean, at which no candidate pays any more.

    As `far_decide` prices a level: near fields, pools and landmarks over the tiles of dense.
    """
    shares = [(table.worthwhile - c.fixed) / max(c.slope, 1e-6) for c in table.candidates]
    tiles = max(shares, default=0.0) * tables.dense_tiles - tables.near_tiles
    most = tiles * TILE / max(tables.far_tiles, 1.0)
    return min(max(most, 0.0), float(np.finfo(np.float32).max))


def oracle_factors(g: FarGeometry, split_keys: int, scale: float) -> tuple[float, float]:
    """Return what an exact row may err by: its sums over |v|, its scores over |q| |k|.

    As `adaattn_cuda.facts` charges the kernels, with weights of two 16-bit parts: 2^-16.
    """
    truncation = 2.0**-22
    sums = (split_keys / 8 + 16) * truncation + 2.0**-16 + 2.0**-20
    return sums, (g.dim_qk / 8 + 8) * truncation * scale


def theorem_factors(g: FarGeometry, dtype: str, scale: float) -> tuple[float, float, float]:
    """Return what a dense row errs by: a |v| + b |v| |q| |k| + c, of the largest norms.

    The theorem of a dense head (theorem 8) is that at most, wherever norms lie below 1e12: it
    is asked at three points. Scores enter it by tanh(x / 2) <= x / 2 of something linear, and
    norms alone, beside their product, by what underflow costs.
    """
    plan = HeadPlan(qk=dtype, pv=dtype)
    said = kernel_arithmetic(dtype, dtype, g.dim_qk, g.len_kv, REPAIR_STEP_KEYS)
    subnormal = 2.0**-126 * math.sqrt(max(g.dim_qk, g.dim_v))

    def error(value: float, norm: float) -> float:
        facts = RunFacts(
            keys_max=g.len_kv, query_norm_upper=norm, key_norm_upper=norm,
            value_norm_upper=value, query_residual_upper=subnormal,
            key_residual_upper=subnormal, value_residual_upper=subnormal,
            value_diameter_upper=2 * value, score_residual_upper=0.0, dropped_mass_upper=0.0,
            bias_max_abs=0.0, sink_abs=0.0, arithmetic=said, output_rms=1.0,
        )  # fmt: skip
        question = {"dim_qk": g.dim_qk, "dim_v": g.dim_v, "scale": scale, "dtype": dtype}
        return theorem_certificate(facts, plan, len_q=g.len_q, **question).upper

    lost = error(2.0**-60, 0.0)
    still, moved = error(1.0, 0.0), error(1.0, 1.0)
    slack = 1e-18  # of underflow in scores, whose operands are as large as 1e12 here
    return still + slack, (moved - still) * (1 + 1e-6), lost
