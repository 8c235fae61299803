"""Judging, by the planning kernels' own source on a CPU: levels, their landmarks and items."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from far_on_cpu import DIM, HEADS, HEADS_KV, PLACE, POISON, SLOT_ROWS, rows_of, sizes

from adaattn_core.policies import BudgetPolicy
from adaattn_core.policies.table import TABLE
from adaattn_cuda.planner import params as p
from adaattn_cuda.planner.layout import DECISION
from adaattn_cuda.planner.specs import GATHER_KEYS
from adaattn_cuda.work.far import GROUP, JUDGE_PARTS, LEVELS_MAX, SLOT, far_tables
from adaattn_cuda.work.far_geometry import TILE, FarGeometry
from adaattn_cuda.work.records import ITEM, ORIGINAL, POOLED, SOURCE


@pytest.mark.parametrize("tiles", [12, 71, 75])
def test_a_judged_tile_has_the_landmarks_of_every_level_in_its_first_rows(
    far_unit: ctypes.CDLL, tiles: int
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
    far_unit.nest(ctypes.byref(block), HEADS * 2 * -(-len_kv // GATHER_KEYS))
    np.testing.assert_array_equal(buffers[0], wanted[0])
    np.testing.assert_array_equal(buffers[1], wanted[1])


@pytest.mark.parametrize(("part_tiles", "most"), [(100, 1e9), (3, 1e9), (1, 500.0)])
def test_judged_items_share_the_landmarks_of_a_slot(
    far_unit: ctypes.CDLL, part_tiles: int, most: float
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
    far_unit.work_judge(ctypes.byref(block), 1)
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
    far_unit: ctypes.CDLL, far_keys: int
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
    far_unit.select_levels(ctypes.byref(block), HEADS)
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


def test_judging_measures_every_level_as_it_would_run(far_unit: ctypes.CDLL) -> None:
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
    run(far_unit.select_levels, select, HEADS * len(listed))
    judged = selections[..., 1][:, tables.judge_groups, :levels]
    mean = (judged * np.array(tables.judge_weights)[None, :, None]).sum(1)
    addresses = (part.ctypes.data for part in (items, sources, queue, places))
    work = p.Work(
        sizes=size, landmarks=p.List(*addresses, TILE, TILE, g.tiles, 0), tile_stride=stride,
        most_landmarks=float(np.median(mean[:, 0])), judge_weights=tables.judge_weights,
        part_tiles=1,
    )  # fmt: skip
    run(far_unit.work_judge, work, 1)
    assert (slots["head"] < 0).any()
    assert (parts > 1).any()
    nest = p.Nest(sizes=size, key=rows_of(key), value=rows_of(value), tile_stride=stride)
    run(far_unit.nest, nest, HEADS * judges * -(-len_kv // GATHER_KEYS))

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
    run(far_unit.decide, decide, HEADS * levels)
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
