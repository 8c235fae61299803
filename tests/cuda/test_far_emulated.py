"""Planning kernels' own source, run on a CPU: gather, decide and certify against NumPy."""

from __future__ import annotations

import ctypes
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import adaattn_kernels_cu as kernels
from adaattn_core.policies import BudgetPolicy
from adaattn_core.policies.table import TABLE
from adaattn_cuda.planner import params as p
from adaattn_cuda.planner.layout import CERTIFICATE, DECISION
from adaattn_cuda.planner.specs import GATHER_KEYS
from adaattn_cuda.work.far import (
    GROUP,
    JUDGE_PARTS,
    LEVELS_MAX,
    SLOT,
    TILE,
    FarGeometry,
    exact_work,
    far_tables,
)
from adaattn_cuda.work.records import ITEM, ORIGINAL, POOLED, SOURCE

HEADS, HEADS_KV, DIM = 4, 2, 72
SLOT_ROWS = 128
PLACE = np.dtype([(name, "<i4") for name in ("head", "first", "beside", "rising")])
POISON = 7.0


@pytest.fixture(scope="module")
def unit(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels compiled for the CPU."""
    emulation = Path(__file__).parent / "emulation"
    built = tmp_path_factory.mktemp("far") / "far.so"
    paths = ["-I", str(emulation), "-I", str(kernels.root())]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off"]
    warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
    source = str(emulation / "far_unit.cpp")
    command = [cxx, *flags, *warnings, *paths, source, "-o", str(built)]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(built))


def rows_of(array: NDArray[Any]) -> Any:
    """(head, row, dim) of one batch entry, as ``far::Rows``."""
    head, row = (s // array.itemsize for s in array.strides[:2])
    return p.Rows(array.ctypes.data, row, head, 0)


def sizes(len_kv: int, **changed: int) -> Any:
    """Sizes of one sequence; only what the kernels read is set."""
    facts = {
        "batch": 1, "heads_q": HEADS, "heads_kv": HEADS_KV, "len_q": len_kv, "len_kv": len_kv,
        "causal": 1, "dim_qk": DIM, "dim_v": DIM, "tile": TILE, "tiles": -(-len_kv // TILE),
        "band": 256, "groups": 1, "samples": 16, "levels": 2, "judges": 1,
        "code_stride": -(-len_kv // TILE) * TILE,
    }  # fmt: skip
    made = p.Sizes()
    for name, value in (facts | changed).items():
        setattr(made, name, value)
    return made


def test_parameter_blocks_have_the_size_of_their_twins(unit: ctypes.CDLL) -> None:
    assert unit.gather_bytes() == ctypes.sizeof(p.Gather)
    assert unit.nest_bytes() == ctypes.sizeof(p.Nest)
    assert unit.prove_bytes() == ctypes.sizeof(p.Prove)
    assert unit.decide_bytes() == ctypes.sizeof(p.Decide)
    assert unit.certify_bytes() == ctypes.sizeof(p.Certify)
    assert unit.work_bytes() == ctypes.sizeof(p.Work)
    assert unit.merge_bytes() == ctypes.sizeof(p.Merge)
    assert unit.select_bytes() == ctypes.sizeof(p.Select)
    assert unit.list_bytes() == ctypes.sizeof(p.ListItems)


@pytest.mark.parametrize(
    ("far_keys", "threshold"),
    [(64, 0), (GATHER_KEYS, 128), (GATHER_KEYS + 64, 250), (2 * GATHER_KEYS + 1088, 256),
     (2 * GATHER_KEYS + 1088, 255), (3 * GATHER_KEYS, 40)],
)  # fmt: skip
def test_gather_copies_the_landmarks_in_order(
    unit: ctypes.CDLL, far_keys: int, threshold: int
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
    unit.gather(ctypes.byref(block), HEADS * -(-len_kv // GATHER_KEYS))
    expected_key, expected_value = (np.full_like(buffer_key, POISON) for _ in "kv")
    for h in (0, 1, 3):
        rows = slice(first[h], first[h] + len(wanted[h]))
        expected_key[rows] = key[h // 2, wanted[h]]
        expected_value[rows] = value[h // 2, wanted[h]]
        expected_value[rows.stop : first[h] + room[h]] = 0  # what fills a slot is finite
    np.testing.assert_array_equal(buffer_key, expected_key)
    np.testing.assert_array_equal(buffer_value, expected_value)


@pytest.mark.parametrize("tiles", [12, 71, 75])
def test_a_judged_tile_has_the_landmarks_of_every_level_in_its_first_rows(
    unit: ctypes.CDLL, tiles: int
) -> None:
    """Two judged tiles, the last and one before it; of head 2 not every level is offered."""
    rng = np.random.default_rng(tiles)
    levels, len_kv = 3, tiles * TILE
    size = sizes(len_kv, levels=levels, judges=2)
    key, value = (rng.standard_normal((HEADS_KV, len_kv, DIM)).astype(np.float16) for _ in "kv")
    codes = rng.integers(0, 256, (HEADS, 1, size.code_stride), np.uint8)
    judge_tiles = np.array([tiles - 1, tiles - 5], np.int32)
    stops = np.maximum(judge_tiles * TILE - 256, 0) // 64 * 64
    groups = np.zeros(1, GROUP)
    groups["tiles"], groups["far_keys"] = tiles, stops[0]
    thresholds = np.array([150, 240, 256])
    selections = np.zeros((HEADS, 1, LEVELS_MAX, 2), np.int32)
    selections[:, 0, :levels, 0] = thresholds
    selections[1, 0, :levels, 0] = [0, 250, 250]
    counts = np.zeros((HEADS, 1, LEVELS_MAX, tiles), np.int32)
    slots = np.zeros((HEADS, 2, levels), SLOT)
    slots["head"] = np.arange(HEADS)[:, None, None]
    slots["level"] = np.arange(levels)
    slots["head"][2, :, 0] = slots["head"][3, 1] = -1
    rows, expected = [], []
    first = 128
    for h in range(HEADS):
        for j, (tile, stop) in enumerate(zip(judge_tiles, stops, strict=True)):
            own, offered = codes[h, 0, :stop], slots["head"][h, j] >= 0
            chosen = [np.flatnonzero(own >= t) for t in selections[h, 0, :levels, 0]]
            for level in range(levels):
                counts[h, 0, level, tile] = len(chosen[level])
            slots["row_first"][h, j] = first
            if not offered.any():
                continue
            taken = [c for c, o in zip(chosen, offered, strict=True) if o][::-1]
            order = [taken[0]]
            for fewer, more in pairwise(taken):
                order.append(np.setdiff1d(more, fewer))
            keys = np.concatenate(order)
            room = -(-len(keys) // SLOT_ROWS) * SLOT_ROWS
            rows.append(slice(first, first + len(keys)))
            expected.append((h // 2, keys, room))
            first += room
    buffers = [np.full((first + 3, DIM), POISON, np.float16) for _ in "kv"]
    wanted = [buffer.copy() for buffer in buffers]
    for at, (head, keys, room) in zip(rows, expected, strict=True):
        wanted[0][at], wanted[1][at] = key[head, keys], value[head, keys]
        wanted[1][at.stop : at.start + room] = 0
    block = p.Nest(sizes=size, key=rows_of(key), value=rows_of(value), tile_stride=tiles)
    for name, array in (
        ("groups", groups), ("judge_tiles", judge_tiles), ("codes", codes),
        ("selections", selections), ("tile_counts", counts), ("slots", slots),
        ("landmark_key", buffers[0]), ("landmark_value", buffers[1]),
    ):  # fmt: skip
        setattr(block, name, array.ctypes.data)
    unit.nest(ctypes.byref(block), HEADS * 2 * -(-len_kv // GATHER_KEYS))
    np.testing.assert_array_equal(buffers[0], wanted[0])
    np.testing.assert_array_equal(buffers[1], wanted[1])


@pytest.mark.parametrize("drawn", [59, 128, 130, 512])
def test_certify_takes_the_order_statistic(unit: ctypes.CDLL, drawn: int) -> None:
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
    unit.certify(ctypes.byref(block), HEADS)
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


def test_rows_are_asked_for_only_where_a_theorem_says_too_little(unit: ctypes.CDLL) -> None:
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
    unit.prove(ctypes.byref(block), HEADS)
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


def test_decide_measures_the_spared_quantile(unit: ctypes.CDLL) -> None:
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
        chunk_heads=1, exact_stride=TILE,
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
    unit.decide(ctypes.byref(block), HEADS * levels)
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
    np.testing.assert_array_equal(decision, [0, -1, 0, 0])
    np.testing.assert_array_equal(finished, 0)


@pytest.mark.parametrize("blocks", [0, 7, 1000])
def test_lists_hold_every_tile_of_every_head_once(unit: ctypes.CDLL, blocks: int) -> None:
    """Exact heads have the items that the host would list; the others go by landmarks."""
    rng = np.random.default_rng(8)
    g = FarGeometry(
        batch=2, heads_q=6, heads_kv=2, len_q=2900, len_kv=3000, dim_qk=DIM, dim_v=DIM,
        causal=True, offset=100, group=1024, band=256, samples=16, drawn=128,
    )  # fmt: skip
    tables = far_tables(g, 3, 8, 0)
    decision = np.array([2, -1, 0, -1, -1, 1, 0, 1, -1, 2, -1, 0], np.int32)
    counts = rng.integers(0, 700, (g.heads, g.groups, LEVELS_MAX)).astype(np.int32)
    selections = np.zeros((g.heads, g.groups, LEVELS_MAX, 2), np.int32)
    selections[..., 1] = counts
    taken = [counts[h, :, level] for h, level in enumerate(decision) if level >= 0]
    room = int((-(-np.concatenate(taken) // SLOT_ROWS) * SLOT_ROWS).sum())
    size = sizes(
        3000, batch=2, heads_q=6, heads_kv=2, len_q=2900, offset=100, tiles=g.tiles,
        groups=g.groups, levels=3, judges=2, landmark_rows=room - SLOT_ROWS,
    )  # fmt: skip
    before = np.sort(rng.integers(0, 700, (*counts.shape, g.tiles_per_group)), axis=-1)
    before = np.minimum(before, counts[..., None]).astype(np.int32)
    slots = np.zeros((g.heads, g.groups), SLOT)
    kept = np.full(g.heads, 77, np.uint64)
    tile_m = 192
    exact_tiles = -(-g.len_q // tile_m)
    made: dict[str, Any] = {}
    lists = {}
    for stem, tile, tiles in (("landmarks", TILE, g.tiles - 1), ("exact", tile_m, exact_tiles)):
        made[stem] = (
            np.full(g.heads * tiles + 3 * blocks + 1, 9, ITEM),
            np.zeros(3 * (g.heads * tiles + 3 * blocks + 1), SOURCE),
            np.zeros(4, np.int32), np.zeros(g.heads, PLACE),
        )  # fmt: skip
        addresses = (part.ctypes.data for part in made[stem])
        lists[stem] = p.List(*addresses, tile, TILE, tiles, blocks if stem == "exact" else 0)
    block = p.Work(
        sizes=size, **lists, tile_stride=g.tiles_per_group, section_heads=2,
    )  # fmt: skip
    threads = -(-g.heads * g.tiles // 256) * 256
    items_block = p.ListItems(
        sizes=size, **lists, tile_stride=g.tiles_per_group, tail=1, landmark_threads=threads,
    )  # fmt: skip
    arrays = {
        "groups": tables.groups, "selections": selections, "tile_counts": before,
        "decision": decision, "slots": slots, "pool_first": tables.pool_first, "kept": kept,
    }  # fmt: skip
    for name, array in arrays.items():
        for parameters in (block, items_block):
            if name in {field[0] for field in parameters._fields_}:
                setattr(parameters, name, array.ctypes.data)
    unit.work(ctypes.byref(block), 1)
    unit.list(ctypes.byref(items_block), -(-(threads + g.heads * exact_tiles) // 256))
    # The last head's landmarks found no room: it is exact now.
    assert decision.tolist() == [2, -1, 0, -1, -1, 1, 0, 1, -1, 2, -1, -1]
    items, sources, queue, _ = made["exact"]
    assert (queue[0], queue[1]) == (0, (decision < 0).sum() * exact_tiles)
    if blocks:
        rounds = len(items) // blocks
        columns = [
            items[: rounds * blocks].reshape(rounds, blocks)[:, b] for b in range(blocks)
        ]
        columns = [c[: np.flatnonzero(c["rows"] == 0)[0]] for c in columns]
        loads = [int(c["tiles"].sum()) for c in columns]
        assert max(loads) - min(loads) <= items["tiles"].max()
        listed = np.concatenate(columns)
    else:
        listed = items[: queue[1]]
        assert items[queue[1]]["rows"] == 0
        rising, falling = np.diff(listed["row_first"].astype(np.int64).reshape(2, -1))
        assert (rising >= 0).all()  # a section begins with what the one before ended with
        assert (falling <= 0).all()
    wanted = exact_work(g, tile_m, TILE, 5)
    names = ("batch", "head", "row_first", "rows", "tiles", "stop_offset", "key_stop")

    def told(table: NDArray[Any], keys: NDArray[Any]) -> list[tuple[int, ...]]:
        of = keys[table["first_source"]]
        return sorted(
            (*(int(item[n]) for n in names), int(k["head"]), int(k["keys"]), int(k["mask"]))
            for item, k in zip(table, of, strict=True)
            if item["rows"]
        )

    expected = wanted.items.reshape(-1)
    dense = decision[expected["batch"] * g.heads_q + expected["head"]] < 0
    assert told(listed, sources) == told(expected[dense], wanted.sources)
    items, sources, queue, _ = made["landmarks"]
    listed = items[: queue[1]]
    seen = sorted((int(x["batch"]) * 6 + int(x["head"]), int(x["row_first"])) for x in listed)
    assert seen == [
        (h, t * TILE) for h in np.flatnonzero(decision >= 0) for t in range(g.tiles - 1)
    ]
    scores = np.zeros(g.heads, np.uint64)
    tail = np.arange((g.tiles - 1) * TILE, g.len_q)  # computed with the drawn rows
    scores[decision >= 0] = np.minimum(tail + 101, g.len_kv).sum()
    for item in listed:
        head, tile = int(item["batch"]) * 6 + int(item["head"]), int(item["row_first"]) // TILE
        run = sources[item["first_source"] :][: item["sources"]]
        stop = min(tile * TILE + TILE + 100, g.len_kv)
        near = run[-1]
        assert (near["tensor"], near["first_key"] + near["keys"]) == (ORIGINAL, stop)
        far = int(near["first_key"])
        for source in run[:-1]:
            group = tile // g.tiles_per_group
            if source["tensor"] == POOLED:
                assert source["first_key"] == tables.pool_first[head, group]
                assert source["keys"] == far // 64
            else:
                level = decision[head]
                assert source["first_key"] == slots[head, group]["row_first"]
                assert source["keys"] == before[head, group, level, tile % g.tiles_per_group]
            scores[head] += int(item["rows"]) * int(source["keys"])
        rows = tile * TILE + np.arange(int(item["rows"]))
        scores[head] += int((np.minimum(rows + 101, g.len_kv) - far).sum())
        assert item["tiles"] == sum(-(-int(s["keys"]) // TILE) for s in run)
    np.testing.assert_array_equal(kept, scores)


@pytest.mark.parametrize(("part_tiles", "most"), [(100, 1e9), (3, 1e9), (1, 500.0)])
def test_judged_items_share_the_landmarks_of_a_slot(
    unit: ctypes.CDLL, part_tiles: int, most: float
) -> None:
    """What is worth judging is computed once, by items that no slot has more of than it may."""
    rng = np.random.default_rng(part_tiles)
    levels, len_kv = 3, 6000
    g = FarGeometry(
        batch=1, heads_q=HEADS, heads_kv=HEADS_KV, len_q=len_kv, len_kv=len_kv, dim_qk=DIM,
        dim_v=DIM, causal=True, offset=0, group=1024, band=256, samples=16, drawn=128,
    )  # fmt: skip
    tables = far_tables(g, levels, 8, 0)
    judges = len(tables.judge_tiles)
    assert judges == 2
    counts = -np.sort(-rng.integers(0, 1500, (HEADS, g.groups, levels)), axis=2)
    selections = np.zeros((HEADS, g.groups, LEVELS_MAX, 2), np.int32)
    selections[:, :, :levels, 1] = counts
    before = np.zeros((HEADS, g.groups, LEVELS_MAX, g.tiles_per_group), np.int32)
    before[:, :, :levels] = counts[..., None]
    slots = np.zeros((HEADS, judges, levels), SLOT)
    parts = np.full((HEADS, judges, levels), -7, np.int32)
    room = HEADS * judges * levels * JUDGE_PARTS
    items, sources = np.full(room + 1, 9, ITEM), np.zeros(3 * room, SOURCE)
    queue, places = np.zeros(4, np.int32), np.zeros(HEADS, PLACE)
    addresses = (part.ctypes.data for part in (items, sources, queue, places))
    size = sizes(len_kv, groups=g.groups, levels=levels, judges=judges, landmark_rows=1 << 20)
    block = p.Work(
        sizes=size, landmarks=p.List(*addresses, TILE, TILE, g.tiles, 0),
        tile_stride=g.tiles_per_group, most_landmarks=most, part_tiles=part_tiles,
        judge_weights=tables.judge_weights,
    )  # fmt: skip
    for name, array in (
        ("groups", tables.groups), ("judge_tiles", tables.judge_tiles),
        ("judge_groups", tables.judge_groups), ("selections", selections),
        ("tile_counts", before), ("slots", slots), ("pool_first", tables.judge_pool_first),
        ("parts", parts),
    ):  # fmt: skip
        setattr(block, name, array.ctypes.data)
    unit.work_judge(ctypes.byref(block), 1)
    judged = counts[:, tables.judge_groups]
    offered = (judged * np.array(tables.judge_weights)[None, :, None]).sum(1) <= most
    assert offered.any()
    assert offered.all() == (most == 1e9)
    np.testing.assert_array_equal(slots["head"] >= 0, np.repeat(offered[:, None], judges, 1))
    most = levels - offered.sum(1)  # levels share the rows of the first that is offered
    wanted = judged[np.arange(HEADS), :, np.minimum(most, 2)] * (most < levels)[:, None]
    room = (-(-wanted // SLOT_ROWS) * SLOT_ROWS).ravel()
    first = (np.cumsum(room) - room).reshape(HEADS, judges, 1)
    assert (slots["row_first"] == first)[slots["head"] >= 0].all()
    listed = items[: queue[1]]
    assert queue[1] == parts.sum()
    assert items[queue[1]]["rows"] == 0
    assert sorted(listed["partial"]) == sorted(
        slot * JUDGE_PARTS + part
        for slot, count in enumerate(parts.ravel())
        for part in range(count)
    )
    seen: dict[int, list[range]] = {}
    for item in listed:
        slot, part = divmod(int(item["partial"]), JUDGE_PARTS)
        run = sources[item["first_source"] :][: item["sources"]]
        kinds = [int(source["tensor"]) for source in run]
        assert (POOLED in kinds, ORIGINAL in kinds) == (part == 0, part == 0)
        assert item["tiles"] == sum(-(-int(s["keys"]) // TILE) for s in run)
        first = int(slots.ravel()[slot]["row_first"])
        for source in run:
            if source["tensor"] not in (POOLED, ORIGINAL):
                start = int(source["first_key"]) - first
                seen.setdefault(slot, []).append(range(start, start + int(source["keys"])))
    for slot, count in enumerate(judged.ravel()):
        whole = sorted(key for run in seen.get(slot, []) for key in run)
        assert whole == (list(range(count)) if slots.ravel()[slot]["head"] >= 0 else [])
        sized = [len(run) for run in sorted(seen.get(slot, []), key=lambda r: r.start)]
        assert all(size <= part_tiles * TILE for size in sized[: JUDGE_PARTS - 1])


@pytest.mark.parametrize("far_keys", [64, 640, 4096])
def test_levels_are_nested_and_fill_the_tiles_they_begin(
    unit: ctypes.CDLL, far_keys: int
) -> None:
    rng = np.random.default_rng(far_keys)
    taus = (0.3, 0.1, 0.03, 0.002)
    size = sizes(far_keys + 320, levels=len(taus))
    codes = rng.gamma(2.0, 30.0, (HEADS, size.code_stride)).clip(0, 255).astype(np.uint8)
    codes[1] = 90  # all alike
    groups = np.zeros(1, GROUP)
    groups["tiles"], groups["far_keys"] = size.tiles, far_keys
    listed = np.zeros(1, np.int32)
    selections = np.zeros((HEADS, LEVELS_MAX, 2), np.int32)
    before = np.zeros((HEADS, LEVELS_MAX, size.tiles), np.int32)
    block = p.Select(sizes=size, listed=1, tile_stride=size.tiles)
    block.tau[: len(taus)] = taus
    for name, array in (
        ("groups", groups), ("group_list", listed), ("codes", codes),
        ("selections", selections), ("tile_counts", before),
    ):  # fmt: skip
        setattr(block, name, array.ctypes.data)
    unit.select_levels(ctypes.byref(block), HEADS)
    first = np.maximum(np.arange(size.tiles) * TILE - 256, 0) // 64 * 64
    mass = 2.0 ** ((np.arange(256) + 0.5) / 8 - 26)
    for h in range(HEADS):
        own = codes[h, :far_keys].astype(np.int64)
        counts = np.bincount(own, minlength=256)
        below = np.concatenate([[0], np.cumsum(counts * mass)])
        above = np.concatenate([np.cumsum(counts[::-1])[::-1], [0]])
        for level, tau in enumerate(taus):
            needed = above[np.flatnonzero(below <= tau * size.samples * (1 + 1e-5)).max()]
            room = max(-(-needed // SLOT_ROWS), 1) * SLOT_ROWS
            expected = np.flatnonzero(above <= room).min()
            assert selections[h, level].tolist() == [expected, above[expected]]
            assert above[expected] >= needed
            at = [int((own[:stop] >= expected).sum()) for stop in np.minimum(first, far_keys)]
            assert before[h, level].tolist() == at
        assert (np.diff(selections[h, : len(taus), 1]) >= 0).all()


def test_splits_are_merged_as_if_they_were_one(unit: ctypes.CDLL) -> None:
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
    unit.merge(ctypes.byref(block), len(counts) * TILE // 16)
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
    unit.merge(ctypes.byref(block), len(counts) * TILE // 16)
    assert (merged[:2] == POISON).all()
    assert not (merged[2:] == POISON).all(axis=(1, 2)).any()
    block.failed = 0
    unit.merge(ctypes.byref(block), len(counts) * TILE // 16)
    assert (returned == POISON).all()
    assert not (merged == POISON).all(axis=(1, 2)).any()


def test_judging_measures_every_level_as_it_would_run(unit: ctypes.CDLL) -> None:
    """Select, list, copy and decide in turn, levels in a policy's order; NumPy attends."""
    rng = np.random.default_rng(31)
    table = BudgetPolicy().table_taus
    taus = sorted(table)[4:]  # a table goes from the safest candidate to the cheapest
    levels, len_kv, spare = len(taus), 3 * 1024, 7
    g = FarGeometry(
        batch=1, heads_q=HEADS, heads_kv=HEADS_KV, len_q=len_kv, len_kv=len_kv, dim_qk=DIM,
        dim_v=DIM, causal=True, offset=0, group=1024, band=256, samples=16, drawn=128,
    )  # fmt: skip
    tables = far_tables(g, levels, 8, 0)
    judges, scale = len(tables.judge_tiles), 0.3
    size = sizes(len_kv, groups=g.groups, levels=levels, judges=judges, landmark_rows=1 << 16)
    key, value = (rng.standard_normal((HEADS_KV, len_kv, DIM)).astype(np.float16) for _ in "kv")
    query = rng.standard_normal((HEADS, len_kv, DIM)).astype(np.float32)
    codes = rng.normal(150, 12, (HEADS, g.groups, g.code_stride)).clip(0, 255).astype(np.uint8)
    selections = np.zeros((HEADS, g.groups, LEVELS_MAX, 2), np.int32)
    counts = np.zeros((HEADS, g.groups, LEVELS_MAX, g.tiles_per_group), np.int32)
    slots = np.zeros((HEADS, judges, levels), SLOT)
    parts = np.zeros((HEADS, judges, levels), np.int32)
    most = HEADS * judges * levels * JUDGE_PARTS
    items, sources = np.zeros(most + 1, ITEM), np.zeros(3 * most + 3, SOURCE)
    queue, places = np.zeros(4, np.int32), np.zeros(HEADS, PLACE)
    buffers = [np.full((size.landmark_rows, DIM), np.nan, np.float16) for _ in "kv"]
    pools = tables.judge_pool_rows * HEADS
    pool_key, pool_value = (rng.standard_normal((pools, DIM)) for _ in "kv")
    bias = rng.normal(2, 1, pools)
    exact = rng.standard_normal((HEADS, judges * TILE, DIM)).astype(np.float32)
    partial = np.full((HEADS, judges, levels, JUDGE_PARTS, TILE, DIM), np.nan, np.float32)
    lse = np.full(partial.shape[:-1], np.nan, np.float32)
    stats = np.zeros((HEADS, g.groups, size.samples, 4), np.float32)
    errors = np.zeros((HEADS, LEVELS_MAX + 1), np.float32)
    finished, decision = np.zeros(HEADS, np.int32), np.zeros(HEADS, np.int32)
    verdicts = np.zeros(HEADS, DECISION)
    listed = np.unique(tables.judge_groups).astype(np.int32)
    arrays = {
        "groups": tables.groups, "group_list": listed, "codes": codes,
        "selections": selections, "tile_counts": counts, "judge_tiles": tables.judge_tiles,
        "judge_groups": tables.judge_groups, "slots": slots, "parts": parts,
        "pool_first": tables.judge_pool_first, "landmark_key": buffers[0],
        "landmark_value": buffers[1], "exact": exact, "partial_out": partial,
        "partial_lse": lse, "stats": stats, "sample_rows": tables.sample_rows,
        "errors": errors, "finished": finished, "decision": decision, "verdicts": verdicts,
    }  # fmt: skip

    def run(launch: Any, block: Any, blocks: int) -> None:
        pointers = {name for name, kind in block._fields_ if kind is ctypes.c_uint64}
        for name in pointers & arrays.keys():
            setattr(block, name, arrays[name].ctypes.data)
        if isinstance(block, p.Select):
            block.decision = 0
        launch(ctypes.byref(block), blocks)

    stride = g.tiles_per_group
    select = p.Select(sizes=size, listed=len(listed), tile_stride=stride)
    select.tau[:levels] = taus
    run(unit.select_levels, select, HEADS * len(listed))
    judged = selections[..., 1][:, tables.judge_groups, :levels]
    mean = (judged * np.array(tables.judge_weights)[None, :, None]).sum(1)
    addresses = (part.ctypes.data for part in (items, sources, queue, places))
    work = p.Work(
        sizes=size, landmarks=p.List(*addresses, TILE, TILE, g.tiles, 0), tile_stride=stride,
        most_landmarks=float(np.median(mean[:, 0])), judge_weights=tables.judge_weights,
        part_tiles=1,
    )  # fmt: skip
    run(unit.work_judge, work, 1)
    assert (slots["head"] < 0).any()
    assert (parts > 1).any()
    nest = p.Nest(sizes=size, key=rows_of(key), value=rows_of(value), tile_stride=stride)
    run(unit.nest, nest, HEADS * judges * -(-len_kv // GATHER_KEYS))

    def attend(q: Any, row_first: int, run_of: list[tuple[Any, Any, Any, Any]]) -> Any:
        scores = [scale * q @ k.T.astype(np.float64) + b for k, _, b, _ in run_of]
        for s, (_, _, _, position) in zip(scores, run_of, strict=True):
            if position is not None:
                s[position[None] > row_first + np.arange(TILE)[:, None]] = -np.inf
        whole = np.concatenate(scores, 1)
        top = np.log(np.exp(whole - whole.max()).sum(1)) + whole.max()
        values = np.concatenate([v for _, v, _, _ in run_of]).astype(np.float64)
        return np.exp(whole - top[:, None]) @ values, top

    for item in items[: queue[1]]:
        slot, part = divmod(int(item["partial"]), JUDGE_PARTS)
        head, row = int(item["head"]), int(item["row_first"])
        taken = []
        for source in sources[item["first_source"] :][: item["sources"]]:
            at = slice(int(source["first_key"]), int(source["first_key"] + source["keys"]))
            if source["tensor"] == ORIGINAL:
                own = key[head // 2, at], value[head // 2, at], 0.0
                taken.append((*own, np.arange(at.start, at.stop)))
            elif source["tensor"] == POOLED:
                taken.append((pool_key[at], pool_value[at], bias[at], None))
            else:
                taken.append((buffers[0][at], buffers[1][at], 0.0, None))
        out, top = attend(query[head, row : row + TILE], row, taken)
        where = np.unravel_index(slot, (HEADS, judges, levels))
        partial[(*where, part)], lse[(*where, part)] = out, top
    decide = p.Decide(
        sizes=size, dense_tiles=tables.dense_tiles, near_tiles=tables.near_tiles,
        far_tiles=tables.far_tiles, spare_rows=spare, chunk_heads=1, exact_stride=judges * TILE,
        judge_weights=tables.judge_weights,
    )  # fmt: skip
    record = np.zeros((), TABLE)
    record["count"] = levels
    ctypes.memmove(decide.table, record.tobytes(), TABLE.itemsize)
    run(unit.decide, decide, HEADS * levels)
    for h in range(HEADS):
        for level in range(levels):
            found = verdicts["measures"]["error"][h, level]
            if slots["head"][h, 0, level] < 0:
                assert np.isinf(found)
                continue
            away = []
            for j, tile in enumerate(tables.judge_tiles):
                group, row = tables.judge_groups[j], int(tile) * TILE
                first = int(g.near_first(np.array([tile]))[0])
                own = codes[h, group, :first] >= selections[h, group, level, 0]
                chosen, near = np.flatnonzero(own), np.arange(first, row + TILE)
                start = int(tables.judge_pool_first[h, j * levels + level])
                at = slice(start, start + first // 64)
                out, _ = attend(
                    query[h, row : row + TILE], row,
                    [
                        (pool_key[at], pool_value[at], bias[at], None),
                        (key[h // 2, chosen], value[h // 2, chosen], 0.0, None),
                        (key[h // 2, near], value[h // 2, near], 0.0, near),
                    ],
                )  # fmt: skip
                away.append(np.linalg.norm(out - exact[h, j * TILE :][:TILE], axis=1))
            rms = np.sqrt(np.square(exact[h].astype(np.float64)).sum(1).mean())
            expected = -np.sort(-np.concatenate(away))[spare] / rms
            assert found == pytest.approx(expected, rel=1e-3), (h, level)
