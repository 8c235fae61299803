"""Certificates from theorems: facts of a run in, one sentence per head out.

All heads are certified at once. What depends on the plan and on lengths alone is worked out
once per kind of head (`adaattn_core.certificates.charges`), from the functions of
`adaattn_core.bounds`, rounded outward step by step. What is left are sums, products, minima,
tanh and one quotient of non-negative numbers, in float64, whatever the number of heads. No path
through them has more than 64 roundings, so a factor 1 + 2^-46 at the end makes upper bounds of
the results (docs/math/08-composition.md, where underflow is dealt with as well).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds.accumulate import F32_UNIT
from adaattn_core.certificates.charges import Charges, Question, charges_of
from adaattn_core.certificates.data import HeadCertificate, HeadTable
from adaattn_core.facts import FactsTable, RunFacts
from adaattn_core.plan import HeadPlan

Float64 = NDArray[np.float64]

TERMS = ("qk_rounding", "pv_rounding", "v_rounding", "accumulation", "structure", "output")
_OUTWARD = 1.0 + 2.0**-46
"""Makes an upper bound of up to 64 roundings to nearest."""
_CAST_GROWTH = 1.0 + 2.0**-22
"""Covers what float32 casts of float64 input may have lost of a norm."""


def theorem_certificate(
    facts: RunFacts, plan: HeadPlan, *, len_q: int, **question: Any
) -> HeadCertificate:
    """Certify one head by theorems alone; see `theorem_certificates`.

    Parameters
    ----------
    facts : RunFacts
    plan : HeadPlan
    len_q : int
        Query rows.
    **question
        Fields of `Question`.
    """
    head = (0, 0)
    table = FactsTable.of({head: facts}, [head])
    return theorem_certificates(table, [plan], [len_q], Question(**question))[head]


def theorem_certificates(
    facts: FactsTable, plans: Sequence[HeadPlan], len_q: Sequence[int], question: Question
) -> HeadTable:
    """Certify heads by theorems alone: every row, whatever the input.

    Parameters
    ----------
    facts : FactsTable
        What the run found out; norms and residuals are upper bounds.
    plans : sequence of HeadPlan
        How each of the table's heads was computed.
    len_q : sequence of int
        Query rows of each; a probabilistic statement covers ``len_q * keys_max`` scores at
        once.
    question : Question

    Returns
    -------
    HeadTable
        ``upper`` in multiples of the rms output row, with its terms `TERMS`; inf where a term
        is unbounded, the output is not finite, or its rms is 0 while the bound is not.

    Raises
    ------
    ArgumentError
        If the confidence is not in (0, 1) where it is used.

    References
    ----------
    This project, docs/math/08-composition.md, theorem 8, which states the computation covered.
    """
    charges = charges_of(facts, plans, len_q, question)
    columns = facts.columns
    rms = columns["output_rms"]
    with np.errstate(all="ignore"):
        absolute, likely = _absolute_terms(columns, charges, question)
        terms = absolute / rms * _OUTWARD
        terms[np.isnan(terms)] = np.inf
        terms[:, rms <= 0] = np.inf
        terms[(absolute == 0) | charges.nothing] = 0.0
        upper = terms.sum(axis=0) * _OUTWARD
    upper[columns["nonfinite"] & ~charges.nothing] = np.inf
    likely &= ~charges.nothing
    return HeadTable(
        index=facts.index,
        columns={
            "guarantee": np.where(likely, "probabilistic", "worst_case").astype(object),
            "upper": upper,
            "rows": np.ones(len(upper)),
            "confidence": np.where(likely, question.confidence, 1.0),
            "estimate": np.full(len(upper), np.nan),
            "nonfinite": columns["nonfinite"] & ~charges.nothing,
        },
        terms=dict(zip(TERMS, terms, strict=True)),
    )


def _absolute_terms(
    columns: dict[str, Any], charges: Charges, question: Question
) -> tuple[Float64, NDArray[np.bool_]]:
    """Errors of a row by source, shape (terms, heads); whether theorem 9 gave the first."""
    scale = question.scale
    query, key, value = (columns[f"{x}_norm_upper"] for x in ("query", "key", "value"))
    query_moved, key_moved, value_moved = (
        columns[f"{x}_residual_upper"] for x in ("query", "key", "value")
    )
    diameter = columns["value_diameter_upper"]
    if np.any(charges.cast):  # facts of float32 casts, about float64 input
        growth = np.where(charges.cast, _CAST_GROWTH, 1.0)
        lost = np.where(charges.cast, charges.cast_lost, 0.0)
        # Rounding moves two values apart by a unit of each, however close they are.
        diameter = diameter * growth + (growth - 1.0) * value + 2.0 * lost
        query, key, value = query * growth, key * growth, value * growth + lost
        value_moved = value_moved + lost

    # Theorem 2, or theorem 9 where operands were rounded at random and it says more.
    score = scale * (query * key_moved + query_moved * key + query_moved * key_moved)
    likely = np.zeros(len(score), bool)
    if np.any(charges.at_random):
        spread = _score_error_at_random(columns, query, key, charges, scale)
        known = (columns["query_step_upper"] > 0) | (query_moved == 0)
        known &= (columns["key_step_upper"] > 0) | (key_moved == 0)
        likely = charges.at_random & known & (np.tanh(spread / 2) < np.tanh(score / 2))
        score = np.where(likely, spread, score)

    # Theorem 1 turns score errors into errors of the output, theorem 3 those of P and V.
    if question.sinks:  # Theorem 12: a sink is one more key, of value 0
        diameter = np.maximum(diameter, value)
    diameter = np.minimum(2.0 * value, diameter)
    held = value + value_moved
    none = held == 0
    qk_rounding = np.tanh(score / 2) * diameter
    pv_rounding = np.where(none, 0.0, charges.weights * held)
    v_rounding = value_moved + np.where(charges.cast, F32_UNIT, 0.0) * held

    # Theorem 7: everything that the arithmetic itself adds, scores and sums.
    bias = columns["bias_max_abs"]
    query_held, key_held = query + query_moved, key + key_moved
    product = query_held * key_held
    dot = charges.score * scale * product
    dot_lost = charges.score_lost * (1.0 + query_held + key_held)
    score_max = scale * product + dot + dot_lost + bias
    rounded = dot + dot_lost + charges.score_rounding * score_max + charges.exponentials
    if question.softcap:  # Lemma 12.2; the cap itself never widens a score's error
        capped = np.minimum(score_max, question.softcap)
        rounded = rounded + charges.cap_rounding * score_max
        rounded = rounded + charges.tanh_rel * capped + charges.tanh_abs * question.softcap
    if question.sinks:
        meets = score_max + columns["sink_abs"] + charges.sink_keys
        rounded = rounded + charges.sink_rounding * meets
    accumulation = (
        np.tanh(rounded / 2) * diameter
        + charges.sums * held
        + charges.sums_lost * (held + charges.root_dim_v)
    )
    reach = product * max(1.0, scale) + bias
    accumulation = np.where(reach < charges.score_limit, accumulation, np.inf)
    accumulation[none] = 0.0

    # Theorems 4 and 6; no theorem bounds what pooled columns leave out.
    dropped = columns["dropped_mass_upper"]
    structure = np.tanh(columns["score_residual_upper"] / 2) * diameter
    structure = structure + np.minimum(dropped, 1.0) * diameter
    structure[np.isinf(dropped) | (charges.pooled & (columns["share"] < 1))] = np.inf

    # A returned row is a convex combination of values up to these three errors alone.
    row = held + pv_rounding + v_rounding + accumulation
    stored = charges.store * row + charges.store_lost
    output = np.where((row == 0) | (charges.store == 0), 0.0, stored)
    return (
        np.stack([qk_rounding, pv_rounding, v_rounding, accumulation, structure, output]),
        likely,
    )


def _score_error_at_random(
    columns: dict[str, Any], query: Float64, key: Float64, charges: Charges, scale: float
) -> Float64:
    """Theorem 9: scores of stochastically rounded operands, all pairs at once."""
    query_step, key_step = columns["query_step_upper"], columns["key_step_upper"]
    first = query * key_step
    second = (key + key_step * charges.root_dim_qk) * query_step
    spread = charges.deviation * np.hypot(first, second) + charges.bias * (first + second)
    return np.asarray(scale * spread)
