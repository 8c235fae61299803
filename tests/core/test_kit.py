"""The kit's own tools: the oracle against attention written out in Python, the error measures
against their definitions, the strategies against what they promise to draw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from adaattn_core.formats import FORMATS
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.homes import ArrayHome
from adaattn_core.testing.oracles import (
    cosine_similarity,
    exact_attention,
    naive_attention,
    relative_frobenius,
    relative_l1,
    rms_row_norm,
    rmse,
    row_errors,
    row_norms,
    row_quantile,
)
from adaattn_core.testing.strategies import (
    STORAGES,
    VALUES,
    MaskSpec,
    ProblemSpec,
    mask_specs,
    problem_specs,
)

TINY = problem_specs(lengths=st.integers(0, 7), dims=st.integers(1, 4), values=("normal",))


def _sees(problem: AttentionProblem, b: int, h: int, i: int, j: int) -> bool:
    """Whether row i may see key j of the arrays, from the words of `Mask` alone."""
    mask, len_q, len_kv, row, key = problem.mask, problem.len_q, problem.len_kv, i, j
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_kv is not None:
        cu_q, cu_kv = mask.cu_seqlens_q, mask.cu_seqlens_kv
        own = max(s for s in range(len(cu_q) - 1) if cu_q[s] <= i)
        if not cu_kv[own] <= j < cu_kv[own + 1]:
            return False
        row, key = i - cu_q[own], j - cu_kv[own]
        len_q, len_kv = cu_q[own + 1] - cu_q[own], cu_kv[own + 1] - cu_kv[own]
    if mask.lengths is not None:
        len_kv = mask.lengths[b]
    position = row + (len_kv - len_q if mask.alignment == "bottom_right" else 0)
    full = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
    return (
        key < len_kv
        and (mask.left is None or key >= position - mask.left)
        and (mask.right is None or key <= position + mask.right)
        and (mask.allowed is None or bool(np.broadcast_to(mask.allowed, full)[b, h, i, j]))
        and (mask.bias is None or np.broadcast_to(mask.bias, full)[b, h, i, j] != -np.inf)
    )


def _attention_by_hand(problem: AttentionProblem) -> tuple[np.ndarray, np.ndarray]:
    shape = (problem.batch, problem.heads_q, problem.len_q)
    out, lse = np.zeros((*shape, problem.dim_v)), np.full(shape, -np.inf)
    full = (*shape, problem.len_kv)
    for b, h, i in np.ndindex(shape):
        kv = h // (problem.heads_q // problem.heads_kv)
        scores = {}
        for j in range(problem.len_kv):
            if _sees(problem, b, h, i, j):
                products = problem.query[b, h, i].astype(float) * problem.key[b, kv, j].astype(
                    float
                )
                bias = 0.0
                if problem.mask.bias is not None:
                    bias = float(np.broadcast_to(problem.mask.bias, full)[b, h, i, j])
                scores[j] = problem.scale * math.fsum(products) + bias
        if scores:
            top = max(scores.values())
            total = math.fsum(math.exp(s - top) for s in scores.values())
            lse[b, h, i] = top + math.log(total)
            for c in range(problem.dim_v):
                column = problem.value[b, kv, :, c].astype(float)
                terms = (math.exp(s - top) * column[j] for j, s in scores.items())
                out[b, h, i, c] = math.fsum(terms) / total
    return out, lse


@given(spec=TINY)
def test_oracle_equals_attention_by_hand(spec: ProblemSpec) -> None:
    problem = spec.build()
    exact = exact_attention(problem)
    out, lse = _attention_by_hand(problem)
    for sequence, head in problem.heads():
        span = problem.sequences[sequence]
        rows = (span.batch, head, slice(span.q_start, span.q_stop))
        worst = float(row_errors(exact.out[rows], out[rows]).max(initial=0.0))
        assert worst <= exact.error_upper[sequence, head]
    np.testing.assert_array_equal(exact.lse == -np.inf, lse == -np.inf)
    seen = lse != -np.inf
    assert np.abs(exact.lse[seen] - lse[seen]).max(initial=0.0) < 1e-12


@given(spec=problem_specs(values=("normal", "outliers")), data=st.data())
def test_oracle_of_some_rows_equals_the_whole(spec: ProblemSpec, data: st.DataObject) -> None:
    problem = spec.build()
    whole = exact_attention(problem)
    index = data.draw(st.sampled_from(list(problem.heads())))
    span = problem.sequences[index[0]]
    rows = np.array(
        data.draw(st.lists(st.integers(0, max(span.len_q - 1, 0)), max_size=5)), int
    )
    rows = rows[: span.len_q]
    some = exact_attention(problem, {index: rows})
    where = (span.batch, index[1], span.q_start + rows)
    np.testing.assert_allclose(some.out[where], whole.out[where], rtol=1e-9, atol=1e-12)
    others = np.ones(some.lse.shape, bool)
    others[where] = False
    assert np.isnan(some.out[others]).all()


def test_oracle_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ProblemSpec(len_q=50, len_kv=70, mask=MaskSpec((9, 3), "bottom_right"))
    whole = exact_attention(spec.build())
    monkeypatch.setattr("adaattn_core.testing.oracles._TILE_SCORES", 100)
    chunked = exact_attention(spec.build())
    np.testing.assert_allclose(chunked.out, whole.out, rtol=1e-12)


def test_nonfinite_values_reach_the_rows_that_see_them() -> None:
    spec = ProblemSpec(len_q=6, len_kv=6, mask=MaskSpec((None, 0), "top_left"))
    problem = spec.build()
    problem.value[0, 0, 3, 1] = np.inf
    problem.key[0, 0, 5, 0] = np.nan
    out = exact_attention(problem).out[0, 0]
    assert np.isfinite(out[:3]).all()
    assert np.isfinite(out[3:5, [0, 2]]).all()
    assert (out[3:5, 1] == np.inf).all()
    assert np.isnan(out[5]).all()


@pytest.mark.parametrize("name", list(FORMATS))
def test_naive_errors_have_the_size_of_the_format(name: str) -> None:
    spec = ProblemSpec(
        heads_kv=2, len_q=64, len_kv=96, dim_qk=64, dim_v=64, dtype="f64", seed=1
    )
    problem = spec.build()
    exact = exact_attention(problem)
    for pair in ((name, "f64"), ("f64", name)):
        error = relative_frobenius(naive_attention(problem, *pair).out, exact.out)
        unit = FORMATS[name].unit_roundoff if FORMATS[name].is_float else 1 / 254
        assert unit / 50 <= error <= 4 * unit + 1e-15


def test_measures_by_definition() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(100, 8))
    out = exact + 0.01 * rng.normal(size=(100, 8)) * np.arange(100)[:, None]
    error = np.linalg.norm(out - exact, axis=1)
    rms = math.sqrt(np.mean(np.sum(out**2, axis=1)))
    assert rms_row_norm(out) == pytest.approx(rms)
    np.testing.assert_allclose(row_errors(out, exact), error)
    assert row_quantile(out, exact, 1.0) == pytest.approx(error.max() / rms)
    assert row_quantile(out, exact, 0.95) == pytest.approx(np.sort(error)[94] / rms)
    assert row_quantile(out, exact, 0.07) == pytest.approx(np.sort(error)[6] / rms)
    assert row_quantile(out, exact, 0.951) == pytest.approx(np.sort(error)[95] / rms)
    whole = np.linalg.norm(out - exact)
    assert relative_frobenius(out, exact) == pytest.approx(whole / np.linalg.norm(exact))
    assert relative_l1(out, exact) == pytest.approx(abs(out - exact).sum() / abs(exact).sum())
    assert rmse(out, exact) == pytest.approx(math.sqrt(np.mean((out - exact) ** 2)))
    cosine = (out * exact).sum() / np.linalg.norm(out) / np.linalg.norm(exact)
    assert cosine_similarity(out, exact) == pytest.approx(cosine)


def test_measures_of_nothing_and_of_zero() -> None:
    empty, zero, one = np.zeros((0, 4)), np.zeros((3, 4)), np.ones((3, 4))
    for measure in (relative_frobenius, relative_l1, rmse):
        assert measure(empty, empty) == 0
        assert measure(zero, zero) == 0
    assert row_quantile(empty, empty, 0.5) == 0
    assert relative_frobenius(one, zero) == math.inf
    assert cosine_similarity(zero, zero) == 1
    assert cosine_similarity(one, zero) == 0


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-200, 1e200, 1e300])
def test_norms_neither_overflow_nor_vanish(size: float) -> None:
    assert row_norms(np.array([[3 * size, 4 * size]]))[0] == pytest.approx(5 * size)
    assert rms_row_norm(np.full((2, 1), size)) == pytest.approx(size)


def test_norms_of_nonfinite_rows() -> None:
    norms = row_norms(np.array([[np.inf, 1.0], [np.nan, 1.0], [0.0, 0.0]]))
    assert norms[0] == np.inf
    assert np.isnan(norms[1])
    assert norms[2] == 0


@given(spec=problem_specs())
def test_spec_is_rebuilt_from_its_repr(spec: ProblemSpec) -> None:
    again = eval(repr(spec), {"ProblemSpec": ProblemSpec, "MaskSpec": MaskSpec})
    assert again == spec
    first, second = spec.build(), again.build()
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(
            getattr(first, name).astype(float), getattr(second, name).astype(float)
        )


@given(spec=problem_specs(storages=STORAGES[:-1], poison=st.just(True)))
def test_poison_is_never_seen(spec: ProblemSpec) -> None:
    exact = exact_attention(spec.build())
    assert np.isfinite(exact.out).all()
    assert not np.isnan(exact.lse).any()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
def test_values_are_finite_in_their_dtype(values: str, dtype: str) -> None:
    problem = ProblemSpec(len_q=40, len_kv=40, values=values, dtype=dtype).build()
    for x in (problem.query, problem.key, problem.value):
        assert np.isfinite(x.astype(np.float64)).all()
        assert (x != 0).any()


def test_needles_dominate_their_row() -> None:
    spec = ProblemSpec(len_q=64, len_kv=512, dim_qk=32, values="needles", dtype="f32")
    problem = spec.build()
    exact = exact_attention(problem)
    scores = problem.scale * problem.query[0, 0] @ problem.key[0, 0].T
    share = np.exp(scores.max(axis=1) - exact.lse[0, 0])
    assert (share > 0.9).sum() >= 2


def test_storages_are_what_they_say() -> None:
    layouts = {
        storage: ProblemSpec(batch=2, heads_kv=2, storage=storage).build().key
        for storage in STORAGES
    }
    assert layouts["contiguous"].flags.c_contiguous
    assert layouts["strided_len"].strides[2] == 2 * layouts["contiguous"].strides[2]
    assert layouts["padded_dim"].strides[2] > layouts["contiguous"].strides[2]
    assert layouts["bshd"].strides[1] < layouts["bshd"].strides[2]
    assert layouts["broadcast_batch"].strides[0] == 0
    assert all(x.strides[-1] == x.itemsize for x in layouts.values())


def _problem(**wish: Any) -> Any:
    def fits(spec: ProblemSpec) -> bool:
        return all(getattr(spec, name) == value for name, value in wish.items())

    return fits


@pytest.mark.parametrize(
    "wish",
    [
        _problem(len_kv=0),
        _problem(len_kv=1),
        _problem(len_q=0),
        _problem(heads_kv=1, group=3),
        lambda s: s.dim_qk % 2 == 1 and s.dim_v != s.dim_qk,
        lambda s: s.mask.lengths == "ragged" and s.batch > 1,
        lambda s: s.mask.window == (None, 0) and s.mask.alignment == "bottom_right",
        lambda s: s.mask.arrays == ("additive", "boolean") and s.mask.blind_rows,
        lambda s: s.mask.axes[1] and not s.mask.axes[3],
        lambda s: s.poison and s.mask.lengths == "lengths",
    ],
)
def test_everything_promised_is_drawn(wish: Any) -> None:
    assert find(problem_specs(), wish, settings=settings(max_examples=20_000)) is not None


@given(spec=mask_specs(("causal", "boolean")))
def test_masks_keep_to_the_kinds_asked_for(spec: MaskSpec) -> None:
    assert spec.kinds() <= {"causal", "boolean"}


def test_read_only_arrays_are_sent_as_they_are_without_a_warning() -> None:
    """Warnings are errors here; PyTorch would give this one on the first array only."""
    torch = pytest.importorskip("torch")
    told = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        sent = ArrayHome.parse("torch:cpu").send(np.broadcast_to(np.float32(2), (3, 4)))
    finally:
        torch.set_warn_always(told)
    assert sent.stride() == (0, 0)
    assert (sent == 2).all()
