"""Certificates from theorems: facts of a run in, one sentence per head out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from adaattn_core import bounds
from adaattn_core.bounds.accumulate import F32_UNIT, F64_UNIT
from adaattn_core.bounds.rounding import add_up, div_up, mul_up, sub_down, up
from adaattn_core.certificates.data import HeadCertificate
from adaattn_core.errors import ArgumentError
from adaattn_core.facts import RunFacts
from adaattn_core.formats import get_format
from adaattn_core.plan import HeadPlan
from adaattn_core.structure import Landmark, ScoreSkip

STEP_KEYS = 64
"""Fewest keys of a step of a streaming softmax that says nothing of its steps."""
SPARE_ROUNDINGS = 12
"""Roundings per path besides the sum itself: casts of both operands to the working precision,
the mean key, scaling and unscaling of both 8-bit operands, the softmax scale, the division by
the normaliser; the rest is slack."""


@dataclass(frozen=True, slots=True)
class _Charges:
    """What the arithmetic of a run is charged with: as stated, else for any executor.

    Attributes
    ----------
    unit, tiny, largest : float
        Unit roundoff, smallest normal and largest number of scores and sums.
    steps : int
        Steps of the streaming softmax.
    path : int
        Roundings on the longest path of a sum over the keys.
    score, sums, exponentials : float
        Relative errors of a score's sum of products and of a sum over the keys; error of all
        exponentials of a weight, as a score error.
    """

    unit: float
    tiny: float
    largest: float
    steps: int
    path: int
    score: float
    sums: float
    exponentials: float

    @classmethod
    def of(cls, facts: RunFacts, plan: HeadPlan, dim_qk: int) -> _Charges:
        said = facts.arithmetic
        step = said.step_keys or STEP_KEYS
        if not said.step_keys and isinstance(plan.structure, ScoreSkip):
            step = min(step, plan.structure.tile_kv)
        steps = math.ceil(facts.keys_max / step) + 1
        wide = plan.qk == plan.pv == "f64"
        info = get_format("f64" if wide else "f32")
        unit = F64_UNIT if wide else F32_UNIT
        keys = facts.keys_max
        summed = min(keys, said.sum_keys_max) if said.sum_keys_max else keys
        path = summed + 2 * steps + SPARE_ROUNDINGS
        score, sums, one = said.score_rel_upper, said.sum_rel_upper, said.exp_rel_upper
        if score is None:
            score = bounds.product_sum_error(dim_qk + SPARE_ROUNDINGS, plan.qk)
        if sums is None:
            flush = plan.flush_keys if plan.flush_keys > 0 else None
            sums = bounds.product_sum_error(path, plan.pv, flush)
        if one is None:
            one = bounds.library_exp_error(unit)
        return cls(
            unit=unit,
            tiny=info.smallest_normal,
            largest=info.max_finite,
            steps=steps,
            path=path,
            score=score,
            sums=max(sums, bounds.gamma_nearest(path, unit)),
            exponentials=bounds.exp_score_error(steps, one),
        )


def theorem_certificate(
    facts: RunFacts,
    plan: HeadPlan,
    *,
    dim_qk: int,
    dim_v: int,
    scale: float,
    dtype: str,
    len_q: int,
    guarantee: str = "worst_case",
    confidence: float = 0.95,
) -> HeadCertificate:
    """Certify a head by theorems alone: every row, whatever the input.

    Parameters
    ----------
    facts : RunFacts
        What the run found out; its norms and residuals are upper bounds.
    plan : HeadPlan
        How the head was computed.
    dim_qk, dim_v : int
        Length of a query or key, and of a value.
    scale : float
        Factor on the scores, > 0.
    dtype : str
        Format of the returned output.
    len_q : int
        Query rows; a probabilistic statement covers ``len_q * facts.keys_max`` scores at once.
    guarantee : {"worst_case", "probabilistic"}
        ``"probabilistic"`` uses the random bits of stochastically rounded queries and keys;
        where that is no better (or nothing was rounded so) the worst case is returned, which is
        stronger.
    confidence : float
        In (0, 1), of the probabilistic bound.

    Returns
    -------
    HeadCertificate
        ``upper`` in multiples of the rms output row, with its terms ``qk_rounding``,
        ``pv_rounding``, ``v_rounding``, ``accumulation``, ``structure``, ``output``; inf where
        a term is unbounded, the output is not finite, or its rms is 0 while the bound is not.

    Raises
    ------
    ArgumentError
        If `guarantee` is another word, or `confidence` is not in (0, 1) where it is used.

    References
    ----------
    This project, docs/math/08-composition.md, theorem 8, which states the computation covered.
    """
    if guarantee not in ("worst_case", "probabilistic"):
        raise ArgumentError(
            got=f"guarantee={guarantee!r}",
            needed="worst_case or probabilistic",
            do="use sampled_certificate for a sampled guarantee",
        )
    if len_q == 0 or facts.keys_max == 0:
        return HeadCertificate("worst_case", 0.0, 1.0, 1.0, terms=_no_terms())

    cast = dtype == "f64" and not plan.qk == plan.pv == "f64"
    if cast:
        facts = _of_exact_input(facts, dim_v)
    worst = _operand_score_error(facts, scale)
    score_error, proved, sure = worst, "worst_case", 1.0
    if guarantee == "probabilistic" and plan.rounding == "stochastic":
        likely = bounds.stochastic_score_error(
            scale,
            facts.query_norm_upper,
            facts.key_norm_upper,
            facts.query_step_upper,
            facts.key_step_upper,
            dim=dim_qk,
            pairs=len_q * facts.keys_max,
            confidence=confidence,
        )
        better = bounds.total_variation(likely) < bounds.total_variation(worst)
        if _rounded_at_random(facts) and better:
            score_error, proved, sure = likely, "probabilistic", confidence

    diameter = float(bounds.value_diameter(facts.value_norm_upper, facts.value_diameter_upper))
    value_norm = float(add_up(facts.value_norm_upper, facts.value_residual_upper))
    charges = _Charges.of(facts, plan, dim_qk)
    absolute = {
        "qk_rounding": float(bounds.output_error(score_error, diameter)),
        "pv_rounding": _weights_error(facts, plan, value_norm),
        "v_rounding": float(
            bounds.rounded_values_error(
                facts.value_residual_upper, F32_UNIT if cast else 0.0, value_norm
            )
        ),
        "accumulation": _accumulation_error(
            facts, plan, charges, dim_qk, dim_v, scale, diameter, value_norm
        ),
        "structure": _structure_error(facts, plan, diameter),
    }
    # A returned row is a convex combination of values up to these three errors alone.
    moved = add_up(*(absolute[name] for name in ("pv_rounding", "v_rounding", "accumulation")))
    row_norm = float(add_up(value_norm, moved))
    absolute["output"] = _output_error(charges, dtype, dim_v, row_norm)
    terms = bounds.relative_terms(absolute, facts.output_rms)
    upper = math.inf if facts.nonfinite else bounds.compose(terms)
    return HeadCertificate(
        proved, upper, rows=1.0, confidence=sure, terms=terms, nonfinite=facts.nonfinite
    )


def _no_terms() -> dict[str, float]:
    names = ("qk_rounding", "pv_rounding", "v_rounding", "accumulation", "structure", "output")
    return dict.fromkeys(names, 0.0)


def _of_exact_input(facts: RunFacts, dim_v: int) -> RunFacts:
    """Widen facts measured on float32 casts so that they hold for the float64 input."""
    growth = 1.0 + 2.0**-22
    # A float64 below float32's normal numbers may have become zero, unseen by the facts.
    lost = float(mul_up(get_format("f32").smallest_normal, up(math.sqrt(dim_v))))
    # Rounding moves two values apart by a unit of each, however close they are.
    moved = add_up(mul_up(2.0**-22, facts.value_norm_upper), 2.0 * lost)
    return replace(
        facts,
        query_norm_upper=float(mul_up(facts.query_norm_upper, growth)),
        key_norm_upper=float(mul_up(facts.key_norm_upper, growth)),
        value_norm_upper=float(add_up(mul_up(facts.value_norm_upper, growth), lost)),
        value_residual_upper=float(add_up(facts.value_residual_upper, lost)),
        value_diameter_upper=float(add_up(mul_up(facts.value_diameter_upper, growth), moved)),
    )


def _operand_score_error(facts: RunFacts, scale: float) -> float:
    """Theorem 2 for the worst query and key."""
    return float(
        bounds.score_error(
            scale,
            facts.query_norm_upper,
            facts.key_norm_upper,
            facts.query_residual_upper,
            facts.key_residual_upper,
        )
    )


def _rounded_at_random(facts: RunFacts) -> bool:
    """Whether each operand's residual comes from a rounding whose step is known."""
    query = facts.query_step_upper > 0 or facts.query_residual_upper == 0
    key = facts.key_step_upper > 0 or facts.key_residual_upper == 0
    return query and key


