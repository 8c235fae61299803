"""What theorems charge a head by its plan and lengths alone: constants per kind of head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from adaattn_core import bounds
from adaattn_core.bounds.accumulate import F32_UNIT, F64_UNIT, SCORE_ROUNDINGS
from adaattn_core.bounds.probabilistic import ROUNDING_BIAS
from adaattn_core.bounds.rounding import add_up, div_up, mul_up, sub_down, up
from adaattn_core.errors import ArgumentError
from adaattn_core.facts import Arithmetic, FactsTable
from adaattn_core.formats import get_format
from adaattn_core.plan import HeadPlan
from adaattn_core.structure import BlockSparse, Landmark, ScoreSkip

STEP_KEYS = 64
"""Fewest keys of a step of a streaming softmax that says nothing of its steps."""
CAP_ROUNDINGS = 4
"""Of a softcap: the rate, its product with a score, the cap's with the tanh, and a spare."""
SINK_ROUNDINGS = 8
"""Where a sink meets a row: its own scaling, the difference of two exponents, the exponential,
the sum, and what the row's log-sum-exp was rounded to."""
SPARE_ROUNDINGS = 12
"""Roundings per path besides the sum itself: casts of both operands to the working precision,
the mean key, scaling and unscaling of both 8-bit operands, the softmax scale, the division by
the normaliser; the rest is slack."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the theorems, and the sizes that all heads share.

    Attributes
    ----------
    dim_qk, dim_v : int
        Length of a query or key, and of a value.
    scale : float
        Factor on the scores, > 0.
    dtype : str
        Format of the returned output.
    guarantee : {"worst_case", "probabilistic"}
        ``"probabilistic"`` uses the random bits of stochastically rounded queries and keys;
        where that is no better (or nothing was rounded so) the worst case is returned, which is
        stronger.
    confidence : float
        In (0, 1), of the probabilistic bound.
    softcap : float
        What scores are capped to; 0 for no cap.
    sinks : bool
        Whether rows have a sink in their denominator.

    Raises
    ------
    ArgumentError
        If `guarantee` is another word.
    """

    dim_qk: int
    dim_v: int
    scale: float
    dtype: str
    guarantee: str = "worst_case"
    confidence: float = 0.95
    softcap: float = 0.0
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.guarantee not in ("worst_case", "probabilistic"):
            raise ArgumentError(
                got=f"guarantee={self.guarantee!r}",
                needed="worst_case or probabilistic",
                do="use sampled_certificate for a sampled guarantee",
            )


@dataclass(frozen=True, slots=True)
class Charges:
    """Constants of a head, or of several heads as arrays; every number is rounded outward.

    Attributes
    ----------
    nothing : bool
        Whether no row sees a key: what is returned is 0, exactly.
    pooled : bool
        Whether columns stand for keys, which no theorem bounds.
    cast, cast_lost : bool, float
        Whether float64 input was cast to float32, and what a value may have lost at its lower
        end.
    at_random : bool
        Whether operands of Q·Kᵀ were rounded at random, and a probabilistic bound is asked for.
    deviation, bias : float
        Theorem 9: factors on the root of the summed squares of ``norm * step``, and on their
        sum.
    score : float
        Relative error of a score's sum of products.
    score_lost : float
        What products and scores lose by underflow, per unit of norm.
    score_rounding : float
        Lemma 7.2, relative to the largest score.
    score_limit : float
        Scores of this size might overflow on the way.
    exponentials : float
        Lemma 7.3: errors of all exponentials of a weight, as a score error.
    weights : float
        Theorem 3: error from rounded weights, relative to the largest value.
    sums : float
        Lemma 7.4: error of numerator and normaliser, relative to the largest value.
    sums_lost : float
        What weights and sums lose by underflow, per unit of value.
    store, store_lost : float
        Rounding of a returned row to its format, relative and absolute.
    root_dim_qk, root_dim_v : float
    cap_rounding, tanh_rel, tanh_abs : float
        Lemma 12.2: roundings around a softcap's tanh, relative to the largest score; of the
        tanh itself, relative to a score and to the cap.
    sink_rounding, sink_keys : float
        Lemma 12.4: roundings where a sink meets a row's sum, relative to the largest score and
        the sink; and what the sum's own logarithm, at most that of the keys, adds to both.
    """

    nothing: Any
    pooled: Any
    cast: Any
    cast_lost: Any
    at_random: Any
    deviation: Any
    bias: Any
    score: Any
    score_lost: Any
    score_rounding: Any
    score_limit: Any
    exponentials: Any
    weights: Any
    sums: Any
    sums_lost: Any
    store: Any
    store_lost: Any
    root_dim_qk: Any
    root_dim_v: Any
    cap_rounding: Any
    tanh_rel: Any
    tanh_abs: Any
    sink_rounding: Any
    sink_keys: Any


