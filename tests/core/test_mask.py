"""Mask: what each row sees, against the definition written out key by key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core.errors import ArgumentError, ShapeError
from adaattn_core.mask import Mask

LENGTHS = st.integers(0, 12)
SIDES = st.one_of(st.none(), st.integers(0, 12))
ALIGNMENTS = st.sampled_from(("top_left", "bottom_right"))


def _seen(mask: Mask, len_q: int, len_kv: int) -> np.ndarray:
    start, stop = mask.intervals(len_q, len_kv)
    assert (start >= 0).all()
    assert (start <= stop).all()
    assert (stop <= len_kv).all()
    keys = np.arange(len_kv)
    return (keys >= start[:, None]) & (keys < stop[:, None])


@given(len_q=LENGTHS, len_kv=LENGTHS, left=SIDES, right=SIDES, alignment=ALIGNMENTS)
def test_window_key_by_key(
    len_q: int, len_kv: int, left: int | None, right: int | None, alignment: str
) -> None:
    mask = Mask.sliding_window(left, right, alignment=alignment)  # type: ignore[arg-type]
    offset = len_kv - len_q if alignment == "bottom_right" else 0
    expected = np.zeros((len_q, len_kv), bool)
    for row in range(len_q):
        for key in range(len_kv):
            behind = row + offset - key
            expected[row, key] = (left is None or behind <= left) and (
                right is None or -behind <= right
            )
    np.testing.assert_array_equal(_seen(mask, len_q, len_kv), expected)


@given(len_q=LENGTHS, len_kv=LENGTHS)
def test_causal_corners(len_q: int, len_kv: int) -> None:
    shape = (len_q, len_kv)
    top = _seen(Mask.causal("top_left"), *shape)
    bottom = _seen(Mask.causal("bottom_right"), *shape)
    np.testing.assert_array_equal(top, np.tri(*shape, dtype=bool))
    np.testing.assert_array_equal(bottom, np.tri(*shape, k=len_kv - len_q, dtype=bool))


@given(len_q=LENGTHS, len_kv=LENGTHS)
def test_no_mask_sees_everything(len_q: int, len_kv: int) -> None:
    for mask in (Mask.none(), Mask.sliding_window(None, None), Mask.boolean(np.ones(1, bool))):
        assert _seen(mask, len_q, len_kv).all()


def test_kinds_combine_once() -> None:
    allowed, bias = np.ones((1, 1, 1, 4), bool), np.zeros((1, 1, 1, 4), np.float32)
    mask = Mask.causal() & Mask.key_lengths([3]) & Mask.boolean(allowed) & Mask.additive(bias)
    assert (mask.alignment, mask.right, mask.lengths) == ("equal", 0, (3,))
    assert mask.allowed is allowed
    assert mask.bias is bias
    assert not mask.is_structural
    assert mask.describe() == "causal (equal) & key lengths & boolean & additive"
    for again in (
        Mask.causal(),
        Mask.sliding_window(3),
        Mask.key_lengths([1]),
        Mask.boolean(allowed),
        Mask.additive(bias),
    ):
        with pytest.raises(ArgumentError, match="each kind of mask at most once"):
            mask & again


def test_combining_with_nothing_changes_nothing() -> None:
    mask = Mask.sliding_window(2, 1, alignment="top_left")
    for both in (mask & Mask.none(), Mask.none() & mask):
        assert (both.left, both.right, both.alignment) == (2, 1, "top_left")


def test_facts() -> None:
    assert Mask.causal().is_causal
    assert not Mask.sliding_window(4).is_causal
    assert Mask.sliding_window(4).has_window
    assert not Mask.none().has_window
    assert Mask.ragged([0, 2], [0, 3]).is_structural
    assert Mask.none().describe() == "none"
    assert Mask.sliding_window(4, 1).describe() == "window 4/1 (equal)"
    assert Mask.ragged([0, 2], [0, 3]).describe() == "ragged"


@pytest.mark.parametrize("side", [-1, 2.5, "3"])
def test_window_sides_are_counts(side: object) -> None:
    for arguments in ((side, 0), (0, side)):
        with pytest.raises(ArgumentError, match="whole number"):
            Mask.sliding_window(*arguments)  # type: ignore[arg-type]


def test_lengths_are_not_rounded() -> None:
    with pytest.raises(ArgumentError, match="whole numbers"):
        Mask.key_lengths([3.7])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="whole numbers"):
        Mask.ragged([0, 2.0], [0, 2])  # type: ignore[list-item]
    assert Mask.key_lengths(np.array([3, 1])).lengths == (3, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cu_q", "cu_kv"),
    [([0], [0]), ([1, 2], [0, 2]), ([0, 3, 2], [0, 1, 2]), ([0, 1], [0, 1, 2])],
    ids=["too short", "not from 0", "decreasing", "different counts"],
)
def test_bad_prefix_sums(cu_q: list[int], cu_kv: list[int]) -> None:
    with pytest.raises(ShapeError):
        Mask.ragged(cu_q, cu_kv)


def test_unknown_alignment() -> None:
    with pytest.raises(ArgumentError, match="top_left is PyTorch"):
        Mask.causal("left")  # type: ignore[arg-type]
