"""Planning kernels' own source, run on a CPU: gather, decide and certify against NumPy."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import numpy as np
import pytest
from far_on_cpu import DIM, HEADS, HEADS_KV, POISON, SLOT_ROWS, rows_of, sizes

from adaattn_core.policies.table import TABLE
from adaattn_cuda.planner import params as p
from adaattn_cuda.planner.layout import CERTIFICATE, DECISION
from adaattn_cuda.planner.specs import GATHER_KEYS
from adaattn_cuda.work.far import (
    GROUP,
    JUDGE_PARTS,
    LEVELS_MAX,
    SLOT,
    WIDE,
)
from adaattn_cuda.work.far_geometry import TILE
from adaattn_cuda.work.records import ITEM


def test_parameter_blocks_have_the_size_of_their_twins(far_unit: ctypes.CDLL) -> None:
    assert far_unit.gather_bytes() == ctypes.sizeof(p.Gather)
    assert far_unit.nest_bytes() == ctypes.sizeof(p.Nest)
    assert far_unit.prove_bytes() == ctypes.sizeof(p.Prove)
    assert far_unit.decide_bytes() == ctypes.sizeof(p.Decide)
    assert far_unit.certify_bytes() == ctypes.sizeof(p.Certify)
    assert far_unit.work_bytes() == ctypes.sizeof(p.Work)
    assert far_unit.merge_bytes() == ctypes.sizeof(p.Merge)
    assert far_unit.select_bytes() == ctypes.sizeof(p.Select)
    assert far_unit.list_bytes() == ctypes.sizeof(p.ListItems)


@pytest.mark.parametrize(
    ("far_keys", "threshold"),
    [(64, 0), (GATHER_KEYS, 128), (GATHER_KEYS + 64, 250), (2 * GATHER_KEYS + 1088, 256),
     (2 * GATHER_KEYS + 1088, 255), (3 * GATHER_KEYS, 40)],
)  # fmt: skip
def test_gather_copies_the_landmarks_in_order(
    far_unit: ctypes.CDLL, far_keys: int, threshold: int
) -> None:
    rng = np.random.default_rng(far_keys + threshold)
    len_kv = far_keys + 320
    key, value = (rng.standard_normal((HEADS_KV, len_kv, DIM)).astype(np.float16) for _ in "kv")
    size = sizes(len_kv)
    codes = rng.integers(0, 256, (HEADS, 1, size.code_stride), np.uint8)
    groups = np.zeros(1, GROUP)
    groups["far_keys"] = far_keys
    selections = np.zeros((HEADS, 1, LEVELS_MAX, 2), np.int32)
    selections[:, :, 1, 0] = threshold
    wanted = [np.flatnonzero(codes[h, 0, :far_keys] >= threshold) for h in range(HEADS)]
    slots = np.zeros(HEADS, SLOT)
    room = np.array([-(-len(w) // SLOT_ROWS) * SLOT_ROWS for w in wanted])
    first = np.cumsum(room) - room
    slots["head"], slots["level"], slots["row_first"] = np.arange(HEADS), 1, first
    slots["head"][2] = -1  # a slot that is not offered
    buffer_key, buffer_value = (
        np.full((int(room.sum()) + 1, DIM), POISON, np.float16) for _ in "kv"
    )
    block = p.Gather(sizes=size, key=rows_of(key), value=rows_of(value))
    for name, array in (
        ("groups", groups), ("codes", codes), ("selections", selections), ("slots", slots),
        ("landmark_key", buffer_key), ("landmark_value", buffer_value),
    ):  # fmt: skip
        setattr(block, name, array.ctypes.data)
    far_unit.gather(ctypes.byref(block), HEADS * -(-len_kv // GATHER_KEYS))
    expected_key, expected_value = (np.full_like(buffer_key, POISON) for _ in "kv")
    for h in (0, 1, 3):
        rows = slice(first[h], first[h] + len(wanted[h]))
        expected_key[rows] = key[h // 2, wanted[h]]
        expected_value[rows] = value[h // 2, wanted[h]]
        expected_value[rows.stop : first[h] + room[h]] = 0  # what fills a slot is finite
    np.testing.assert_array_equal(buffer_key, expected_key)
    np.testing.assert_array_equal(buffer_value, expected_value)


@pytest.mark.parametrize("drawn", [59, 128, 130, 512])
def test_certify_takes_the_order_statistic(far_unit: ctypes.CDLL, drawn: int) -> None:
    rng = np.random.default_rng(drawn)
    len_q, budget = 1000, 0.05
    padded, order = -(-drawn // TILE) * TILE, drawn - 3
    size = sizes(len_q)
    out = rng.standard_normal((HEADS, len_q, DIM)).astype(np.float16)
    drawn_rows = np.zeros((HEADS, TILE + padded), np.int32)
    drawn_rows[:, TILE : TILE + drawn] = rng.integers(0, len_q, (HEADS, drawn))
    exact = np.full((HEADS, TILE + padded, DIM), np.nan, np.float32)
    noise = rng.standard_normal((HEADS, drawn, DIM)) * rng.exponential(0.02, (HEADS, drawn, 1))
    for h in range(HEADS):
        exact[h, TILE : TILE + drawn] = out[h, drawn_rows[h, TILE : TILE + drawn]] + noise[h]
    exact[3, TILE + 5] = np.nan
    squares = np.zeros((HEADS, -(-len_q // 16)), np.float32)
    for i in range(squares.shape[1]):
        squares[:, i] = (out[:, 16 * i : 16 * i + 16].astype(np.float64) ** 2).sum((1, 2))
    norms = np.zeros((2, HEADS_KV), np.float32)
    query_norms, failed = np.zeros(HEADS, np.float32), np.full(HEADS, 9, np.int32)
    verdicts = np.zeros(HEADS, CERTIFICATE)
    block = p.Certify(
        sizes=size, out=rows_of(out), budget=budget, drawn=drawn, drawn_stride=TILE + padded,
        drawn_first=TILE, square_stride=squares.shape[1], order=order,
    )  # fmt: skip
    for name, array in (
        ("drawn_rows", drawn_rows), ("exact", exact), ("squares", squares), ("norms", norms),
        ("query_norms", query_norms), ("failed", failed), ("verdicts", verdicts),
    ):  # fmt: skip
        setattr(block, name, array.ctypes.data)
    far_unit.certify(ctypes.byref(block), HEADS)
    rms = np.sqrt(squares.sum(1, dtype=np.float64) / len_q) * (1 - 2.0**-8)
    np.testing.assert_allclose(verdicts["rms"], rms, rtol=1e-5)
    away = exact[:, TILE : TILE + drawn].astype(np.float64)
    for h in range(HEADS):
        away[h] -= out[h, drawn_rows[h, TILE : TILE + drawn]]
    errors = np.linalg.norm(away, axis=2)
    errors[np.isnan(errors)] = np.inf
    upper = np.sort(errors, axis=1)[:, order - 1] / rms
    assert (verdicts["upper"] >= upper).all()
    np.testing.assert_allclose(verdicts["upper"], upper, rtol=1e-4)
    np.testing.assert_array_equal(failed, (upper > budget).astype(np.int32))


def test_rows_are_asked_for_only_where_a_theorem_says_too_little(far_unit: ctypes.CDLL) -> None:
    """One head is proved; others miss the budget, have a NaN, or norms beyond the factors."""
    len_q, budget = 1000, 0.05
    size = sizes(len_q)
    squares = np.full((HEADS, -(-len_q // 16)), 16.0, np.float32)
    squares[1] /= 100
    norms = np.array([[2.0, 3.0], [10.0, 2e12]], np.float32)  # of values, then of keys
    query_norms = np.array([5.0, 5.0, 5.0, np.nan], np.float32)
    counts = np.array([2, 0, 3, 1])
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    items = np.zeros(first[-1], ITEM)
    items["head"], items["rows"] = np.repeat(np.arange(HEADS), counts), TILE
    asked, queue = np.zeros(first[-1] + 1, ITEM), np.zeros(4, np.int32)
    failed, verdicts = np.full(HEADS, 9, np.int32), np.zeros(HEADS, CERTIFICATE)
    block = p.Prove(
        sizes=size, budget=budget, value_factor=0.01, score_factor=1e-5, lost=1e-9,
        square_stride=squares.shape[1], head_tiles=1,
    )  # fmt: skip
    for name, array in (
        ("squares", squares), ("norms", norms), ("query_norms", query_norms),
        ("failed", failed), ("verdicts", verdicts), ("items", items), ("first_item", first),
        ("asked", asked), ("queue", queue),
    ):  # fmt: skip
        setattr(block, name, array.ctypes.data)
    far_unit.prove(ctypes.byref(block), HEADS)
    rms = np.sqrt(squares.sum(1, dtype=np.float64) / len_q) * (1 - 2.0**-8)
    upper = (2.0 * (0.01 + 1e-5 * 50.0) + 1e-9) / rms[:2]
    np.testing.assert_allclose(verdicts["upper"], [*upper, np.inf, np.inf], rtol=1e-4)
    assert (verdicts["upper"][:2] >= upper).all()
    np.testing.assert_allclose(verdicts["rms"], rms, rtol=1e-5)
    assert np.isnan(verdicts["estimate"]).all()
    assert (verdicts["proved"] == 1).all()
    np.testing.assert_array_equal(failed, [0, 1, 1, 1])
    assert queue.tolist() == [0, 4, 0, 0]
    assert asked["head"][:4].tolist() == [2, 2, 2, 3]
    assert asked[4:]["rows"].tolist() == [0, 0, 0]  # the list ends


@pytest.mark.parametrize(("narrow_entropy", "dense"), [(0.0, -1), (0.8, WIDE)])
def test_decide_measures_the_spared_quantile(
    far_unit: ctypes.CDLL, narrow_entropy: float, dense: int
) -> None:
    """And tells dense heads that look at few keys, as these do, from those for 8 bits."""
    rng = np.random.default_rng(5)
    len_q, levels, spare = 1000, 2, 3
    size = sizes(len_q, levels=levels)
    judged = size.tiles - 1
    alive = len_q - judged * TILE
    judge_tiles, judge_groups = np.array([judged], np.int32), np.zeros(1, np.int32)
    groups = np.zeros(1, GROUP)
    groups["tiles"], groups["far_keys"] = size.tiles, 640
    slots = np.zeros((HEADS, 1, levels), SLOT)
    slots["head"] = np.arange(HEADS)[:, None, None]
    slots["head"][1, 0, 0] = -1  # too many landmarks to be worth judging
    selections = np.zeros((HEADS, 1, LEVELS_MAX, 2), np.int32)
    selections[:, :, :levels, 1] = [256, 64]
    exact = rng.standard_normal((HEADS, TILE, DIM)).astype(np.float32)
    scale = np.array([0.01, 0.2])[:, None, None]
    noise = rng.standard_normal((HEADS, levels, TILE, DIM)) * scale
    whole = (exact[:, None] + noise).astype(np.float32)
    whole[3, 1, 7] = np.nan
    # Level 0 in one part, level 1 in three that weigh 1 : e : 1 / e.
    parts = np.tile(np.array([1, 3], np.int32), (HEADS, 1, 1))
    partial = np.full((HEADS, 1, levels, JUDGE_PARTS, TILE, DIM), np.nan, np.float32)
    lse = np.full((HEADS, 1, levels, JUDGE_PARTS, TILE), np.nan, np.float32)
    lse[:, 0, 0, 0] = 40.0
    lse[:, 0, 1, :3] = 40.0 + np.array([0, 1, -1])[:, None]
    weights = np.exp([0.0, 1.0, -1.0]) / np.exp([0.0, 1.0, -1.0]).sum()
    away = rng.standard_normal((HEADS, TILE, DIM))
    partial[:, 0, 0, 0] = whole[:, 0]
    partial[:, 0, 1, 0] = whole[:, 1]
    partial[:, 0, 1, 1] = whole[:, 1] + away / weights[1]
    partial[:, 0, 1, 2] = whole[:, 1] - away / weights[2]
    stats = np.zeros((HEADS, 1, size.samples, 4), np.float32)
    sample_rows = np.arange(size.samples, dtype=np.int32)[None]
    errors = np.zeros((HEADS, LEVELS_MAX + 1), np.float32)
    finished, decision = np.zeros(HEADS, np.int32), np.full(HEADS, 9, np.int32)
    verdicts = np.zeros(HEADS, DECISION)
    table = np.zeros((), TABLE)
    table["count"], table["aim"], table["worthwhile"] = levels, 0.05, 1.0
    for name in ("entropy_below", "saturation_most", "score_most", "share_most"):
        table["candidates"][name] = np.inf
    table["candidates"]["slope"] = 1.0
    block = p.Decide(
        sizes=size, dense_tiles=36.0, near_tiles=10.0, far_tiles=5.0, spare_rows=spare,
        chunk_heads=1, exact_stride=TILE, narrow_entropy=narrow_entropy,
    )  # fmt: skip
    block.judge_weights[0] = 0.5
    ctypes.memmove(block.table, table.tobytes(), TABLE.itemsize)
    for name, array in (
        ("groups", groups), ("judge_tiles", judge_tiles), ("judge_groups", judge_groups),
        ("slots", slots), ("selections", selections), ("exact", exact),
        ("parts", parts), ("partial_out", partial), ("partial_lse", lse), ("stats", stats),
        ("sample_rows", sample_rows),
        ("errors", errors), ("finished", finished), ("decision", decision),
        ("verdicts", verdicts),
    ):  # fmt: skip
        setattr(block, name, array.ctypes.data)
    far_unit.decide(ctypes.byref(block), HEADS * levels)
    away = np.linalg.norm(whole.astype(np.float64) - exact[:, None], axis=3)
    away[np.isnan(away)] = np.inf
    away[..., alive:] = 0  # rows beyond the last one count as kept
    rms = np.sqrt((exact[:, :alive].astype(np.float64) ** 2).sum((1, 2)) / TILE)
    expected = -np.sort(-away, axis=2)[..., spare] / rms[:, None]
    expected[1, 0] = np.inf
    found = verdicts["measures"]
    np.testing.assert_allclose(found["error"][:, :levels], expected, rtol=1e-4)
    np.testing.assert_allclose(found["output_rms"], rms, rtol=1e-4)
    shares = (10 + 5 * 0.5 * np.array([256, 64]) / 128) / 36
    np.testing.assert_allclose(found["share"][0, :levels], shares, rtol=1e-6)
    np.testing.assert_array_equal(decision, [0, dense, 0, 0])
    np.testing.assert_array_equal(finished, 0)


def test_splits_are_merged_as_if_they_were_one(far_unit: ctypes.CDLL) -> None:
    """More splits than lanes, one alone, and a row that some splits hold no key of."""
    rng = np.random.default_rng(12)
    counts = np.array([1, 3, 40, 2])
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    out = rng.standard_normal((first[-1], TILE, DIM)).astype(np.float32)
    lse = rng.normal(0, 30, (first[-1], TILE)).astype(np.float32)
    lse[2, :9], lse[5:20, 50] = -np.inf, -np.inf
    merged = np.full((len(counts), TILE, DIM), POISON, np.float32)
    heads, len_q = 2, 3 * TILE - 23  # each head's first tile is its last one, of 105 rows
    returned = np.full((heads, len_q, DIM), POISON, np.float16)
    returned_lse = np.full((heads, len_q), POISON, np.float32)
    squares = np.full((heads, 3 * TILE // 16), POISON, np.float32)
    block = p.Merge(
        tiles=len(counts), dim_v=DIM, head_tiles=2, heads_q=heads, len_q=len_q,
        tail_first=2 * TILE, square_stride=squares.shape[1], out=rows_of(returned),
        lse=p.Rows(returned_lse.ctypes.data, 1, len_q, 0),
    )  # fmt: skip
    for name, array in (
        ("partial_out", out), ("partial_lse", lse), ("first_partial", first), ("exact", merged),
        ("squares", squares),
    ):  # fmt: skip
        setattr(block, name, array.ctypes.data)
    far_unit.merge(ctypes.byref(block), len(counts) * TILE // 16)
    for tile, (start, stop) in enumerate(pairwise(first)):
        own = lse[start:stop].astype(np.float64)
        weights = np.exp(own - own.max(0))
        expected = (weights[..., None] * out[start:stop]).sum(0) / weights.sum(0)[:, None]
        np.testing.assert_allclose(merged[tile], expected, rtol=1e-5, atol=1e-6)
        if tile % 2:
            continue
        head, rows = tile // 2, len_q - 2 * TILE
        np.testing.assert_array_equal(
            returned[head, 2 * TILE :], merged[tile, :rows].astype(np.float16)
        )
        np.testing.assert_allclose(
            returned_lse[head, 2 * TILE :],
            own.max(0)[:rows] + np.log(weights.sum(0)[:rows]),
            rtol=1e-5,
            atol=1e-5,
        )
        kept = np.zeros((TILE, DIM))
        kept[:rows] = merged[tile, :rows]
        expected = np.square(kept).reshape(-1, 16 * DIM).sum(1)[: -(-rows // 16)]
        np.testing.assert_allclose(squares[head, 16 : 16 + len(expected)], expected, rtol=1e-5)
    assert (returned[:, : 2 * TILE] == POISON).all()
    assert (squares[:, :16] == POISON).all()
    block.tail_first = -1
    returned[...] = merged[...] = POISON
    failed = np.array([0, 1], np.int32)
    block.failed = failed.ctypes.data
    far_unit.merge(ctypes.byref(block), len(counts) * TILE // 16)
    assert (merged[:2] == POISON).all()
    assert not (merged[2:] == POISON).all(axis=(1, 2)).any()
    block.failed = 0
    far_unit.merge(ctypes.byref(block), len(counts) * TILE // 16)
    assert (returned == POISON).all()
    assert not (merged == POISON).all(axis=(1, 2)).any()