def charges_of(
    facts: FactsTable, plans: Sequence[HeadPlan], len_q: Sequence[int], question: Question
) -> Charges:
    """Return the charges of the table's heads: scalars where all are of one kind."""
    keys_max: list[int] = facts.columns["keys_max"].tolist()
    kinds: dict[tuple[int, ...], int] = {}
    found: list[Charges] = []
    which: list[int] = []
    for plan, said, keys, rows in zip(plans, facts.arithmetic, keys_max, len_q, strict=True):
        key = id(plan), id(said), keys, rows
        number = kinds.get(key)
        if number is None:
            number = kinds[key] = len(found)
            found.append(_charges(_without_blocks(plan), said, keys, rows, question))
        which.append(number)
    if not found:
        return _charges(HeadPlan(), Arithmetic(), 0, 0, question)
    if len(found) == 1:
        return found[0]
    return Charges(
        **{
            f.name: np.array([getattr(kind, f.name) for kind in found])[which]
            for f in fields(Charges)
        }
    )


def _without_blocks(plan: HeadPlan) -> HeadPlan:
    """Leave out given blocks: no charge depends on them, and a long list is not to be kept."""
    if isinstance(plan.structure, BlockSparse) and plan.structure.blocks is not None:
        return replace(plan, structure=BlockSparse())
    return plan


@lru_cache(maxsize=4096)
def _charges(
    plan: HeadPlan, said: Arithmetic, keys: int, len_q: int, question: Question
) -> Charges:
    dim_qk, dim_v, scale = question.dim_qk, question.dim_v, question.scale
    wide = plan.qk == plan.pv == "f64"
    info = get_format("f64" if wide else "f32")
    unit, tiny = F64_UNIT if wide else F32_UNIT, info.smallest_normal
    steps = math.ceil(keys / _step_keys(plan, said)) + 1
    # Roundings on the longest path of a sum over the keys.
    path = (min(keys, said.sum_keys_max) if said.sum_keys_max else keys) + (
        2 * steps + SPARE_ROUNDINGS + (SINK_ROUNDINGS if question.sinks else 0)
    )
    normaliser = bounds.gamma_nearest(path, unit)
    kept = sub_down(1.0, normaliser)
    one_exp = said.exp_rel_upper
    root_dim_v = float(up(math.sqrt(dim_v)))
    deviation, bias = _at_random(plan, keys, len_q, question)
    stored = get_format(question.dtype)
    narrower = stored.unit_roundoff > unit
    return Charges(
        nothing=np.bool_(len_q == 0 or keys == 0),
        pooled=np.bool_(isinstance(plan.structure, Landmark)),
        cast=np.bool_(question.dtype == "f64" and not wide),
        cast_lost=float(mul_up(get_format("f32").smallest_normal, root_dim_v)),
        at_random=np.bool_(deviation > 0),
        deviation=deviation,
        bias=bias,
        score=said.score_rel_upper
        if said.score_rel_upper is not None
        else bounds.product_sum_error(dim_qk + SPARE_ROUNDINGS, plan.qk),
        score_lost=float(mul_up(2.0 * (dim_qk + SPARE_ROUNDINGS) * tiny, add_up(1.0, scale))),
        score_rounding=bounds.gamma_nearest(SCORE_ROUNDINGS, unit),
        score_limit=info.max_finite / 4,
        exponentials=bounds.exp_score_error(
            steps, bounds.library_exp_error(unit) if one_exp is None else one_exp
        ),
        weights=_weights(plan, keys),
        sums=float(mul_up(_sums(plan, said, path, normaliser), _weighed(plan, keys))),
        sums_lost=float(
            div_up(mul_up(4.0 * (keys + SPARE_ROUNDINGS) * (steps + 2), tiny), kept)
        ),
        store=stored.unit_roundoff if narrower else 0.0,
        store_lost=bounds.storing_error(question.dtype, 0.0, dim_v) if narrower else 0.0,
        root_dim_qk=float(up(math.sqrt(dim_qk))),
        root_dim_v=root_dim_v,
        cap_rounding=bounds.gamma_nearest(CAP_ROUNDINGS, unit) if question.softcap else 0.0,
        tanh_rel=bounds.library_exp_error(unit)
        if question.softcap and said.tanh_upper is None
        else 0.0,
        tanh_abs=(said.tanh_upper or 0.0) if question.softcap else 0.0,
        sink_rounding=bounds.gamma_nearest(SINK_ROUNDINGS, unit) if question.sinks else 0.0,
        sink_keys=float(up(math.log(keys + 1))),
    )


