"""Work lists that a device writes, by the kernels' own source on a CPU, against the host's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from far_on_cpu import DIM, PLACE, SLOT_ROWS, sizes
from numpy.typing import NDArray

from adaattn_cuda.planner import params as p
from adaattn_cuda.work.far import (
    LEVELS_MAX,
    SLOT,
    WIDE,
    exact_work,
    far_tables,
)
from adaattn_cuda.work.far_geometry import TILE, FarGeometry
from adaattn_cuda.work.records import ITEM, ORIGINAL, POOLED, SOURCE


def told(table: NDArray[Any], keys: NDArray[Any]) -> list[tuple[int, ...]]:
    """Items that were written, in some order, each with the keys that it visits."""
    names = ("batch", "head", "row_first", "rows", "tiles", "stop_offset", "key_stop")
    table = table[(table["rows"] > 0) & (table["key_stop"] != 9)]
    of = keys[table["first_source"]]
    return sorted(
        (*(int(item[n]) for n in names), int(k["head"]), int(k["keys"]), int(k["mask"]))
        for item, k in zip(table, of, strict=True)
    )


@pytest.mark.parametrize("blocks", [0, 7, 1000])
@pytest.mark.parametrize("narrow", [False, True])
def test_lists_hold_every_tile_of_every_head_once(
    far_unit: ctypes.CDLL, blocks: int, narrow: bool
) -> None:
    """Exact heads have the items that the host would list; the others go by landmarks.

    With heads in 8 bits there are two lists of exact ones.
    """
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
    exact_tiles, narrow_tiles = -(-g.len_q // tile_m), -(-g.len_q // TILE)
    if narrow:
        decision[[3, 10]] = WIDE
    made: dict[str, Any] = {}
    lists = {}
    listed_as = [("landmarks", TILE, TILE, g.tiles - 1), ("exact", tile_m, TILE, exact_tiles)]
    if narrow:
        listed_as.append(("narrow", TILE, 256, narrow_tiles))
    for stem, tile, tile_n, tiles in listed_as:
        made[stem] = (
            np.full(g.heads * tiles + 3 * blocks + 1, 9, ITEM),
            np.zeros(3 * (g.heads * tiles + 3 * blocks + 1), SOURCE),
            np.zeros(4, np.int32), np.zeros(g.heads, PLACE),
        )  # fmt: skip
        addresses = (part.ctypes.data for part in made[stem])
        dealt = 0 if stem == "landmarks" else blocks
        lists[stem] = p.List(*addresses, tile, tile_n, tiles, dealt)
    block = p.Work(
        sizes=size, **lists, tile_stride=g.tiles_per_group, section_heads=2,
    )  # fmt: skip
    threads = -(-g.heads * g.tiles // 256) * 256
    items_block = p.ListItems(
        sizes=size, **lists, tile_stride=g.tiles_per_group, tail=1, landmark_threads=threads,
        exact_threads=g.heads * exact_tiles,
    )  # fmt: skip
    arrays = {
        "groups": tables.groups, "selections": selections, "tile_counts": before,
        "decision": decision, "slots": slots, "pool_first": tables.pool_first, "kept": kept,
    }  # fmt: skip
    for name, array in arrays.items():
        for parameters in (block, items_block):
            if name in {field[0] for field in parameters._fields_}:
                setattr(parameters, name, array.ctypes.data)
    far_unit.work(ctypes.byref(block), 1)
    threads += g.heads * (exact_tiles + narrow * narrow_tiles)
    far_unit.list(ctypes.byref(items_block), -(-threads // 256))
    # The last head's landmarks found no room: it is exact now.
    wide = WIDE if narrow else -1
    assert decision.tolist() == [2, -1, 0, wide, -1, 1, 0, 1, -1, 2, wide, -1]
    if narrow:
        items, sources, queue, _ = made["narrow"]
        assert (queue[0], queue[1]) == (0, (decision == -1).sum() * narrow_tiles)
        wanted = exact_work(g, TILE, 256, 5)
        expected = wanted.items.reshape(-1)
        first = decision[expected["batch"] * g.heads_q + expected["head"]] == -1
        assert told(items, sources) == told(expected[first], wanted.sources)
    items, sources, queue, _ = made["exact"]
    assert (queue[0], queue[1]) == (0, (decision <= wide).sum() * exact_tiles)
    if blocks and not narrow:
        rounds = len(items) // blocks
        columns = [
            items[: rounds * blocks].reshape(rounds, blocks)[:, b] for b in range(blocks)
        ]
        columns = [c[: np.flatnonzero(c["rows"] == 0)[0]] for c in columns]
        loads = [int(c["tiles"].sum()) for c in columns]
        assert max(loads) - min(loads) <= items["tiles"].max()
        listed = np.concatenate(columns)
    elif narrow:
        listed = items
    else:
        listed = items[: queue[1]]
        assert items[queue[1]]["rows"] == 0
        rising, falling = np.diff(listed["row_first"].astype(np.int64).reshape(2, -1))
        assert (rising >= 0).all()  # a section begins with what the one before ended with
        assert (falling <= 0).all()
    wanted = exact_work(g, tile_m, TILE, 5)
    expected = wanted.items.reshape(-1)
    dense = decision[expected["batch"] * g.heads_q + expected["head"]] <= wide
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
