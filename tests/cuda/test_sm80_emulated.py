"""The sm80 kernel's own source, run on a CPU: layouts, masks, pipeline, rows without a key.

Only the instruction header is replaced (by emulation/adaattn/ptx/sm80.cuh); everything else
is what a GPU runs. The tolerance is one rounding of each operand and of the output.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sm80_on_cpu import DTYPES, UNIT, Emulator, aligned, assert_close, problem

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import exact_attention


def check(
    emulator: Emulator, p: AttentionProblem, qk: str, pv: str | None = None, **choices: Any
) -> None:
    pv = pv or qk
    out, lse, _ = emulator.run(p, qk, pv, **choices)
    exact = exact_attention(p)
    assert_close(out, exact.out, UNIT[qk] + UNIT[pv] + UNIT[p.dtype])
    reached = np.isfinite(exact.lse)
    np.testing.assert_array_equal(np.isfinite(lse), reached)
    np.testing.assert_array_equal(lse[~reached], exact.lse[~reached])
    spread = np.abs(lse[reached] - exact.lse[reached])
    size = np.maximum(np.abs(exact.lse[reached]), 1.0)
    assert (spread <= 8 * (UNIT[qk] if qk != p.dtype else 2.0**-20) * size).all()


@pytest.mark.parametrize(
    ("dtype", "qk", "pv"),
    [
        ("bf16", "bf16", "bf16"),
        ("f16", "f16", "f16"),
        ("f32", "f32", "f32"),
        ("f32", "tf32", "tf32"),
        ("f32", "bf16", "tf32"),
        ("f32", "f32", "f16"),
        ("bf16", "f32", "f32"),
        ("bf16", "f16", "bf16"),
    ],
)
def test_formats(emulator: Emulator, dtype: str, qk: str, pv: str) -> None:
    check(emulator, problem(dtype, (40, 201)), qk, pv)


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [("bf16", (128, 128)), ("bf16", (96, 160)), ("bf16", (256, 256)), ("f32", (32, 256))],
)
def test_dims(emulator: Emulator, dtype: str, dims: tuple[int, int]) -> None:
    check(emulator, problem(dtype, (30, 150), dims), dtype)


@pytest.mark.parametrize("dims", [(40, 40), (37, 51), (1, 1)])
def test_padded_and_unaligned_dims(emulator: Emulator, dims: tuple[int, int]) -> None:
    check(emulator, problem("bf16", (30, 150), dims), "bf16")


MASKS = {
    "causal top left": (Mask.causal("top_left"), (150, 70)),
    "causal bottom right": (Mask.causal("bottom_right"), (140, 200)),
    "causal, first rows see nothing": (Mask.causal("bottom_right"), (150, 9)),
    "window": (Mask.sliding_window(40, 20, "bottom_right"), (255, 191)),
    "window, one side": (Mask.sliding_window(None, 3, "top_left"), (70, 300)),
    "no key at all": (Mask.key_lengths([0]), (20, 70)),
}


@pytest.mark.parametrize("name", MASKS)
def test_interval_masks(emulator: Emulator, name: str) -> None:
    mask, lens = MASKS[name]
    check(emulator, problem("bf16", lens, mask=mask), "bf16")


def test_grouped_heads_lengths_and_batches(emulator: Emulator) -> None:
    mask = Mask.key_lengths([70, 0, 33]) & Mask.causal("bottom_right")
    check(emulator, problem("bf16", (60, 70), heads=(4, 2), batch=3, mask=mask), "bf16")


def test_ragged(emulator: Emulator) -> None:
    mask = Mask.ragged([0, 30, 30, 100], [0, 20, 50, 90]) & Mask.sliding_window(
        5, 2, "bottom_right"
    )
    check(emulator, problem("bf16", (100, 90), heads=(2, 2), mask=mask), "bf16")


def test_more_sequences_than_one_launch_takes(emulator: Emulator) -> None:
    cu = list(range(0, 2 * 140 + 1, 2))
    p = problem("bf16", (cu[-1], cu[-1]), (32, 32), mask=Mask.ragged(cu, cu))
    check(emulator, p, "bf16")


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_array_masks(emulator: Emulator, dtype: str) -> None:
    rng = np.random.default_rng(1)
    allowed = rng.random((1, 2, 40, 70)) < 0.3
    allowed[0, 0, 3] = False
    check(emulator, problem(dtype, (40, 70), heads=(2, 2), mask=Mask.boolean(allowed)), dtype)
    bias = rng.standard_normal((2, 1, 1, 70)).astype(np.float32)
    bias[..., :5] = -np.inf
    mask = Mask.additive(bias) & Mask.causal("top_left")
    check(emulator, problem(dtype, (40, 70), heads=(2, 1), batch=2, mask=mask), dtype)
    both = Mask.additive(bias[:1].astype(DTYPES[dtype])) & Mask.boolean(allowed)
    check(emulator, problem(dtype, (40, 70), heads=(2, 1), mask=both), dtype)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("lowest", [-3.4028235e38, -3.3895e38])
def test_finite_mask_entries_hide_no_row(emulator: Emulator, dtype: str, lowest: float) -> None:
    """A row of nothing but the lowest finite number is the mean of its values."""
    bias = np.zeros((1, 1, 40, 70), np.float32)
    bias[..., 3, :] = bias[..., 20:, 50:] = lowest
    bias[..., 7, :], bias[..., 7, 11] = lowest, 0.75 * lowest  # the larger takes the row
    p = problem(dtype, (40, 70), heads=(2, 1), mask=Mask.additive(bias))
    out, lse, _ = emulator.run(p, dtype, dtype)
    assert_close(out, exact_attention(p).out, 2 * UNIT[dtype] + UNIT[p.dtype])
    assert np.isfinite(lse).all()


@given(
    st.lists(
        st.sampled_from([0.0, -1.0, 2.0, -1e4, -1e9, -1e30, 1e9, -3.4e38, -2.4e38, -np.inf]),
        min_size=70,
        max_size=70,
    )
)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_masks_of_any_size(emulator: Emulator, entries: list[float]) -> None:
    """-inf hides a key and nothing else does; a row that sees one has a finite lse."""
    bias = np.tile(np.array(entries, np.float32), (40, 1))
    p = problem("f32", (40, 70), mask=Mask.additive(bias))
    out, lse, _ = emulator.run(p, "f32", "f32")
    if np.isneginf(bias).all():
        assert (out == 0).all()
        assert np.isneginf(lse).all()
        return
    assert np.isfinite(lse).all()
    # What float32 makes of score + mask, exactly softmaxed.
    scores = (p.query[0, 0].astype(np.float64) @ p.key[0, 0].astype(np.float64).T) * p.scale
    sums = (scores + bias).astype(np.float32).astype(np.float64)
    weights = np.exp(sums - sums.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    # Sums of 1e4 and more are rounded to that much: the weights then differ by as much.
    size = np.abs(bias[np.isfinite(bias) & (bias > bias.max() - 40)]).max()
    unit = 2.0**-20 + (size * 2.0**-22 if size < 1e8 else 0)
    assert_close(out[0, 0], weights @ p.value[0, 0].astype(np.float64), 2 * unit)


OVERFLOWS = {
    "all scores to -inf": (1e20, -1e20),
    "all scores to inf": (1e20, 1e20),
}


@pytest.mark.parametrize("masked", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize("name", OVERFLOWS)
def test_overflowing_scores_are_not_a_hidden_key(
    emulator: Emulator, name: str, masked: str
) -> None:
    """A row that sees keys is NaN, out and lse alike; one that sees none is 0 and -inf."""
    query, key = OVERFLOWS[name]
    q, k, v = (aligned(np.full((1, 1, 50, 32), x, np.float32)) for x in (query, key, 1.0))
    allowed = np.tril(np.ones((50, 50), bool), -3)
    mask = {
        "none": None,
        "causal": Mask.causal("top_left"),
        "boolean": Mask.boolean(allowed),
        "additive": Mask.additive(np.where(allowed, 0, -np.inf).astype(np.float32)),
    }[masked]
    p = AttentionProblem.from_arrays(q, k, v, mask=mask)
    out, lse, _ = emulator.run(p, "f32", "f32")
    sees = allowed.any(1) if masked in ("boolean", "additive") else np.ones(50, bool)
    assert np.isnan(out[0, 0, sees]).all()
    assert np.isnan(lse[0, 0, sees]).all()
    assert (out[0, 0, ~sees] == 0).all()
    assert np.isneginf(lse[0, 0, ~sees]).all()


@pytest.mark.parametrize("masked", ["window", "boolean"])
def test_nan_queries_of_rows_that_see_nothing(emulator: Emulator, masked: str) -> None:
    allowed = np.ones((30, 40), bool)
    allowed[4] = False
    mask = Mask.boolean(allowed) if masked == "boolean" else Mask.causal("bottom_right")
    lens = (30, 40) if masked == "boolean" else (30, 20)
    p = problem("bf16", lens, mask=mask)
    p.query[0, 0, 4] = np.nan
    out, lse, _ = emulator.run(p, "bf16", "bf16")
    assert (out[0, 0, 4] == 0).all()
    assert np.isneginf(lse[0, 0, 4])
    p.query[0, 0, 20] = np.nan  # one that sees keys says so
    out, lse, _ = emulator.run(p, "bf16", "bf16")
    assert np.isnan(out[0, 0, 20]).all()
    assert np.isnan(lse[0, 0, 20])


@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e30])
def test_scales_of_any_size(emulator: Emulator, scale: float) -> None:
    """Scores that only the scale makes huge, and ones that it makes small again."""
    p = problem("f32", (40, 70))
    size = np.float32(scale**-0.5)
    scaled = AttentionProblem.from_arrays(
        aligned(p.query * size), aligned(p.key * size), p.value, scale=scale * 32**-0.5
    )
    out, _, _ = emulator.run(scaled, "f32", "f32")
    assert_close(out, exact_attention(scaled).out, 2.0**-18)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_86"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_nonfinite_values_reach_the_rows_that_see_them(
    emulator: Emulator, dtype: str, arch: str
) -> None:
    """On sm_86 a single stage holds K and V, so V arrives at another time."""
    p = problem(dtype, (50, 300), (128, 128), mask=Mask.causal("bottom_right"))
    p.value[0, 0, 270, 3] = np.nan
    p.value[0, 0, 280, 5] = np.inf
    p.key[0, 0, 290] = np.nan
    check(emulator, p, dtype, arch=arch)


@pytest.mark.parametrize(
    ("dtype", "qk", "pv"),
    [
        ("bf16", "bf16", "bf16"),
        ("f32", "f32", "f32"),
        ("f32", "f32", "f16"),
    ],
)
@pytest.mark.parametrize("masked", ["lengths", "boolean", "additive", "causal"])
def test_nothing_leaks_from_hidden_keys(
    emulator: Emulator, masked: str, dtype: str, qk: str, pv: str
) -> None:
    """Whatever they hold: not finite, or finite until it is rounded to an operand."""
    allowed = np.ones((1, 1, 50, 90), bool)
    allowed[..., 60:] = allowed[..., 7, :] = False
    mask = {
        "lengths": Mask.key_lengths([60]),
        "boolean": Mask.boolean(allowed),
        "additive": Mask.additive(np.where(allowed, 0, -np.inf).astype(np.float32)),
        "causal": Mask.causal("top_left"),  # rows 0 to 49: nobody sees key 50
    }[masked]
    ordinary = problem(dtype, (50, 90), mask=mask)
    expected = emulator.run(ordinary, qk, pv)[:2]
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    for held in (np.nan, np.inf, -np.inf, largest, -largest):
        p = problem(dtype, (50, 90), mask=mask)
        p.value[:, :, 60:], p.key[:, :, 60:] = held, held
        for found, wanted in zip(emulator.run(p, qk, pv)[:2], expected, strict=True):
            assert found.tobytes() == wanted.tobytes(), held


@pytest.mark.parametrize("operand", ["f32", "f16"])
@pytest.mark.parametrize("array", ["query", "key", "value"])
@pytest.mark.parametrize("held", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_becomes_finite(
    emulator: Emulator, array: str, held: float, operand: str
) -> None:
    """In no operand format: f16 saturates finite numbers only."""
    p = problem("f32", (3, 1))
    getattr(p, array)[0, 0, 0, 5] = held
    out, lse, _ = emulator.run(p, operand, operand)
    rows = slice(0, 1) if array == "query" else slice(None)
    assert not np.isfinite(out[0, 0, rows, 5]).any()
    assert np.isnan(lse[0, 0, rows]).all() or array == "value"


def test_huge_scores_stay_one_hot(emulator: Emulator) -> None:
    """Scores beyond float32's integers: no overflow, and the largest key takes the row."""
    p = problem("f32", (50, 90))
    huge = AttentionProblem.from_arrays(
        p.query * np.float32(1e15), p.key * np.float32(1e4), p.value
    )
    out, _, _ = emulator.run(huge, "f32", "f32")
    assert_close(out, exact_attention(huge).out, 1e-6)


