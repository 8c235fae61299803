"""AttentionProblem: everything is checked at the door, and the sizes are right behind it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from adaattn_core.errors import AdaAttnError, ArgumentError, DTypeError, ShapeError
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import visible_tile
from adaattn_core.testing.strategies import problem_specs


def _arrays(
    q: tuple[int, ...] = (2, 4, 5, 8),
    k: tuple[int, ...] = (2, 2, 7, 8),
    v: tuple[int, ...] = (2, 2, 7, 3),
    dtype: Any = np.float32,
) -> list[Any]:
    return [np.zeros(shape, dtype) for shape in (q, k, v)]


def test_sizes() -> None:
    problem = AttentionProblem.from_arrays(*_arrays())
    assert (problem.batch, problem.heads_q, problem.heads_kv, problem.group_size) == (
        2,
        4,
        2,
        2,
    )
    assert (problem.len_q, problem.len_kv, problem.dim_qk, problem.dim_v) == (5, 7, 8, 3)
    assert problem.scale == 1 / 8**0.5
    assert (problem.dtype, problem.device) == ("f32", "cpu")
    assert list(problem.heads()) == [(b, h) for b in range(2) for h in range(4)]
    assert problem.visible_scores(0) == 35


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float64, "f64"), (np.float16, "f16"), (ml_dtypes.bfloat16, "bf16")],
)
def test_dtype_names(dtype: Any, name: str) -> None:
    assert AttentionProblem.from_arrays(*_arrays(dtype=dtype)).dtype == name


def test_layout_is_a_view() -> None:
    arrays = _arrays((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 3))
    problem = AttentionProblem.from_arrays(*arrays, layout="bshd")
    assert problem.query.shape == (2, 4, 5, 8)
    assert np.shares_memory(problem.query, arrays[0])


@pytest.mark.parametrize(
    ("shapes", "error"),
    [
        ({"q": (4, 5, 8)}, ShapeError),
        ({"q": (3, 4, 5, 8)}, ShapeError),
        ({"v": (1, 2, 7, 3)}, ShapeError),
        ({"k": (2, 2, 6, 8)}, ShapeError),
        ({"v": (2, 1, 7, 3)}, ShapeError),
        ({"k": (2, 2, 7, 9)}, ShapeError),
        ({"q": (2, 3, 5, 8)}, ShapeError),
        ({"q": (2, 0, 5, 8)}, ShapeError),
        ({"q": (2, 4, 5, 0), "k": (2, 2, 7, 0)}, ShapeError),
        ({"v": (2, 2, 7, 0)}, ShapeError),
        ({"dtype": np.int32}, DTypeError),
        ({"dtype": np.complex64}, DTypeError),
    ],
)
def test_arrays_that_do_not_fit(shapes: dict[str, Any], error: type[AdaAttnError]) -> None:
    with pytest.raises(error) as caught:
        AttentionProblem.from_arrays(*_arrays(**shapes))
    assert str(caught.value).count("\n") == 2


def test_mixed_dtypes_are_named() -> None:
    q, k, v = _arrays()
    with pytest.raises(DTypeError, match="value: f64"):
        AttentionProblem.from_arrays(q, k, v.astype(np.float64))


def test_lists_are_not_arrays() -> None:
    with pytest.raises(DTypeError, match="query of type list"):
        AttentionProblem.from_arrays([[1.0]], *_arrays()[1:])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ArgumentError, match="scale"):
        AttentionProblem.from_arrays(*_arrays(), scale=scale)


def test_unknown_layout() -> None:
    with pytest.raises(ArgumentError, match="bshd"):
        AttentionProblem.from_arrays(*_arrays(), layout="sbhd")


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (np.ones((5, 7), bool), ArgumentError),
        (Mask.causal(), ShapeError),
        (Mask.sliding_window(3), ShapeError),
        (Mask.key_lengths([3]), ShapeError),
        (Mask.key_lengths([3, 8]), ShapeError),
        (Mask.key_lengths([3, -1]), ShapeError),
        (Mask.ragged([0, 5], [0, 7]), ShapeError),
        (Mask.boolean(np.ones((2, 4, 5, 6), bool)), ShapeError),
        (Mask.boolean(np.ones((1, 2, 1, 4, 5, 7), bool)), ShapeError),
        (Mask.boolean(np.ones((5, 7), np.float32)), DTypeError),
        (Mask.boolean(np.ones((5, 7), np.int64)), DTypeError),
        (Mask.boolean([[True]]), DTypeError),
        (Mask.additive(np.ones((5, 7), bool)), DTypeError),
        (Mask.key_lengths([3, 3]) & Mask.ragged([0, 5], [0, 7]), AdaAttnError),
    ],
)
def test_masks_that_do_not_fit(mask: Any, error: type[AdaAttnError]) -> None:
    with pytest.raises(error) as caught:
        AttentionProblem.from_arrays(*_arrays(), mask=mask)
    assert str(caught.value).count("\n") == 2


def test_alignment_is_needed_only_where_lengths_differ() -> None:
    q, k, v = _arrays(k=(2, 2, 5, 8), v=(2, 2, 5, 3))
    AttentionProblem.from_arrays(q, k, v, mask=Mask.causal())
    with pytest.raises(ShapeError, match="nothing is guessed"):
        AttentionProblem.from_arrays(q, k, v, mask=Mask.causal() & Mask.key_lengths([5, 4]))
    AttentionProblem.from_arrays(*_arrays(), mask=Mask.sliding_window(None, None))


def test_ragged_sequences() -> None:
    arrays = _arrays((1, 4, 6, 8), (1, 2, 9, 8), (1, 2, 9, 3))
    mask = Mask.ragged([0, 2, 2, 6], [0, 0, 4, 9])
    problem = AttentionProblem.from_arrays(*arrays, mask=mask)
    assert [(s.len_q, s.len_kv) for s in problem.sequences] == [(2, 0), (0, 4), (4, 5)]
    assert [problem.visible_scores(i) for i in range(3)] == [0, 0, 20]
    assert len(list(problem.heads())) == 12


def test_bottom_right_counts_valid_keys_only() -> None:
    mask = Mask.causal("bottom_right") & Mask.key_lengths([7, 5])
    problem = AttentionProblem.from_arrays(*_arrays(), mask=mask)
    assert problem.intervals(0)[1].tolist() == [3, 4, 5, 6, 7]
    assert problem.intervals(1)[1].tolist() == [1, 2, 3, 4, 5]


@given(spec=problem_specs())
def test_visible_scores_count_the_intervals(spec: Any) -> None:
    problem = spec.build()
    for sequence in problem.sequences:
        rows = np.arange(sequence.len_q)
        structural = AttentionProblem.from_arrays(
            problem.query,
            problem.key,
            problem.value,
            mask=_structural(problem.mask),
        )
        visible, _ = visible_tile(structural, (sequence.index, 0), rows, 0, sequence.len_kv)
        assert problem.visible_scores(sequence.index) == visible.sum()


def _structural(mask: Mask) -> Mask:
    return Mask(
        mask.alignment,
        mask.left,
        mask.right,
        mask.lengths,
        mask.cu_seqlens_q,
        mask.cu_seqlens_kv,
    )