def _weights_error(facts: RunFacts, plan: HeadPlan, value_norm: float) -> float:
    """Theorem 3: weights rounded to the format of P·V; none where they already have it."""
    if plan.pv == "f64" or (plan.pv == "f32" and plan.qk != "f64"):
        return 0.0
    return float(
        bounds.rounded_weights_error(_weight_rounding(plan), facts.keys_max, value_norm)
    )


def _weight_rounding(plan: HeadPlan) -> bounds.WeightRounding:
    """Describe the rounding of a weight; i8 codes end at 127, and so does their scale."""
    p_scale = min(plan.p_scale, 127.0) if plan.pv == "i8" else plan.p_scale
    return bounds.weight_rounding(plan.pv, p_scale)


def _accumulation_error(
    facts: RunFacts,
    plan: HeadPlan,
    charges: _Charges,
    dim_qk: int,
    dim_v: int,
    scale: float,
    diameter: float,
    value_norm: float,
) -> float:
    """Theorem 7: everything that the arithmetic itself adds, scores and sums."""
    if value_norm == 0:
        return 0.0
    query_norm = add_up(facts.query_norm_upper, facts.query_residual_upper)
    key_norm = add_up(facts.key_norm_upper, facts.key_residual_upper)
    product = mul_up(query_norm, key_norm)
    reach = add_up(mul_up(product, max(1.0, scale)), facts.bias_max_abs)
    if not float(mul_up(4.0, reach)) < charges.largest:
        return math.inf
    dot = mul_up(charges.score, scale, product)
    dot_underflow = mul_up(
        2.0 * (dim_qk + SPARE_ROUNDINGS) * charges.tiny,
        add_up(1.0, scale),
        add_up(1.0, query_norm, key_norm),
    )
    score_max = add_up(mul_up(scale, product), dot, dot_underflow, facts.bias_max_abs)
    score_error = add_up(
        dot,
        dot_underflow,
        bounds.score_rounding(float(score_max), charges.unit),
        charges.exponentials,
    )

    keys = facts.keys_max
    normaliser = bounds.gamma_nearest(charges.path, charges.unit)
    weights = _weight_rounding(plan)
    # Rounded weights may weigh more than the exact ones that the sums are measured against.
    weighed = add_up(1.0, weights.relative, mul_up(keys, weights.absolute))
    relative = div_up(add_up(charges.sums, normaliser), sub_down(1.0, normaliser))
    sums = mul_up(relative, weighed, value_norm)
    lost = mul_up(
        4.0 * (keys + SPARE_ROUNDINGS) * (charges.steps + 2) * charges.tiny,
        add_up(value_norm, up(math.sqrt(dim_v))),
    )
    underflow = div_up(lost, sub_down(1.0, normaliser))
    return float(add_up(bounds.output_error(score_error, diameter), sums, underflow))


def _structure_error(facts: RunFacts, plan: HeadPlan, diameter: float) -> float:
    """Theorems 4 and 6; no theorem bounds what pooled columns leave out."""
    if isinstance(plan.structure, Landmark) and facts.share < 1:
        return math.inf
    return float(
        add_up(
            bounds.output_error(facts.score_residual_upper, diameter),
            bounds.dropped_mass_error(facts.dropped_mass_upper, diameter),
        )
    )


def _output_error(charges: _Charges, dtype: str, dim_v: int, row_norm: float) -> float:
    """Bound the rounding of the returned rows to their own format, if that is narrower."""
    if get_format(dtype).unit_roundoff <= charges.unit or row_norm == 0:
        return 0.0
    return float(bounds.storing_error(dtype, row_norm, dim_v))