def test_only_the_asked_heads_are_written(emulator: Emulator) -> None:
    p = problem("bf16", (40, 70), heads=(4, 2))
    out, lse, _ = emulator.run(p, "bf16", "bf16", heads=((0, 1), (0, 3)))
    assert (out[0, [0, 2]] == 7).all()
    assert (lse[0, [0, 2]] == 7).all()
    exact = exact_attention(p).out[:, [1, 3]]
    assert_close(out[:, [1, 3]], exact, 3 * UNIT["bf16"])


def test_strided_layouts(emulator: Emulator) -> None:
    rng = np.random.default_rng(2)
    shape = (1, 80, 2, 64)
    q, k, v = (aligned(rng.standard_normal(shape).astype(DTYPES["bf16"])) for _ in range(3))
    check(emulator, AttentionProblem.from_arrays(q, k, v, layout="bshd"), "bf16")
    wide = aligned(rng.standard_normal((1, 2, 80, 65)).astype(DTYPES["bf16"]))[..., :64]
    check(emulator, AttentionProblem.from_arrays(wide, wide, wide), "bf16")


def test_result_does_not_depend_on_the_batch(emulator: Emulator) -> None:
    p = problem("bf16", (70, 90), batch=2, mask=Mask.causal("bottom_right"))
    one = AttentionProblem.from_arrays(p.query[1:], p.key[1:], p.value[1:], mask=p.mask)
    both, _, _ = emulator.run(p, "bf16", "bf16")
    alone, _, _ = emulator.run(one, "bf16", "bf16")
    np.testing.assert_array_equal(both[1:], alone)
