"""Compiled policies: what a table chooses, and that it chooses what its policy means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaattn_core.backend import Capabilities
from adaattn_core.budget import ErrorBudget
from adaattn_core.costs import COST_MODELS
from adaattn_core.errors import ArgumentError
from adaattn_core.plan import HeadPlan
from adaattn_core.policies import (
    BudgetPolicy,
    CalibratedPolicy,
    DecisionTable,
    EntropyPolicy,
    ExactPolicy,
    FixedPolicy,
    PolicyContext,
    compile_policy,
    decide_table,
    escalate_table,
)
from adaattn_core.policies.offers import format_pairs
from adaattn_core.policies.table import (
    CHOSEN,
    COSTLY,
    FALLBACK,
    HEAD_MEASURES,
    INACCURATE,
    NONFINITE,
    OUTSIDE,
    Candidate,
)
from adaattn_core.stats import HeadStats
from adaattn_core.structure import Dense, Landmark, ScoreSkip


def shape(length: int) -> HeadStats:
    return HeadStats(length, length, 64, 64, length * (length + 1) // 2)


def context(
    *lengths: int,
    budget: ErrorBudget | None = None,
    structures: tuple[str, ...] = ("dense", "score_skip", "landmark"),
    formats: tuple[str, ...] = ("bf16", "f16", "f32"),
    sizes: tuple[Landmark, ...] = (),
) -> PolicyContext:
    capabilities = Capabilities(formats, formats, structures, ("cuda",), "sm90", sizes=sizes)
    return PolicyContext(
        budget or ErrorBudget(rel=0.1),
        capabilities,
        COST_MODELS["sm90"],
        "bf16",
        True,
        {(i, h): shape(n) for i, n in enumerate(lengths) for h in range(3)},
        0.125,
        0,
        prefix=frozenset(range(len(lengths))),
    )


def table_of(
    *rows: tuple[float, float], worthwhile: float = 0.8, **limits: float
) -> DecisionTable:
    """Table of landmarks with the given (fixed, slope)."""
    candidates = tuple(
        Candidate(HeadPlan(Landmark(tau=0.1 * (i + 1))), *row, **limits)
        for i, row in enumerate(rows)
    )
    return DecisionTable(candidates, HeadPlan(), 0.06, 0.075, worthwhile)


def measured(shares: list[float], errors: list[float], **facts: float) -> np.ndarray:
    head = np.zeros(1, HEAD_MEASURES)
    head["output_rms"] = 1
    head["share"][0, : len(shares)] = shares
    head["error"][0, : len(errors)] = errors
    for name, value in facts.items():
        head[name] = value
    return head


def chosen(table: DecisionTable, head: np.ndarray) -> tuple[int, int]:
    choice = decide_table(table, head)[0]
    return int(choice["candidate"]), int(choice["outcome"])


def test_the_cheapest_accurate_candidate_is_taken() -> None:
    table = table_of((0.1, 1.0), (0.1, 1.0), (0.1, 1.0))
    assert chosen(table, measured([0.4, 0.3, 0.2], [0.01, 0.05, 0.07])) == (1, CHOSEN)
    assert chosen(table, measured([0.4, 0.3, 0.2], [0.07] * 3)) == (FALLBACK, INACCURATE)
    assert chosen(table, measured([0.8, 0.7, 0.2], [0.0, 0.0, 0.1])) == (FALLBACK, COSTLY)


def test_ties_go_to_the_safer() -> None:
    table = table_of((0.1, 1.0), (0.1, 1.0))
    assert chosen(table, measured([0.25, 0.25], [0.05, 0.01])) == (0, CHOSEN)
    even = table_of((0.25, 0.0), worthwhile=0.25)
    assert chosen(even, measured([0.0], [0.0])) == (FALLBACK, COSTLY)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
def test_what_is_not_finite_chooses_nothing(bad: float) -> None:
    table = table_of((0.1, 1.0))
    good = measured([0.2], [0.01])
    assert chosen(table, good) == (0, CHOSEN)
    for name in HEAD_MEASURES.names or ():
        head = good.copy()
        head[name][..., 0] = bad
        assert chosen(table, head) == (FALLBACK, NONFINITE), name


def test_limits() -> None:
    head = measured([0.2], [0.01], entropy_relative=0.5, saturation=0.3, score_max_abs=20)
    for limits, inside in (
        ({"entropy_below": 0.5}, False),
        ({"entropy_below": 0.51}, True),
        ({"saturation_most": 0.3}, True),
        ({"saturation_most": 0.25}, False),
        ({"score_most": 19}, False),
        ({"share_most": 0.1}, False),
    ):
        found = chosen(table_of((0.1, 1.0), **limits), head)
        assert found == ((0, CHOSEN) if inside else (FALLBACK, OUTSIDE)), limits


def test_an_escalation_is_safer_and_corrected_by_the_surprise() -> None:
    table = table_of((0.1, 1.0), (0.1, 1.0), (0.1, 1.0))
    head = measured([0.5, 0.3, 0.2], [0.01, 0.03, 0.05])

    def next_one(current: int, upper: float) -> int:
        found = escalate_table(table, head, np.array([current]), np.array([upper], "f4"))
        return int(found["candidate"][0])

    assert next_one(2, 0.11) == 1  # 0.03 * 0.11 / 0.05 is within 0.075
    assert next_one(2, 0.15) == 0
    assert next_one(2, 1.0) == FALLBACK
    assert next_one(2, math.inf) == next_one(2, math.nan) == FALLBACK
    assert next_one(0, 0.11) == next_one(FALLBACK, 0.11) == FALLBACK


def test_tables_are_checked() -> None:
    with pytest.raises(ArgumentError):
        table_of(*[(0.1, 1.0)] * 13)
    with pytest.raises(ArgumentError):
        table_of((math.nan, 1.0))
    with pytest.raises(ArgumentError):
        replace(table_of((0.1, 1.0)), aim=math.nan)


# -- policies ----------------------------------------------------------------------------------


def test_a_budget_compiles_from_the_safest_to_the_cheapest() -> None:
    sizes = Landmark(group=1536, tile=128, samples=48, screen_rank=0)
    table = BudgetPolicy().compile(context(131_072, sizes=(sizes,)))
    assert table is not None
    assert table.judged
    kinds = [c.plan.structure.kind for c in table.candidates]
    assert kinds == sorted(kinds, key=["dense", "score_skip", "landmark"].index)
    taus = [s.tau for c in table.candidates if isinstance(s := c.plan.structure, Landmark)]
    assert taus == sorted(taus)
    assert taus[0] == min(BudgetPolicy().table_taus)
    assert all(
        c.plan.structure.group == 1536
        for c in table.candidates
        if isinstance(c.plan.structure, Landmark)
    )
    assert table.fallback.qk == "bf16"
    record = table.record
    assert int(record["count"]) == len(table.candidates)
    knobs = record["candidates"]["knob"][: len(table.candidates)]
    assert knobs[-len(taus) :].tolist() == np.float32(taus).tolist()
    for number, c in enumerate(table.candidates):
        assert table.number_of(replace(c.plan, reason="loaded", cost_estimate=0.3)) == number


def test_a_budget_chooses_like_its_table() -> None:
    """On what was measured of the table's own candidates; the host also fits between them."""
    policy, here = BudgetPolicy(), context(131_072)
    table = policy.compile(here)
    assert table is not None
    rng = np.random.default_rng(0)
    for _ in range(200):
        shares = np.sort(rng.random(len(table.candidates)) * 0.6)[::-1]
        errors = np.sort(rng.random(len(table.candidates)) * 0.2)
        head = measured(shares.tolist(), errors.tolist(), entropy_relative=0.5)
        plan = table.head_plan(decide_table(table, head)[0])
        for c, share, error in zip(table.candidates, shares, errors, strict=True):
            cost = (c.fixed + c.slope * share) * table.fallback.cost_estimate
            if error <= table.aim and cost < 0.8 * table.fallback.cost_estimate:
                assert plan.cost_estimate <= cost * (1 + 1e-6)
        assert plan.error_estimate <= table.aim * (1 + 1e-6)
        if plan.structure == Dense():
            assert plan.reason.startswith("dense")


