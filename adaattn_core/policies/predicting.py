"""What a run would report, predicted from a head's norms: the theorems before a run."""

from __future__ import annotations

from adaattn_core.facts import RunFacts
from adaattn_core.formats import get_format
from adaattn_core.plan import HeadPlan
from adaattn_core.stats import HeadStats
from adaattn_core.structure import Dense, LowRank, ScoreSkip


def predicted_facts(plan: HeadPlan, stats: HeadStats) -> RunFacts:
    """Facts that a run of `plan` would report, predicted from the head's norms."""
    info = get_format(plan.qk)
    unit = info.unit_roundoff
    root = stats.dim_qk**0.5
    if info.is_quantised:  # step of the grid at the largest entry, residual of half a step each
        spacing = 1 / 127 if not info.is_float else 2 * unit
        step_q, step_k = stats.query_norm_upper * spacing, stats.key_norm_upper * spacing
        residual_q, residual_k = root * step_q / 2, root * step_k / 2
    else:
        step_q = step_k = 0.0
        exact = 0.0 if plan.qk in ("f32", "f64") else unit
        residual_q, residual_k = exact * stats.query_norm_upper, exact * stats.key_norm_upper
    pv = get_format(plan.pv)
    value_residual = (
        0.0
        if plan.pv in ("f32", "f64")
        else stats.value_norm_upper * (pv.unit_roundoff if pv.is_float else 1 / 254)
    )
    dropped = residual = 0.0
    if isinstance(plan.structure, ScoreSkip):
        dropped = plan.structure.lam * stats.len_kv
    elif isinstance(plan.structure, LowRank):
        residual = stats.feature_residual_upper.get(plan.structure.rank, float("inf"))
    elif not isinstance(plan.structure, Dense):
        dropped = float("inf")
    return RunFacts(
        query_norm_upper=stats.query_norm_upper,
        key_norm_upper=stats.key_norm_upper,
        value_norm_upper=stats.value_norm_upper,
        query_residual_upper=residual_q,
        key_residual_upper=residual_k,
        value_residual_upper=value_residual,
        value_diameter_upper=2 * stats.value_norm_upper,
        score_residual_upper=residual,
        query_step_upper=step_q,
        key_step_upper=step_k,
        dropped_mass_upper=dropped,
        bias_max_abs=0.0,
        keys_max=stats.len_kv,
        output_rms=stats.output_rms_estimate,
        nonfinite=stats.nonfinite,
    )