def _step_keys(plan: HeadPlan, said: Arithmetic) -> int:
    """Fewest keys of a step of the streaming softmax."""
    if said.step_keys:
        return said.step_keys
    if isinstance(plan.structure, ScoreSkip):
        return min(STEP_KEYS, plan.structure.tile_kv)
    return STEP_KEYS


def _sums(plan: HeadPlan, said: Arithmetic, path: int, normaliser: float) -> float:
    """Lemma 7.4: numerator and normaliser, relative to the weights as computed."""
    numerator = said.sum_rel_upper
    if numerator is None:
        flush = plan.flush_keys if plan.flush_keys > 0 else None
        numerator = bounds.product_sum_error(path, plan.pv, flush)
    numerator = max(numerator, normaliser)
    return float(div_up(add_up(numerator, normaliser), sub_down(1.0, normaliser)))


def _weighed(plan: HeadPlan, keys: int) -> float:
    """Bound what rounded weights weigh, where exact ones weigh 1."""
    rounding = _weight_rounding(plan)
    return float(add_up(1.0, rounding.relative, mul_up(keys, rounding.absolute)))


def _weights(plan: HeadPlan, keys: int) -> float:
    """Theorem 3: weights rounded to the format of P·V; none where they already have it."""
    if plan.pv == "f64" or (plan.pv == "f32" and plan.qk != "f64"):
        return 0.0
    return float(bounds.rounded_weights_error(_weight_rounding(plan), keys, 1.0))


def _weight_rounding(plan: HeadPlan) -> bounds.WeightRounding:
    """Describe the rounding of a weight; i8 codes end at 127, and so does their scale."""
    p_scale = min(plan.p_scale, 127.0) if plan.pv == "i8" else plan.p_scale
    return bounds.weight_rounding(plan.pv, p_scale)


def _at_random(
    plan: HeadPlan, keys: int, len_q: int, question: Question
) -> tuple[float, float]:
    """Factors of theorem 9; 0 where it is not asked for or nothing is rounded at random."""
    if question.guarantee != "probabilistic" or plan.rounding != "stochastic":
        return 0.0, 0.0
    t = bounds.deviation_factor(len_q * keys, question.confidence)
    return float(mul_up(0.5, t)), float(mul_up(ROUNDING_BIAS, up(math.sqrt(question.dim_qk))))
