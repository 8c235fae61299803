"""The quantiser of the reference, by its definition: scales, codes, centres."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from adaattn_core.formats import SCALE_BLOCKS, get_format
from adaattn_reference import quantise

ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 150), st.sampled_from((1, 8, 16))),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def groups_of(kind: str, operand: str, length: int) -> NDArray[np.int64]:
    blocks = SCALE_BLOCKS[kind]
    groups: NDArray[np.int64] = getattr(blocks, f"{operand}_groups")(length)
    return groups


@given(
    x=ROWS,
    kind=st.sampled_from(sorted(SCALE_BLOCKS)),
    operand=st.sampled_from(("query", "key")),
)
def test_codes_stand_for_the_nearest_multiples_of_their_groups_step(
    x: NDArray[np.float32], kind: str, operand: str
) -> None:
    groups = groups_of(kind, operand, len(x))
    codes, steps = quantise.codes(x, groups, "i8")
    assert np.abs(codes).max() <= 127
    assert (codes == np.rint(codes)).all()
    lost = np.abs(x.astype(np.float64) - codes * steps.astype(np.float64)[groups][:, None])
    assert (lost <= 0.501 * steps[groups][:, None]).all()
    for group, step in enumerate(steps):
        largest = max(np.abs(x[groups == group]).max(), quantise.TINY)
        assert step == pytest.approx(largest / 127, rel=1e-6)


@given(x=ROWS)
def test_values_keep_four_bits_of_what_is_not_tiny_beside_their_tile(
    x: NDArray[np.float32],
) -> None:
    groups = SCALE_BLOCKS["tile"].value_groups(len(x))
    held, steps = quantise.dequantised(x, groups, "e4m3")
    lost = np.abs(x.astype(np.float64) - held)
    allowed = 2.0**-4 * np.abs(x.astype(np.float64)) + 2.0**-10 * steps[groups][:, None]
    assert (lost <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_a_lane_of_a_quad_has_one_scale_for_its_keys_of_a_tile(length: int) -> None:
    groups = SCALE_BLOCKS["tile"].key_groups(length)
    key = np.arange(length)
    for group in range(int(groups.max()) + 1):
        own = key[groups == group]
        assert len({(j // 64, j % 8 // 2) for j in own.tolist()}) == 1
        assert len(own) <= 16
    assert (SCALE_BLOCKS["tile"].value_groups(length) == key // 256).all()
    assert (SCALE_BLOCKS["tile"].query_groups(length) == key).all()


def test_what_is_not_finite_sets_no_scale() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    groups = SCALE_BLOCKS["tile"].key_groups(64)
    _, steps = quantise.codes(x, groups, "i8")
    x[0, 0], x[3, 1] = np.nan, np.inf
    with_holes = x.copy()
    with_holes[0, 0] = with_holes[3, 1] = 0
    codes, again = quantise.codes(x, groups, "i8")
    assert np.isnan(codes[0, 0])
    assert np.isinf(codes[3, 1])
    np.testing.assert_array_equal(again, quantise.codes(with_holes, groups, "i8")[1])
    assert (again <= steps).all()


@given(
    x=hnp.arrays(np.float32, (37, 4), elements=st.floats(-100, 100, width=32)),
    shift=st.floats(-1e4, 1e4, width=32),
)
def test_a_centre_lies_among_the_keys(x: NDArray[np.float32], shift: float) -> None:
    key = x + np.float32(shift)
    centre = quantise.centre(key, np.ones(len(key), bool))
    slack = 1e-5 * np.abs(key).max() + 1e-30
    assert (centre >= key.min(axis=0) - slack).all()
    assert (centre <= key.max(axis=0) + slack).all()


def test_one_outlying_key_moves_no_centre() -> None:
    rng = np.random.default_rng(1)
    key = rng.standard_normal((64, 16)).astype(np.float32)
    seen: Any = np.ones(64, bool)
    before = quantise.centre(key, seen)
    key[5] = 1e6
    assert np.abs(quantise.centre(key, seen) - before).max() < 1
    key[6] = np.nan  # counts as 0
    assert np.isfinite(quantise.centre(key, seen)).all()


def test_hidden_keys_set_no_centre() -> None:
    rng = np.random.default_rng(2)
    key = rng.standard_normal((50, 8)).astype(np.float32)
    seen = np.arange(50) < 30
    before = quantise.centre(key, seen)
    key[30:] = 1e30
    np.testing.assert_array_equal(quantise.centre(key, seen), before)
    assert (quantise.centre(key, np.zeros(50, bool)) == 0).all()


@pytest.mark.parametrize("name", ["i8", "e4m3"])
def test_zeros_and_denormals(name: str) -> None:
    x = np.zeros((64, 8), np.float32)
    x[1] = 1e-42
    held, steps = quantise.dequantised(x, SCALE_BLOCKS["tile"].key_groups(64), name)
    assert np.isfinite(held).all()
    assert (steps > 0).all()
    assert np.abs(held - x).max() <= quantise.TINY / get_format(name).max_finite
