"""Theorems of many heads at once: the bounds, one function after another, and one by one."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core import bounds
from adaattn_core.bounds.rounding import add_up, div_up, mul_up, sub_down, up
from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.charges import Question
from adaattn_core.certificates.data import Certificate, HeadCertificate
from adaattn_core.certificates.theorem import TERMS, theorem_certificate, theorem_certificates
from adaattn_core.facts import Arithmetic, FactsTable, RunFacts
from adaattn_core.formats import FORMATS, get_format
from adaattn_core.plan import HeadPlan
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, ScoreSkip

U32, U64 = 2.0**-24, 2.0**-53
SPARE = 12


def composed(facts: RunFacts, plan: HeadPlan, len_q: int, question: Question):
    """Theorem 8 as docs/math states it: every term by its own function of `bounds`."""
    dim_qk, dim_v, scale = question.dim_qk, question.dim_v, question.scale
    keys, said = facts.keys_max, facts.arithmetic
    if not keys or not len_q:
        return dict.fromkeys(TERMS, 0.0)
    wide = plan.qk == plan.pv == "f64"
    cast = question.dtype == "f64" and not wide
    unit, info = (U64, get_format("f64")) if wide else (U32, get_format("f32"))
    if cast:
        lost = mul_up(2.0**-126, up(math.sqrt(dim_v)))
        grown = 1 + 2.0**-22
        facts = replace(
            facts,
            query_norm_upper=mul_up(facts.query_norm_upper, grown),
            key_norm_upper=mul_up(facts.key_norm_upper, grown),
            value_norm_upper=add_up(mul_up(facts.value_norm_upper, grown), lost),
            value_residual_upper=add_up(facts.value_residual_upper, lost),
            value_diameter_upper=add_up(
                mul_up(facts.value_diameter_upper, grown),
                mul_up(2.0**-22, facts.value_norm_upper),
                2 * lost,
            ),
        )
    norms = facts.query_norm_upper, facts.key_norm_upper
    moved = facts.query_residual_upper, facts.key_residual_upper
    steps_of = facts.query_step_upper, facts.key_step_upper
    score = bounds.score_error(scale, *norms, *moved)
    if question.guarantee == "probabilistic" and plan.rounding == "stochastic":
        likely = bounds.stochastic_score_error(
            scale, *norms, *steps_of, dim=dim_qk, pairs=len_q * keys,
            confidence=question.confidence,
        )  # fmt: skip
        known = all(s > 0 or m == 0 for s, m in zip(steps_of, moved, strict=True))
        if known and bounds.total_variation(likely) < bounds.total_variation(score):
            score = likely
    diameter = bounds.value_diameter(facts.value_norm_upper, facts.value_diameter_upper)
    held = add_up(facts.value_norm_upper, facts.value_residual_upper)

    step = said.step_keys
    if not step:
        skipping = isinstance(plan.structure, ScoreSkip)
        step = min(64, plan.structure.tile_kv) if skipping else 64
    steps = math.ceil(keys / step) + 1
    path = (min(keys, said.sum_keys_max) if said.sum_keys_max else keys) + 2 * steps + SPARE
    normaliser = bounds.gamma_nearest(path, unit)
    p_scale = min(plan.p_scale, 127.0) if plan.pv == "i8" else plan.p_scale
    rounding = bounds.weight_rounding(plan.pv, p_scale)
    weights = 0.0
    if not (plan.pv == "f64" or (plan.pv == "f32" and plan.qk != "f64")):
        weights = bounds.rounded_weights_error(rounding, keys, held)

    query, key = (add_up(n, m) for n, m in zip(norms, moved, strict=True))
    product = mul_up(query, key)
    of_dot = said.score_rel_upper
    if of_dot is None:
        of_dot = bounds.product_sum_error(dim_qk + SPARE, plan.qk)
    dot = mul_up(of_dot, scale, product)
    lost = mul_up(
        2.0 * (dim_qk + SPARE) * info.smallest_normal,
        add_up(1.0, scale),
        add_up(1.0, query, key),
    )
    largest = add_up(mul_up(scale, product), dot, lost, facts.bias_max_abs)
    exp = bounds.library_exp_error(unit) if said.exp_rel_upper is None else said.exp_rel_upper
    rounded = add_up(
        dot, lost, bounds.score_rounding(largest, unit), bounds.exp_score_error(steps, exp)
    )
    numerator = said.sum_rel_upper
    if numerator is None:
        numerator = bounds.product_sum_error(path, plan.pv, plan.flush_keys or None)
    relative = div_up(add_up(max(numerator, normaliser), normaliser), sub_down(1.0, normaliser))
    weighed = add_up(1.0, rounding.relative, mul_up(keys, rounding.absolute))
    under = mul_up(
        4.0 * (keys + SPARE) * (steps + 2) * info.smallest_normal,
        add_up(held, up(math.sqrt(dim_v))),
    )
    accumulation = add_up(
        bounds.output_error(rounded, diameter),
        mul_up(relative, weighed, held),
        div_up(under, sub_down(1.0, normaliser)),
    )
    reach = add_up(mul_up(product, max(1.0, scale)), facts.bias_max_abs)
    if not mul_up(4.0, reach) < info.max_finite:
        accumulation = math.inf
    if held == 0:
        accumulation = 0.0

    structure = add_up(
        bounds.output_error(facts.score_residual_upper, diameter),
        bounds.dropped_mass_error(facts.dropped_mass_upper, diameter),
    )
    if isinstance(plan.structure, Landmark) and facts.share < 1:
        structure = math.inf
    values = bounds.rounded_values_error(facts.value_residual_upper, U32 if cast else 0.0, held)
    row = add_up(held, weights, values, accumulation)
    output = 0.0
    if get_format(question.dtype).unit_roundoff > unit and row:
        output = bounds.storing_error(question.dtype, row, dim_v)
    absolute = (bounds.output_error(score, diameter), weights, values, accumulation, structure,
                output)  # fmt: skip
    named = {name: float(x) for name, x in zip(TERMS, absolute, strict=True)}
    return bounds.relative_terms(named, facts.output_rms)


def sizes(least=-8, most=8):
    return st.floats(least, most).map(lambda power: 10.0**power) | st.just(0.0)


PLANS = st.builds(
    HeadPlan,
    structure=st.sampled_from(
        [Dense(), ScoreSkip(tile_kv=16), LowRank(2), BlockSparse(), Landmark()]
    ),
    qk=st.sampled_from(list(FORMATS)),
    pv=st.sampled_from(list(FORMATS)),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    p_scale=st.sampled_from([1.0, 127.0, 448.0, 1e4]),
    flush_keys=st.sampled_from([0, 64, 128]),
)
FACTS = st.builds(
    RunFacts,
    keys_max=st.sampled_from([0, 1, 7, 64, 1000, 5000, 1 << 20]),
    share=st.sampled_from([0.5, 1.0]),
    query_norm_upper=sizes(),
    key_norm_upper=sizes(),
    value_norm_upper=sizes(-300, 300) | sizes(),
    query_residual_upper=sizes(),
    key_residual_upper=sizes(),
    value_residual_upper=sizes(),
    value_diameter_upper=sizes() | st.just(math.inf),
    score_residual_upper=sizes(),
    query_step_upper=sizes(),
    key_step_upper=sizes(),
    dropped_mass_upper=sizes(-8, 1) | st.just(math.inf),
    bias_max_abs=sizes(),
    arithmetic=st.builds(
        Arithmetic,
        step_keys=st.sampled_from([0, 16, 1024]),
        sum_keys_max=st.sampled_from([0, 256]),
        score_rel_upper=st.none() | st.floats(0, 0.1),
        sum_rel_upper=st.none() | st.floats(0, 0.1),
        exp_rel_upper=st.none() | st.floats(0, 0.1),
    ),
    output_rms=sizes(-10, 10),
    nonfinite=st.booleans(),
)
QUESTIONS = st.builds(
    Question,
    dim_qk=st.integers(1, 256),
    dim_v=st.integers(1, 256),
    scale=sizes(-3, 3).filter(bool),
    dtype=st.sampled_from(["f64", "f32", "bf16", "f16"]),
    guarantee=st.sampled_from(["worst_case", "probabilistic"]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(FACTS, PLANS, st.integers(0, 9)), min_size=1, max_size=5), QUESTIONS)
def test_all_at_once_is_one_function_after_another(heads, question):
    """Term by term the same number, never below what is rounded outward step by step."""
    index = [(0, number) for number in range(len(heads))]
    facts, plans, len_q = zip(*heads, strict=True)
    facts = dict(zip(index, facts, strict=True))
    table = theorem_certificates(FactsTable.of(facts, index), plans, len_q, question)
    for number, head in enumerate(index):
        found = table[head]
        terms = composed(facts[head], plans[number], len_q[number], question)
        for name, term in terms.items():
            assert found.terms[name] == pytest.approx(term, rel=1e-11), name
            # Stepwise rounding outward overshoots; 2^-46 less of it bounds the same number.
            assert found.terms[name] >= term * (1 - 2.0**-44), name
        alone = theorem_certificate(
            facts[head], plans[number], len_q=len_q[number],
            **{f.name: getattr(question, f.name) for f in fields(Question)},
        )  # fmt: skip
        assert repr(alone) == repr(found)
        if not found.nonfinite:
            assert found.upper >= sum(found.terms.values())


def typical(keys=4096):
    values = {f.name: 0.0 for f in fields(RunFacts) if f.default == math.inf}
    values |= dict.fromkeys(("query_norm_upper", "key_norm_upper", "value_norm_upper"), 9.0)
    return RunFacts(
        **values | {"value_diameter_upper": 12.0, "keys_max": keys, "output_rms": 1.0}
    )


def test_certificates_of_a_table_are_those_of_its_heads():
    """Arrays, verdicts and violations say what the heads say one by one."""
    index = [(s, h) for s in range(3) for h in range(4)]
    rng = np.random.default_rng(0)
    facts = {i: replace(typical(), value_residual_upper=rng.random() * 0.2) for i in index}
    facts[1, 2] = replace(facts[1, 2], nonfinite=True)
    facts[2, 0] = RunFacts.of_nothing()
    plans = [HeadPlan(qk="bf16", pv="bf16")] * len(index)
    question = Question(64, 64, 0.125, "bf16")
    table = theorem_certificates(FactsTable.of(facts, index), plans, [4096] * 12, question)
    whole = Certificate(table, (3, 4))
    heads = Certificate({i: table[i] for i in index}, (3, 4))
    for name in ("upper", "rows", "confidence", "guarantee", "nonfinite", "estimate"):
        assert np.array_equal(
            getattr(whole, name), getattr(heads, name), equal_nan=name == "estimate"
        )
    for budget in (
        ErrorBudget(0.1, 1, 1, "worst_case"),
        ErrorBudget(0.1),
        ErrorBudget(0.1, 1, 0.9, "probabilistic"),
    ):
        assert whole.violations(budget) == heads.violations(budget)
        assert 0 < len(whole.violations(budget)) < 12
        assert not whole.holds(budget)
    assert (
        whole.merge(Certificate({(1, 2): table[0, 0]}, (3, 4)))[1, 2].upper == table[0, 0].upper
    )
    assert isinstance(table[0, 0], HeadCertificate)
    assert len(table) == 12
    assert list(table) == index


def test_a_row_of_a_table_is_the_facts_it_was_made_of():
    facts = {
        (0, 0): typical(),
        (0, 1): replace(typical(7), arithmetic=Arithmetic(step_keys=16)),
    }
    table = FactsTable.of(facts, list(facts))
    assert [table.row(0), table.row(1)] == list(facts.values())
    assert FactsTable.of(facts, [(0, 1)]).row(0) == facts[0, 1]


def test_no_head_at_all():
    table = theorem_certificates(FactsTable.of({}, []), [], [], Question(8, 8, 1.0, "f32"))
    nothing = Certificate(table, (0, 4))
    assert len(table) == 0
    assert nothing.holds(ErrorBudget(0.1))
    assert nothing.upper.shape == (0, 4)