def test_short_problems_need_no_measuring() -> None:
    table = BudgetPolicy().compile(context(512))
    assert table is not None
    assert not table.candidates
    compiled = compile_policy(BudgetPolicy(), context(512))
    assert compiled is not None
    assert not compiled.measured


def test_ragged_sequences_get_tables_of_their_own() -> None:
    compiled = compile_policy(BudgetPolicy(), context(512, 65536, 512))
    assert compiled is not None
    assert len(compiled.tables) == 2
    assert compiled.measured
    assert compiled.table_of_sequence.tolist() == [0, 1, 0]
    with pytest.raises(ArgumentError):
        BudgetPolicy().compile(context(512, 65536))


def test_what_cannot_be_compiled_goes_the_host_way() -> None:
    worst = ErrorBudget(rel=0.1, guarantee="worst_case")
    assert compile_policy(BudgetPolicy(), context(8192, budget=worst)) is None
    assert compile_policy(CalibratedPolicy(plans={}), context(8192)) is None
    ranks = context(8192, structures=("dense", "low_rank"))
    assert compile_policy(EntropyPolicy(), ranks) is None

    class Cautious(BudgetPolicy):
        def decide_head(self, stats: HeadStats, context: PolicyContext) -> HeadPlan:
            return HeadPlan()

    assert compile_policy(Cautious(), context(8192)) is None


