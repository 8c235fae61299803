"""Drawn rows in f64, by the kernel's own source on a CPU, against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from kernels_on_cpu import Kernels, allocate, play_device
from sm80_on_cpu import problem, task_of

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import exact_attention
from adaattn_cuda.kernels import smxx_exact_rows as exact_rows

RNG = np.random.default_rng(0)
MASKS = {
    "none": (None, (60, 300)),
    "causal": (Mask.causal("bottom_right"), (200, 260)),
    "window": (Mask.sliding_window(40, 3, "top_left"), (100, 120)),
    "lengths": (Mask.key_lengths([70, 0]), (40, 90)),
    "boolean": (Mask.boolean(RNG.random((2, 4, 50, 140)) < 0.4), (50, 140)),
    "additive": (Mask.additive(RNG.standard_normal((140,)).astype(np.float32)), (50, 140)),
}


def figures(p: AttentionProblem, out: np.ndarray, **rules: object):
    task, room, _ = task_of(p, p.dtype, p.dtype, None, **rules)  # type: ignore[arg-type]
    room[...] = out
    rng = np.random.default_rng(1)
    rows = {
        i: rng.integers(0, p.sequences[i[0]].len_q, 7)
        for i in p.heads()
        if p.sequences[i[0]].len_q
    }
    return rows, room, exact_rows.row_figures(task, rows, allocate, 0)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_errors_are_the_truth(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, dtype: str, name: str
) -> None:
    play_device(monkeypatch, kernels, "sm_80")
    mask, lens = MASKS[name]
    p = problem(dtype, lens, (40, 136), heads=(4, 2), batch=2, mask=mask)
    exact = exact_attention(p)
    out = exact.out + 0.1 * np.random.default_rng(2).standard_normal(exact.out.shape)
    rows, given, found = figures(p, out)
    for (sequence, head), chosen in rows.items():
        span = p.sequences[sequence]
        where = span.batch, head, span.q_start + chosen
        error = np.linalg.norm(given[where].astype(np.float64) - exact.out[where], axis=1)
        norm = np.linalg.norm(exact.out[where], axis=1)
        query, key, value = (
            np.linalg.norm(x.astype(np.float64), axis=-1).max()
            for x in (p.query, p.key, p.value)
        )
        upper = exact_rows.oracle_upper(40, span.len_kv, p.scale * query * key + 4, value)
        assert upper < 1e-10
        allowed = upper + exact.error_upper[sequence, head]
        assert np.abs(found[sequence, head][:, 0] - error).max() <= allowed
        assert np.abs(found[sequence, head][:, 1] - norm).max() <= allowed


def test_softcap_and_sinks(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    play_device(monkeypatch, kernels, "sm_80")
    plain = problem("f32", (60, 200), heads=(2, 1), mask=Mask.causal("bottom_right"))
    sinks = np.array([1.5, -np.inf], np.float32)
    p = AttentionProblem.from_arrays(
        plain.query * 4, plain.key, plain.value, mask=plain.mask, softcap=3.0, sinks=sinks
    )
    exact = exact_attention(p)
    rows, given, found = figures(p, exact.out, softcap=3.0, sinks=sinks)
    for (sequence, head), chosen in rows.items():
        error = np.linalg.norm(
            given[sequence, head, chosen].astype(np.float64)
            - exact.out[sequence, head, chosen],
            axis=1,
        )
        assert np.abs(found[sequence, head][:, 0] - error).max() <= 1e-11


def test_what_no_row_sees_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels
) -> None:
    play_device(monkeypatch, kernels, "sm_80")
    p = problem("f32", (40, 90), mask=Mask.key_lengths([60]))
    before = figures(p, np.zeros((1, 1, 40, 64)))[2][0, 0]
    p.key[:, :, 60:], p.value[:, :, 60:] = np.nan, np.inf
    after = figures(p, np.zeros((1, 1, 40, 64)))[2][0, 0]
    np.testing.assert_array_equal(before, after)
    p.value[0, 0, 10, 3] = np.nan
    assert np.isnan(figures(p, np.zeros((1, 1, 40, 64)))[2][0, 0]).all()
