"""Work lists of given blocks visit every visible pair in the blocks once, and no other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.mask import Mask
from adaattn_core.problem import SequenceSpan
from adaattn_core.structure import BlockSparse, block_mask
from adaattn_cuda.work.geometry import UNLIMITED, Geometry
from adaattn_cuda.work.records import ITEM, SOURCE
from adaattn_cuda.work.runs import (
    block_runs,
    computed_scores,
    is_complete,
    run_list,
    visible_scores,
)


@st.composite
def cases(draw: st.DrawFn):
    """Ragged sequences under a window, each with blocks of its own."""
    lens = draw(
        st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=3)
    )
    spans, q, kv = [], 0, 0
    for i, (len_q, len_kv) in enumerate(lens):
        spans.append(SequenceSpan(i, 0, q, q + len_q, kv, kv + len_kv))
        q, kv = q + len_q, kv + len_kv
    left, right = (draw(st.none() | st.integers(0, 200)) for _ in range(2))
    alignment = draw(st.sampled_from(["top_left", "bottom_right"]))
    geometry = Geometry(tuple(spans), 4, 2, 64, 64, alignment == "bottom_right", left, right)
    tile_q, tile_kv = draw(st.sampled_from([(128, 64), (32, 16), (100, 48), (256, 128)]))
    share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kept = [rng.random((-(-s.len_q // tile_q), -(-s.len_kv // tile_kv))) < share for s in spans]
    structures = [
        BlockSparse.from_mask(array, tile_q=tile_q, tile_kv=tile_kv) for array in kept
    ]
    return geometry, Mask.sliding_window(left, right, alignment), kept, structures


def wanted(mask: Mask, span: SequenceSpan, kept: np.ndarray, structure: BlockSparse):
    """Return what the mask shows, and what of it lies in the blocks."""
    start, stop = mask.intervals(span.len_q, span.len_kv)
    key = np.arange(span.len_kv)
    seen = (key >= start[:, None]) & (key < stop[:, None])
    whole = kept.repeat(structure.tile_q, 0).repeat(structure.tile_kv, 1)
    return seen, seen & whole[: span.len_q, : span.len_kv]


def visited(work, geometry: Geometry, span: SequenceSpan, head: int) -> np.ndarray:
    """How often each (row, key) is visited and shown, by the rules of the kernels."""
    times = np.zeros((span.len_q, span.len_kv), int)
    for item in work.items.reshape(-1):
        row = int(item["row_first"]) - span.q_start
        mine = item["head"] == head and 0 <= row < span.len_q and item["rows"]
        if not mine:
            continue
        assert item["sources"] >= 1
        first = int(item["first_source"])
        for source in work.sources[first : first + int(item["sources"])]:
            assert source["head"] == head // 2
            if source["first_key"] == UNLIMITED:
                assert item["key_stop"] == 0
                continue
            assert source["first_key"] - source["position"] == span.kv_start
            position = source["position"] + np.arange(source["keys"])
            r = np.arange(item["rows"])[:, None]
            low = np.maximum(item["key_start"], item["start_offset"] + r)
            high = np.minimum(item["key_stop"], item["stop_offset"] + r)
            rows = slice(row, row + int(item["rows"]))
            times[rows, position] += (position >= low) & (position < high)
    return times


@settings(deadline=None)
@given(cases(), st.sampled_from([64, 128, 192]), st.sampled_from([None, 3, 132]))
def test_every_pair_in_the_blocks_once(case, tile_m: int, blocks: int | None) -> None:
    geometry, mask, kept, structures = case
    runs = [
        block_runs(s.blocks, s, geometry, span, tile_m)
        for span, s in zip(geometry.spans, structures, strict=True)
    ]
    heads = [(span, head, runs[span.index]) for span in geometry.spans for head in (0, 1, 3)]
    work = run_list(geometry, heads, 64, blocks)
    assert work.items.dtype == ITEM
    assert work.sources.dtype == SOURCE
    for span in geometry.spans:
        structure, own = structures[span.index], runs[span.index]
        seen, expected = wanted(mask, span, kept[span.index], structure)
        assert computed_scores(own, geometry, span) == expected.sum()
        assert visible_scores(geometry, span) == seen.sum()
        if is_complete(own, geometry, span):
            assert (expected == seen).all()
        elif structure.tile_q >= tile_m or (expected == seen).all():
            # What a tile's rows may see together includes what no row of it sees.
            assert not kept[span.index].all()
        for head in (0, 1, 3):
            times = visited(work, geometry, span, head)
            np.testing.assert_array_equal(times, expected)
        rows = [
            (int(i["row_first"]), int(i["rows"]))
            for i in work.items.reshape(-1)
            if i["head"] == 1 and i["rows"] and span.q_start <= i["row_first"] < span.q_stop
        ]
        assert sum(n for _, n in rows) == span.len_q
        assert all(n <= tile_m for _, n in rows)


def test_neighbouring_tiles_with_the_same_blocks_are_joined() -> None:
    span = SequenceSpan(0, 0, 0, 256, 0, 256)
    geometry = Geometry((span,), 1, 1, 64, 64)
    kept = np.zeros((8, 4), bool)
    kept[:3, 1] = kept[3:, 2] = True
    structure = BlockSparse(tile_q=32, tile_kv=64, group=32, blocks=block_mask(kept))
    runs = block_runs(structure.blocks, structure, geometry, span, 128)
    assert runs.rows.tolist() == [96, 128, 32]
    assert runs.first.tolist() == [64, 128, 128]


@pytest.mark.parametrize("blocks", [None, 4])
def test_longest_items_come_first(blocks: int | None) -> None:
    span = SequenceSpan(0, 0, 0, 1024, 0, 1024)
    geometry = Geometry((span,), 1, 1, 64, 64, False, None, 0)
    structure = BlockSparse.from_mask(np.tri(8, 16, dtype=bool) | (np.arange(16) < 2))
    runs = block_runs(structure.blocks, structure, geometry, span, 128)
    work = run_list(geometry, [(span, 0, runs)], 64, blocks)
    tiles = work.items["tiles"]
    assert (np.diff(tiles.reshape(-1)[: 4 if blocks else None].astype(int)) <= 0).all()
