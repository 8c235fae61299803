"""Work records cover every visible pair exactly once, and blocks share them evenly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core.mask import Mask
from adaattn_core.problem import SequenceSpan
from adaattn_cuda.work.geometry import UNLIMITED, Geometry
from adaattn_cuda.work.records import (
    ITEM,
    MASK_INTERVAL,
    NO_PARTIAL,
    SOURCE,
    WorkList,
    work_list,
)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, Mask]:
    """Ragged sequences, back to back, under a window mask."""
    lens = draw(
        st.lists(st.tuples(st.integers(0, 400), st.integers(0, 500)), min_size=1, max_size=4)
    )
    spans, q, kv = [], 0, 0
    for i, (len_q, len_kv) in enumerate(lens):
        spans.append(SequenceSpan(i, 0, q, q + len_q, kv, kv + len_kv))
        q, kv = q + len_q, kv + len_kv
    heads_kv = draw(st.integers(1, 2))
    left, right = (draw(st.none() | st.integers(0, 300)) for _ in range(2))
    alignment = draw(st.sampled_from(["top_left", "bottom_right"]))
    mask = Mask.sliding_window(left, right, alignment)
    geometry = Geometry(
        tuple(spans), 2 * heads_kv, heads_kv, 64, 64, alignment == "bottom_right", left, right
    )
    return geometry, mask


def flat(work: WorkList) -> np.ndarray:
    """Return the items that a kernel would run: each column up to its first empty one."""
    columns = []
    records = work.items
    for block in range(records.shape[1]):
        rows = records["rows"][:, block]
        stop = int(np.argmax(rows == 0)) if (rows == 0).any() else len(rows)
        assert (rows[stop:] == 0).all()
        columns.append(records[:stop, block])
    return np.concatenate(columns) if columns else np.empty(0, records.dtype)


@given(geometries(), st.sampled_from([(128, 128), (192, 112)]), st.integers(1, 20))
def test_every_row_once_with_the_keys_of_its_mask(case, tile, blocks) -> None:
    geometry, mask = case
    tile_m, tile_n = tile
    work = work_list(geometry, tile_m, tile_n, blocks)
    assert work.grid <= blocks
    seen: dict[tuple[int, int], int] = {}
    for r in flat(work):
        span = next(
            s for s in geometry.spans if s.q_start <= r["row_first"] < s.q_stop and s.len_q
        )
        first_row = r["row_first"] - span.q_start
        start, stop = mask.intervals(span.len_q, span.len_kv)
        assert (r["sources"], r["partial"], r["heads"]) == (1, NO_PARTIAL, 1)
        source = work.sources[r["first_source"]]
        assert source["head"] == r["head"] // (geometry.heads_q // geometry.heads_kv)
        assert source["mask"] == MASK_INTERVAL
        assert r["tiles"] == -(-source["keys"] // tile_n) >= 1
        for i in range(r["rows"]):
            seen[int(r["head"]), int(r["row_first"] + i)] = (
                seen.get((int(r["head"]), int(r["row_first"] + i)), 0) + 1
            )
            # The kernel's own rule (mask/interval.cuh), on positions of the source's keys.
            low = max(r["key_start"], r["start_offset"] + i, source["position"])
            high = min(r["key_stop"], r["stop_offset"] + i, source["position"] + source["keys"])
            expected = (start[first_row + i], stop[first_row + i])
            if expected[0] < expected[1]:
                assert (low, high) == expected
                assert source["first_key"] - source["position"] == span.kv_start
            else:
                assert low >= high
    rows = {(h, i) for h in range(geometry.heads_q) for i in range(geometry.spans[-1].q_stop)}
    assert seen == dict.fromkeys(rows, 1)


def test_rows_without_keys_get_a_tile_outside_the_array() -> None:
    geometry = Geometry((SequenceSpan(0, 0, 0, 5, 0, 0),), 1, 1, 64, 64)
    work = work_list(geometry, 128, 128, 4)
    record = flat(work)[0]
    assert (record["rows"], record["tiles"], record["key_stop"]) == (5, 1, 0)
    assert work.sources[record["first_source"]]["first_key"] == UNLIMITED


def test_nothing_to_do() -> None:
    geometry = Geometry((SequenceSpan(0, 0, 0, 0, 0, 9),), 2, 1, 64, 64)
    assert work_list(geometry, 128, 128, 4).items.shape == (0, 0)


def causal(length: int, heads: int) -> Geometry:
    return Geometry(
        (SequenceSpan(0, 0, 0, length, 0, length),), heads, heads, 128, 128, right=0
    )


@pytest.mark.parametrize(("length", "heads"), [(1024, 16), (4096, 16), (16_384, 16)])
def test_blocks_carry_equal_loads(length: int, heads: int) -> None:
    records = work_list(causal(length, heads), 128, 128, 132).items
    loads = (records["tiles"] + (records["rows"] > 0)).sum(0)
    longest = records["tiles"].max() + 1
    assert loads.max() <= loads.mean() + longest
    if length == 16_384:
        assert loads.max() <= 1.01 * loads.mean()


def test_longest_first() -> None:
    """Within what fits L2 together, no block meets a longer item after a shorter one."""
    tiles = work_list(causal(4096, 4), 128, 128, 132).items["tiles"]
    assert (np.diff(tiles, axis=0) <= 0).all()


def test_heads_that_share_l2_run_together() -> None:
    """At 16k keys of 128 + 128 columns, four heads fill a section: earlier heads come first."""
    records = work_list(causal(16_384, 8), 128, 128, 132).items
    section = records["head"] // 4
    valid = records["rows"] > 0
    assert (np.diff(np.where(valid, section, 9), axis=0) >= 0).all()


def test_tables_are_read_where_they_were_written() -> None:
    work = work_list(causal(256, 1), 128, 128, 2)
    data = work.tobytes()
    items, sources = work.addresses(0)
    assert items % 16 == sources % 16 == 0
    found = np.frombuffer(data, SOURCE, offset=sources)
    assert (found == work.sources).all()
    assert (np.frombuffer(data, ITEM, work.items.size) == work.items.reshape(-1)).all()
    assert work.max_sources == 1


def test_chosen_heads_alone() -> None:
    """Heads of a sequence that are not asked for have no item, and no sequence has others'."""
    spans = (SequenceSpan(0, 0, 0, 200, 0, 300), SequenceSpan(1, 1, 0, 200, 0, 300))
    geometry = Geometry(spans, 4, 2, 64, 64, heads=((0, 3), (1, 0), (0, 3)))
    work = work_list(geometry, 128, 128, 132)
    found = flat(work)
    assert sorted(zip(found["batch"], found["head"], found["row_first"], strict=True)) == [
        (0, 3, 0), (0, 3, 128), (1, 0, 0), (1, 0, 128)
    ]  # fmt: skip
    heads_kv = work.sources[found["first_source"]]["head"]
    assert (heads_kv == found["head"] // 2).all()
    nothing = work_list(Geometry(spans, 4, 2, 64, 64, heads=()), 128, 128, 132)
    assert (nothing.grid, nothing.rounds) == (0, 0)


EXTREMES = st.none() | st.sampled_from([0, UNLIMITED - 1, UNLIMITED, 2**31 - 1, 2**63 - 1])


@given(EXTREMES, EXTREMES, st.booleans())
def test_windows_saturate(left: int | None, right: int | None, bottom_right: bool) -> None:
    """Windows near the integers' limits see what the mask says, on the longest arrays."""
    spans = (SequenceSpan(0, 0, UNLIMITED - 3, UNLIMITED, 0, UNLIMITED),)
    work = work_list(Geometry(spans, 1, 1, 64, 64, bottom_right, left, right), 128, 128, 4)
    item = work.items[0, 0]
    limit = 2**31 - 1
    for i in range(3):
        # As the kernel adds: every sum must stay within 32 bits.
        low, high = int(item["start_offset"]) + i, int(item["stop_offset"]) + i
        assert -limit <= low <= limit
        assert -limit <= high <= limit
        seen = max(int(item["key_start"]), low), min(int(item["key_stop"]), high)
        position = i + (UNLIMITED - 3 if bottom_right else 0)
        start = 0 if left is None else max(position - left, 0)
        stop = UNLIMITED if right is None else min(position + right + 1, UNLIMITED)
        assert seen == (start, stop)
