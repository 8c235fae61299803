"""Planning on the device, as far as it needs none: tables, budgets of kernels, layouts."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_cuda.jit.compile import build
from adaattn_cuda.kernels.shipped import budget
from adaattn_cuda.planner import params
from adaattn_cuda.planner.layout import CERTIFICATE, DECISION, kept_layout, scratch_layout
from adaattn_cuda.planner.specs import kernel_specs
from adaattn_cuda.work.far import GROUP, POOL_KEYS, SLOT, TILE, FarGeometry, far_tables


def geometry(**changes: Any) -> FarGeometry:
    sizes = dict(
        batch=1, heads_q=6, heads_kv=2, len_q=8192, len_kv=8192, dim_qk=64, dim_v=64,
        causal=True, offset=0, group=1024, band=256, samples=32, drawn=128,
    )  # fmt: skip
    return FarGeometry(**(sizes | changes))


@st.composite
def geometries(draw: st.DrawFn) -> FarGeometry:
    heads_kv, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    len_q = draw(st.integers(1, 6000))
    causal = draw(st.booleans())
    offset = draw(st.integers(0, 3000)) if causal else 0
    len_kv = len_q + offset if causal else draw(st.integers(1, 9000))
    return geometry(
        batch=draw(st.integers(1, 2)), heads_q=heads_kv * ratio, heads_kv=heads_kv,
        len_q=len_q, len_kv=len_kv, causal=causal, offset=offset,
        group=draw(st.sampled_from([256, 1024, 2048])),
        band=draw(st.sampled_from([0, 64, 256])), drawn=draw(st.integers(1, 200)),
    )  # fmt: skip


@settings(max_examples=60)
@given(geometries(), st.integers(0, 7), st.integers(0, 2**32))
def test_every_visible_key_is_near_or_far_exactly_once(
    g: FarGeometry, levels: int, seed: int
) -> None:
    tables = far_tables(g, levels, 132, seed)
    tile = np.arange(g.tiles, dtype=np.int64)
    first, stop = g.near_first(tile), g.near_stop(tile)
    last_row = np.minimum((tile + 1) * TILE, g.len_q) - 1
    assert (first % POOL_KEYS == 0).all()  # so far keys are whole pools
    assert (stop >= g.visible(last_row)).all()  # what is not far is near
    # No row sees less than its tile's far field: pools need no mask.
    assert (first <= g.visible(tile * TILE)).all()
    groups = tables.groups
    assert groups["tiles"].sum() == g.tiles
    of_group = np.repeat(np.arange(len(groups)), groups["tiles"])
    assert (first <= groups["far_keys"][of_group]).all()
    pools = groups["far_keys"] // POOL_KEYS
    ends = groups["pool_first"] + pools
    assert (ends[:-1] <= groups["pool_first"][1:]).all()
    assert ends[-1] <= tables.pool_rows


@settings(max_examples=60)
@given(geometries(), st.integers(0, 7), st.integers(0, 2**32))
def test_rows_are_those_of_their_group_and_exact_rows_see_what_they_see(
    g: FarGeometry, levels: int, seed: int
) -> None:
    tables = far_tables(g, levels, 132, seed)
    rows = tables.sample_rows.astype(np.int64)
    group = np.arange(g.groups)[:, None]
    assert (rows // g.group == group).all()
    assert (rows < g.len_q).all()
    assert (np.diff(rows, axis=1) >= 0).all()  # the kernels take the first as the least
    drawn, stops = tables.drawn_rows.astype(np.int64), tables.drawn_stops
    assert (drawn >= 0).all()
    assert (drawn < g.len_q).all()
    assert (stops == g.visible(drawn)).all()
    assert (np.diff(stops.reshape(g.heads, -1, TILE), axis=2) >= 0).all()
    # The splits of a tile of rows cover what its last row sees, once.
    splits = np.diff(tables.first_partial)
    sources = tables.exact.sources
    for tile_of_rows, first in enumerate(tables.first_partial[:-1]):
        own = sources[first : first + splits[tile_of_rows]]
        assert own["first_key"][0] == 0
        assert (own["first_key"][1:] == np.cumsum(own["keys"])[:-1]).all()
        last = stops.reshape(-1, TILE)[tile_of_rows].max()
        assert own["keys"].sum() >= last
        assert own["keys"].sum() <= g.len_kv
    items = tables.exact.items[tables.exact.items["rows"] > 0]
    assert sorted(items["partial"]) == list(range(int(tables.first_partial[-1])))


def test_drawn_rows_are_uniform_and_other_seeds_draw_others() -> None:
    g = geometry(drawn=256, heads_q=60, heads_kv=2)
    first, second = (far_tables(g, 0, 132, seed).drawn_rows for seed in (0, 1))
    assert not np.array_equal(first, second)
    counts = np.bincount(first.ravel() * 8 // g.len_q, minlength=8)
    # 15,360 draws in 8 stretches: 1,920 each, standard deviation 41.
    assert np.abs(counts - first.size / 8).max() < 5 * 41
    assert len({tuple(row) for row in first}) == g.heads  # every head has its own


def test_judged_rows_come_before_those_that_certify() -> None:
    g = geometry()
    tables = far_tables(g, 5, 132, 3)
    judged = (tables.judge_tiles[:, None] * TILE + np.arange(TILE)).ravel()
    width = len(judged)
    assert (tables.drawn_rows[:, :width] == judged).all()
    unjudged = far_tables(g, 0, 132, 3)
    assert np.array_equal(unjudged.drawn_rows, tables.drawn_rows[:, width:])


def test_parts_of_an_allocation_do_not_overlap() -> None:
    g = geometry()
    for layout in (
        kept_layout(g),
        scratch_layout(g, far_tables(g, 6, 132, 0), 6, 4096, 43, 132),
    ):
        end = 0
        for first, size in layout.parts.values():
            assert first % 256 == 0
            assert first >= end
            end = first + size
        assert end <= layout.size


SPECS = {
    "dim 64, three query heads a key head": (geometry(), "bf16", None),
    "dim 128, four": (
        geometry(heads_q=8, heads_kv=2, dim_qk=128, dim_v=128),
        "f16",
        ("probe_stats", "probe_mass", "pool", "fit", "exact"),
    ),
}


@pytest.mark.nvrtc
@pytest.mark.parametrize("case", SPECS)
def test_kernels_keep_their_budgets(case: str) -> None:
    g, dtype, names = SPECS[case]
    found = kernel_specs(g, dtype, 6)
    for name in names or found:
        spec, _ = found[name]
        built = build(spec)
        assert budget(spec).violations(built.resources, spec.smem_bytes) == [], name


def test_records_have_the_size_of_their_twins() -> None:
    assert (GROUP.itemsize, SLOT.itemsize) == (16, 16)
    assert (DECISION.itemsize, CERTIFICATE.itemsize) == (128, 32)
    assert ctypes.sizeof(params.Sizes) == 88
