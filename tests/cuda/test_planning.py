"""Planning on the device, as far as it needs none: tables, budgets of kernels, layouts."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.certificates.theorem import theorem_certificate
from adaattn_core.facts import RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_core.policies.table import Candidate, DecisionTable
from adaattn_core.structure import Landmark
from adaattn_cuda.facts import kernel_arithmetic
from adaattn_cuda.jit.compile import build
from adaattn_cuda.kernels.shipped import budget
from adaattn_cuda.planner import params
from adaattn_cuda.planner.drawing import most_landmarks, theorem_factors
from adaattn_cuda.planner.layout import CERTIFICATE, DECISION, kept_layout, scratch_layout
from adaattn_cuda.planner.specs import kernel_specs
from adaattn_cuda.work.far import (
    GROUP,
    PROBE_SPLITS_MAX,
    SLOT,
    far_tables,
    probe_splits,
)
from adaattn_cuda.work.far_geometry import POOL_KEYS, TILE, FarGeometry


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


@pytest.mark.parametrize("length", [4096, 32_768])
def test_judged_counts_stand_for_all_far_tiles(length: int) -> None:
    """Where landmarks are a share of the far keys, that share of all far keys is expected."""
    g = geometry(len_q=length, len_kv=length)
    tables = far_tables(g, 3, 132, 0)
    judged = tables.groups["far_keys"][tables.judge_groups]
    first = g.near_first(np.arange(g.tiles))
    expected = 0.1 * first[first > 0].mean()
    found = sum(w * 0.1 * keys for w, keys in zip(tables.judge_weights, judged, strict=True))
    assert found == pytest.approx(expected, rel=1e-6)
    # Many in every group but the first ones: never more than if no group had fewer.
    assert sum(tables.judge_weights) < 1


def test_without_a_causal_mask_judged_groups_count_alike() -> None:
    tables = far_tables(geometry(causal=False), 3, 132, 0)
    assert tables.judge_weights == (0.5, 0.5)


@settings(max_examples=40)
@given(geometries(), st.integers(1, 40))
def test_probing_blocks_cover_the_keys(g: FarGeometry, listed: int) -> None:
    keys, splits = probe_splits(g, listed, 132)
    assert keys % TILE == 0
    assert (splits - 1) * keys < g.len_kv <= splits * keys
    assert splits <= PROBE_SPLITS_MAX


def test_few_groups_are_probed_by_more_blocks() -> None:
    g = geometry(len_q=32_768, len_kv=32_768, heads_q=9, heads_kv=3)
    blocks = [g.units * listed * probe_splits(g, listed, 132)[1] for listed in (2, 30)]
    assert blocks[0] >= 132
    assert blocks[1] >= 8 * g.units * 30


def test_no_more_landmarks_are_judged_than_could_pay() -> None:
    g = geometry(len_q=32_768, len_kv=32_768)
    tables = far_tables(g, 1, 132, 0)
    plan = HeadPlan(structure=Landmark(tau=0.1, group=1024, band=256, tile=128))
    candidate = Candidate(plan, fixed=0.2, slope=1.5)
    table = DecisionTable((candidate,), HeadPlan(), 0.06, 0.0, 0.95)
    most = most_landmarks(table, tables)
    share = (tables.near_tiles + tables.far_tiles * most / TILE) / tables.dense_tiles
    assert candidate.fixed + candidate.slope * share == pytest.approx(table.worthwhile)
    assert most_landmarks(replace(table, worthwhile=0.1), tables) == 0
    assert np.isfinite(most_landmarks(replace(table, worthwhile=math.inf), tables))


@pytest.mark.parametrize("heads", [1, 9])
def test_bits_of_the_last_tile_do_not_depend_on_how_many_heads_there_are(heads: int) -> None:
    """Its exact rows are an output, so their keys are split alike."""
    g = geometry(heads_q=heads, heads_kv=1)
    for tables in (far_tables(g, 2, 132, 0), far_tables(g, 0, 132, 0, given=True)):
        assert tables.front_tiles >= 1
        last = np.arange(g.len_q - TILE, g.len_q)
        np.testing.assert_array_equal(tables.drawn_rows[0, :TILE], last)
        assert (tables.exact.sources["keys"] <= 2048).all()
        count = tables.first_partial[1]
        own = tables.exact.sources[: int(count)]
        assert own["keys"].tolist() == [2048] * 4
    assert far_tables(g, 0, 132, 0).front_tiles == 0


@settings(max_examples=60)
@given(
    st.floats(-30, 30), st.floats(-30, 30), st.floats(-30, 30), st.sampled_from([0.01, 0.125]),
    st.sampled_from(["bf16", "f16"]),
)  # fmt: skip
def test_factors_of_the_theorem_bound_it_everywhere(
    value: float, query: float, key: float, scale: float, dtype: str
) -> None:
    """Of norms between 2^-30 and 2^30."""
    g = geometry(len_q=16_384, len_kv=16_384, dim_v=128)
    a, b, c = theorem_factors(g, dtype, scale)
    norms = [2.0**x for x in (value, query, key)]
    tiny = 2.0**-126 * math.sqrt(128)
    facts = RunFacts(
        keys_max=g.len_kv, value_norm_upper=norms[0], query_norm_upper=norms[1],
        key_norm_upper=norms[2], value_residual_upper=tiny, query_residual_upper=tiny,
        key_residual_upper=tiny, value_diameter_upper=2 * norms[0], score_residual_upper=0.0,
        dropped_mass_upper=0.0, bias_max_abs=0.0, sink_abs=0.0, output_rms=1.0,
        arithmetic=kernel_arithmetic(dtype, dtype, g.dim_qk, g.len_kv, 32),
    )  # fmt: skip
    said = theorem_certificate(
        facts, HeadPlan(qk=dtype, pv=dtype), len_q=g.len_q, dim_qk=g.dim_qk, dim_v=g.dim_v,
        scale=scale, dtype=dtype,
    ).upper  # fmt: skip
    found = norms[0] * (a + b * norms[1] * norms[2]) + c
    assert said <= found * (1 + 2.0**-16)
    assert found <= said * 1.01 or b * norms[1] * norms[2] > 0.1  # and it is no looser