@pytest.mark.parametrize("policy", [BudgetPolicy(worthwhile=100.0), EntropyPolicy()])
@pytest.mark.parametrize("prefix", [(), (0,), (0, 1)])
def test_landmarks_are_for_masks_with_a_far_field(policy: Any, prefix: tuple[int, ...]) -> None:
    """A window is an interval per row, and leaves none."""
    here = replace(context(65536, 65536), prefix=frozenset(prefix))
    request = policy.request(here)
    assert request is not None
    asked = {structure.kind for structure in request.structures}
    assert ("landmark" in asked) == bool(prefix)
    compiled = compile_policy(policy, here)
    assert compiled is not None
    kinds = {c.plan.structure.kind for table in compiled.tables for c in table.candidates}
    assert ("landmark" in kinds) == (len(prefix) == 2)


def test_fixed_plans_are_chosen_unmeasured() -> None:
    for policy, plan in (
        (FixedPolicy(ScoreSkip(lam=0.01), qk="bf16", pv="bf16"), None),
        (ExactPolicy(), None),
    ):
        here = context(8192)
        compiled = compile_policy(policy, here)
        assert compiled is not None
        assert not compiled.measured
        (table,) = compiled.tables
        plan = table.head_plan(decide_table(table, np.zeros(1, HEAD_MEASURES))[0])
        assert plan == policy.decide({}, here)[0, 0]


@given(
    entropy=st.floats(0, 1, width=32),
    saturation=st.floats(0, 1, width=32),
    score=st.floats(0, 400, width=32),
    landmarks=st.sampled_from([0.01, 0.05, 0.2]),
    formats=st.sampled_from([("bf16", "f32"), ("f16", "f32"), ("i8", "e4m3", "bf16", "f32")]),
)
def test_entropy_chooses_like_its_table(entropy, saturation, score, landmarks, formats) -> None:
    policy = EntropyPolicy()
    # A device compares in float32: within a rounding of a threshold it may fall either way.
    assume(min(abs(entropy - x) for x in (0.475, 0.95)) > 1e-6)
    assume(abs(saturation - 0.8) > 1e-6)
    here = context(16384, structures=("dense", "landmark", "block_sparse"), formats=formats)
    here = replace(here, dtype="f32")
    table = policy.compile(here)
    assert table is not None
    assert not table.judged
    stats = replace(
        here.shapes[0, 0],
        entropy_relative=entropy,
        saturation=saturation,
        score_max_abs=score,
        landmark_curve={0.1: landmarks},
        sampled_rows=128,
    )
    least = next(
        c.share_most for c in table.candidates if isinstance(c.plan.structure, Landmark)
    )
    share = least - policy.landmark_share + landmarks
    head = measured(
        [share] * len(table.candidates),
        [],
        entropy_relative=entropy,
        saturation=saturation,
        score_max_abs=score,
    )
    host, device = (
        policy.decide_head(stats, here),
        table.head_plan(decide_table(table, head)[0]),
    )
    assert (device.structure, device.qk, device.pv) == (host.structure, host.qk, host.pv)


def test_costs_of_a_table_bound_the_cost_model() -> None:
    here = context(131_072)
    table = BudgetPolicy().compile(here)
    assert table is not None
    head = here.shapes[0, 0]
    dense = here.costs.dense_cost(head, "bf16", "bf16")
    for c in table.candidates:
        for share in (0.0, 0.1, 0.5, 1.0):
            exact = here.costs.head_cost(head, c.plan, share) / dense
            assert exact <= (c.fixed + c.slope * share) * (1 + 1e-9)


def test_many_heads_share_the_time_of_a_call() -> None:
    """One head of a length at which measuring does not pay for it alone, and 27 of them."""
    alone = context(32_768)
    shape = next(iter(alone.shapes.values()))
    many = replace(alone, shapes={(0, head): shape for head in range(27)})
    assert not BudgetPolicy().compile(alone).candidates  # type: ignore[union-attr]
    assert BudgetPolicy().compile(many).candidates  # type: ignore[union-attr]


def test_8_bits_are_not_tried_where_nothing_is_measured() -> None:
    """Of a head that nobody looked at, no theorem says that 8 bits will do."""
    for measures in (True, False):
        here = context(4096)
        can = replace(here.capabilities, qk_formats=("bf16", "i8"), pv_formats=("bf16", "e4m3"))
        flops = {**here.costs.flops, "i8": 1e16, "e4m3": 1e16}
        fast = replace(here.costs, flops=flops, softmax_rate=1e16)
        there = replace(here, capabilities=can, costs=fast, measures=measures)
        pairs = set(format_pairs(next(iter(there.shapes.values())), there))
        narrow = {pair for pair in pairs if {"i8", "e4m3"} & set(pair)}
        assert bool(narrow) == measures
