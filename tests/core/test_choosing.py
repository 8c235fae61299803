"""Which keys follow from sampled masses: blocks, fields and landmarks, by laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core.choosing import (
    LANDMARK_STEP,
    Fields,
    block_groups,
    choose_blocks,
    heaviest,
    landmark_count,
    probe_draws,
)
from adaattn_core.structure import BlockSparse, Landmark

MASSES = st.lists(st.integers(0, 5), min_size=1, max_size=200)


@given(MASSES, st.data())
def test_the_heaviest_are_as_many_as_asked_and_outweigh_the_rest(masses, data) -> None:
    mass = np.array(masses, np.float32)
    count = data.draw(st.integers(0, len(mass)))
    chosen = heaviest(mass, np.sort(mass), count)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    others = np.delete(mass, chosen)
    if 0 < count < len(mass):
        assert mass[chosen].min() >= others.max()


@given(st.integers(0, 500), st.integers(0, 500))
def test_landmarks_come_in_steps_as_far_as_there_are_keys(needed, keys) -> None:
    needed = min(needed, keys)
    count = landmark_count(needed, keys)
    assert needed <= count <= keys
    assert count == keys or count % LANDMARK_STEP == 0


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(1, 4))
def test_draws_are_distinct_members_and_repeat(size, seed, clusters) -> None:
    structure = Landmark(samples=16)
    drawn = probe_draws(structure, slice(128, 128 + size), clusters, size, seed)
    assert drawn.shape == (clusters, min(max(16 // clusters, 1), size))
    for row in drawn:
        assert len(set(row.tolist())) == len(row)
        assert ((row >= 0) & (row < size)).all()
    again = probe_draws(structure, slice(128, 128 + size), clusters, size, seed)
    np.testing.assert_array_equal(drawn, again)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(-40, 300), st.booleans())
def test_a_row_sees_its_near_field_and_keys_before_it(len_q, len_kv, offset, causal) -> None:
    stop = np.clip(np.arange(len_q) + 1 + offset, 0, len_kv)
    if not causal:
        stop = np.full(len_q, len_kv)
    structure = Landmark(pool=16, tile=32, band=32, group=64, tail=32)
    fields = Fields.of_intervals(structure, np.zeros(len_q, np.int64), stop, len_kv)
    if fields is None:  # no row sees a key, and more than one row is there
        assert causal
        assert not stop.any()
        return
    first, last = fields.near_of_rows(np.arange(len_q))
    assert (first % 16 == 0).all()
    if fields.causal:  # what lies behind the near field is hidden
        assert (np.minimum(stop, last) == stop).all()
    covered = [row for group in fields.groups() for row in range(group.start, group.stop)]
    assert covered + list(range(*fields.tail.indices(len_q))) == list(range(len_q))
    for group in fields.groups():
        assert fields.keys_of(group) >= stop[group].max()


def test_windows_and_holes_have_no_fields() -> None:
    rows = np.arange(64)
    assert Fields.of_intervals(Landmark(), np.maximum(rows - 8, 0), rows + 1, 64) is None
    assert Fields.of_intervals(Landmark(), 0 * rows, np.where(rows == 9, 3, rows), 64) is None


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.9])
def test_blocks_leave_the_mass_that_was_allowed_to_others(tau: float) -> None:
    rng = np.random.default_rng(0)
    structure = BlockSparse(
        tau=max(tau, 1e-9), band=0, tile_q=32, tile_kv=32, group=64, samples=8
    )
    mass = rng.dirichlet(np.full(256, 0.05)).astype(np.float32)
    groups = block_groups(structure, 128, 7)
    assert [group for group, _ in groups] == [slice(0, 64), slice(64, 128)]
    every = np.full(128, 256)
    chosen = choose_blocks(
        structure, [g for g, _ in groups], [mass] * 2, np.zeros(128, np.int64), every, 256
    )
    assert len(chosen) == 4
    for blocks in chosen:
        kept = sum(float(mass[32 * b : 32 * b + 32].sum()) for b in blocks)
        assert kept >= 1 - tau - 1e-5
