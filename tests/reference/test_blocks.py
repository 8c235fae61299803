"""Given key blocks: which keys a row multiplies, and what counts as complete."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core import ErrorBudget, HeadPlan, Mask, Plan, attention
from adaattn_core.errors import AdaAttnError
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Landmark, block_mask
from adaattn_core.testing.oracles import exact_attention, row_errors
from adaattn_reference.backend import NumpyBackend

WORST_CASE = ErrorBudget(1.0, 1, 1, "worst_case", "report")
MASKS = (
    Mask.none(),
    Mask.causal("bottom_right"),
    Mask.sliding_window(20, 3, "bottom_right"),
    Mask.sliding_window(5, 0, "top_left"),
    Mask.key_lengths([50]),
)


def problem_of(length, mask=None):
    x = np.random.default_rng(0).standard_normal((1, 1, length, 16), dtype=np.float32)
    return AttentionProblem.from_arrays(x, x, x, mask=mask)


def run(problem, structure):
    return attention(
        problem.query,
        problem.key,
        problem.value,
        mask=problem.mask,
        plan=Plan.uniform(problem, HeadPlan(structure)),
        budget=WORST_CASE,
        backend="numpy",
    )


def test_a_block_counted_twice_is_refused_not_certified():
    with pytest.raises(AdaAttnError, match="each block once"):
        BlockSparse(tile_q=128, group=128, blocks=((0, 0),))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(MASKS),
    st.integers(1, 40),
    st.integers(1, 90),
    st.sampled_from([1, 7, 16, 2**31 - 1]),
    st.sampled_from([8, 32]),
    st.floats(0.3, 1.0),
)
def test_given_blocks_are_the_same_keys_under_every_mask(
    seed, mask, len_q, len_kv, size, tile, share
):
    """Blocks are counted from the sequence's first key; complete is what left nothing out."""
    if mask.lengths:
        len_kv = max(len_kv, mask.lengths[0])
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, 1, n, 8)).astype("f4") for n in (len_q, len_kv, len_kv))
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    kept = rng.random((-(-len_q // tile), -(-len_kv // size))) < share
    structure = BlockSparse(tile_q=tile, tile_kv=size, group=tile, blocks=block_mask(kept))
    allowed = np.repeat(kept, tile, axis=0)[:len_q][:, np.arange(len_kv) // size]
    result = run(problem, structure)
    masked = AttentionProblem.from_arrays(
        q, k, v, mask=mask & Mask.boolean(allowed[None, None])
    )
    error = row_errors(result.out[0, 0], exact_attention(masked).out[0, 0])
    assert error.max(initial=0.0) < 1e-4

    start, stop = problem.intervals(0)
    keys = np.arange(problem.sequences[0].len_kv)
    visible = (keys >= start[:, None]) & (keys < stop[:, None])
    lost = bool((visible & ~allowed[:, : len(keys)]).any())
    facts, upper = result.facts[0, 0], result.certificate[0, 0].upper
    assert facts.dropped_mass_upper == np.inf or not lost
    truth = row_errors(result.out[0, 0], exact_attention(problem).out[0, 0])
    assert upper == np.inf or truth.max(initial=0.0) <= upper * facts.output_rms


def test_all_blocks_are_complete():
    full = block_mask(np.ones((4, 13), bool))
    structure = BlockSparse(tile_q=32, tile_kv=8, group=32, blocks=full)
    result = run(problem_of(100, Mask.causal()), structure)
    assert result.certificate[0, 0].upper < 1e-3
    assert result.facts[0, 0].share == 1


@pytest.mark.parametrize("flush_keys", [0, 1, 5, 128, 2**31 - 1])
def test_every_flush_that_a_plan_may_name_runs(flush_keys):
    problem = problem_of(70)
    plan = Plan.uniform(problem, HeadPlan(qk="e4m3", pv="e4m3", flush_keys=flush_keys))
    out = NumpyBackend().run(problem, plan).out
    assert row_errors(out[0, 0], exact_attention(problem).out[0, 0]).max() < 0.5


@pytest.mark.parametrize("mask", [Mask.none(), Mask.causal()])
@pytest.mark.parametrize(("band", "tail"), [(512, 128), (64, 512), (64, 64), (0, 0)])
def test_landmarks_certify_by_theorem_only_where_nothing_was_far(mask, band, tail):
    structure = Landmark(band=band, tail=tail, group=64)
    result = run(problem_of(400, mask), structure)
    near = band >= 400 or tail >= 400
    assert (result.facts[0, 0].dropped_mass_upper == 0) == near
    assert np.isfinite(result.certificate[0, 0].upper) == near
