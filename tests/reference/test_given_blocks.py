"""Block masks given by the caller: the keys of the kept blocks, and no others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core import AttentionProblem, BlockSparse, ErrorBudget, Mask, Plan, attention
from adaattn_core.errors import ArgumentError, PlanError
from adaattn_core.plan import HeadPlan
from adaattn_core.stats import MeasureRequest
from adaattn_core.testing.oracles import exact_attention
from adaattn_reference.backend import NumpyBackend

BACKEND = NumpyBackend()
MASKS = st.sampled_from(
    (
        Mask.none(),
        Mask.causal("top_left"),
        Mask.causal("bottom_right"),
        # The first keys are seen by no row, so a backend may cut them off.
        Mask.sliding_window(20, 0, "bottom_right"),
        Mask.sliding_window(5, 7, "bottom_right"),
    )
)


def problem_of(
    len_q: int, len_kv: int, mask: Mask, seed: int = 0, batch: int = 1, heads: int = 2
):
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((batch, heads, n, 8)).astype(np.float32)
        for n in (len_q, len_kv, len_kv)
    )
    return AttentionProblem.from_arrays(q, k, v, mask=mask)


@given(
    st.integers(1, 150),
    st.integers(0, 120),
    MASKS,
    st.sampled_from([(16, 16), (32, 8), (7, 13)]),
    st.integers(0, 2**32 - 1),
)
def test_given_blocks_equal_a_boolean_mask(len_q, more_keys, mask, tile, seed) -> None:
    problem = problem_of(len_q, len_q + more_keys, mask, seed)
    rng = np.random.default_rng(seed)
    tiles = tuple(
        -(-n // t) for n, t in zip((problem.len_q, problem.len_kv), tile, strict=True)
    )
    kept = rng.random((1, 2, *tiles)) < 0.5
    plan = Plan.block_sparse(problem, kept, tile_q=tile[0], tile_kv=tile[1])
    plan.check_fits(problem)
    raw = BACKEND.run(problem, plan)
    allowed = np.repeat(np.repeat(kept, tile[0], axis=2), tile[1], axis=3)
    allowed = allowed[:, :, : problem.len_q, : problem.len_kv]
    start, stop = mask.intervals(problem.len_q, problem.len_kv)
    keys = np.arange(problem.len_kv)
    allowed &= (keys >= start[:, None]) & (keys < stop[:, None])
    masked = AttentionProblem.from_arrays(
        problem.query, problem.key, problem.value, mask=Mask.boolean(allowed)
    )
    exact = exact_attention(masked)
    np.testing.assert_allclose(raw.out, exact.out, atol=2e-5)
    np.testing.assert_array_equal(raw.lse == -np.inf, ~allowed.any(axis=3))


def test_patterns_are_shared_where_an_axis_is_left_out() -> None:
    problem = problem_of(100, 100, Mask.none(), batch=2, heads=3)
    rng = np.random.default_rng(0)
    kept = rng.random((3, 4, 7)) < 0.5
    plan = Plan.block_sparse(problem, kept, tile_q=32, tile_kv=16)
    assert plan[0, 1] is plan[1, 1]
    assert plan[0, 1].structure == BlockSparse.from_mask(kept[1], tile_q=32, tile_kv=16)
    one = Plan.block_sparse(problem, kept[0], tile_q=32, tile_kv=16)
    assert len({id(one[index]) for index in one}) == 1
    assert Plan.from_json(one.to_json()).to_json() == one.to_json()
    formats = Plan.block_sparse(
        problem, kept[0], tile_q=32, tile_kv=16, head=HeadPlan(qk="bf16", pv="bf16")
    )
    assert formats[0, 0].qk == "bf16"


def test_a_sample_tells_what_left_out_blocks_cost() -> None:
    problem = problem_of(512, 512, Mask.none())
    whole, half = np.ones((4, 8), bool), np.ones((4, 8), bool)
    half[:, ::2] = False
    upper = {}
    for name, kept in (("whole", whole), ("half", half)):
        result = attention(
            problem.query,
            problem.key,
            problem.value,
            plan=Plan.block_sparse(problem, kept),
            budget=ErrorBudget(rel=0.1, on_violation="report"),
            backend="numpy",
        )
        upper[name] = result.certificate[0, 0].upper
    assert upper["whole"] < 0.01
    assert upper["half"] > 0.3


def test_the_judge_counts_blocks_from_the_first_key() -> None:
    mask = Mask.sliding_window(63, 0, "bottom_right")
    problem = problem_of(256, 1000, mask, heads=1)
    kept = np.zeros((8, 32), bool)
    kept[:, 20:] = True  # keys 640 and on: all that is seen
    structure = BlockSparse.from_mask(kept, tile_q=32, tile_kv=32)
    request = MeasureRequest(0.95, (structure,), 0.0, (), False, 0)
    stats, _ = BACKEND.measure(problem, request)
    (estimate,) = stats.heads[0, 0].structures
    assert estimate.share == 1.0
    assert estimate.row_error_estimate < 1e-5


@pytest.mark.parametrize(
    "shape", [(4,), (4, 9), (5, 8), (3, 4, 8), (2, 2, 4, 8), (1, 1, 1, 4, 8), (1, 3, 4, 8)]
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    problem = problem_of(100, 200, Mask.none())
    with pytest.raises(PlanError) as caught:
        Plan.block_sparse(problem, np.ones(shape, bool), tile_q=25, tile_kv=25)
    assert str(caught.value).count("\n") == 2


def test_what_is_no_mask_is_refused() -> None:
    problem = problem_of(100, 200, Mask.none())
    for blocks in (np.ones((4, 8)), np.ones((4, 8), np.int64)):
        with pytest.raises(ArgumentError, match="boolean"):
            Plan.block_sparse(problem, blocks, tile_q=25, tile_kv=25)
        with pytest.raises(ArgumentError, match="boolean"):
            BlockSparse.from_mask(blocks)
    for row in ((1, 0), (0, 0), (-1, 2)):
        with pytest.raises(ArgumentError, match="block"):
            BlockSparse(blocks=(row,))


def test_ragged_sequences_take_the_first_tiles() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 8)).astype(np.float32) for n in (90, 130, 130))
    ragged = AttentionProblem.from_arrays(q, k, v, mask=Mask.ragged([0, 60, 90], [0, 50, 130]))
    kept = rng.random((2, 4)) < 0.5
    plan = Plan.block_sparse(ragged, kept, tile_q=32, tile_kv=20)
    plan.check_fits(ragged)
    first, second = (plan[s, 0].structure for s in (0, 1))
    assert first == BlockSparse.from_mask(kept[:, :3], tile_q=32, tile_kv=20)
    assert second == BlockSparse.from_mask(kept[:1], tile_q=32, tile_kv=20)


def test_plans_for_other_lengths_do_not_fit() -> None:
    plan = Plan.block_sparse(
        problem_of(100, 200, Mask.none()), np.ones((4, 8), bool), tile_q=25, tile_kv=25
    )
    plan.check_fits(problem_of(90, 190, Mask.none()))
    for len_q, len_kv in ((75, 200), (101, 200), (100, 175)):
        with pytest.raises(PlanError, match="query tiles"):
            plan.check_fits(problem_of(len_q, len_kv, Mask.none()))
