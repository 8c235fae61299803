"""Oracles: exact attention in float64, the naive same-format computation, and error measures.

Both are written to be read. They define what every backend must return: scale, visibility,
grouped heads, rows without a visible key (output 0, lse -inf), and NaN or Inf, which reach
exactly the rows that see them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import to_numpy
from adaattn_core.formats import get_format, round_to_format
from adaattn_core.problem import AttentionProblem, HeadIndex

Float64 = NDArray[np.float64]

_TILE_SCORES = 1 << 21
"""Scores held at once; bounds the memory whatever the length."""


@dataclass(frozen=True, slots=True)
class ExactAttention:
    """Exact attention of a problem.

    Attributes
    ----------
    out : ndarray of float64, shape (batch, heads_q, len_q, dim_v)
        NaN in the rows that were not asked for.
    lse : ndarray of float64, shape (batch, heads_q, len_q)
        Natural log of the sum of exponentials; -inf where a row sees nothing.
    error_upper : ndarray of float64, shape (sequences, heads_q)
        Upper bound of this computation's own float64 error, Euclidean norm of an output row.
    """

    out: Float64
    lse: Float64
    error_upper: Float64


@dataclass(frozen=True, slots=True)
class HeadArrays:
    """One head of one sequence in host memory: query, key, value as (len, dim) views."""

    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]


def head_arrays(problem: AttentionProblem, index: HeadIndex) -> HeadArrays:
    """Return the arrays of one (sequence, head), padding cut off.

    Raises
    ------
    UnsupportedError
        If the arrays are not in host memory.
    """
    span = problem.sequences[index[0]]
    head_kv = index[1] // problem.group_size
    rows, keys = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
    return HeadArrays(
        to_numpy(problem.query)[span.batch, index[1], rows],
        to_numpy(problem.key)[span.batch, head_kv, keys],
        to_numpy(problem.value)[span.batch, head_kv, keys],
    )


def visible_tile(
    problem: AttentionProblem, index: HeadIndex, rows: NDArray[Any], first: int, last: int
) -> tuple[NDArray[np.bool_], Float64 | float]:
    """Visibility and additive bias of some rows of one (sequence, head).

    Parameters
    ----------
    rows : ndarray of int, shape (rows,)
        Row numbers within the sequence.
    first, last : int
        Half-open range of keys within the sequence.

    Returns
    -------
    visible : ndarray of bool, shape (rows, last - first)
        Keys that the row may attend to; a bias of -inf hides a key.
    bias : ndarray of float64, same shape, or 0.0
    """
    span = problem.sequences[index[0]]
    start, stop = problem.intervals(index[0])
    keys = np.arange(first, last)
    visible = (keys >= start[rows, None]) & (keys < stop[rows, None])
    full = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
    columns = slice(span.kv_start + first, span.kv_start + last)

    def tile(mask: Any) -> NDArray[Any]:
        head = np.broadcast_to(to_numpy(mask), full)[span.batch, index[1]]
        return np.asarray(head[span.q_start + rows][:, columns])

    bias: Float64 | float = 0.0
    if problem.mask.allowed is not None:
        visible &= tile(problem.mask.allowed)
    if problem.mask.bias is not None:
        bias = tile(problem.mask.bias).astype(np.float64)
        visible &= bias != -np.inf
    return visible, bias


def exact_attention(
    problem: AttentionProblem, rows: Mapping[HeadIndex, NDArray[Any]] | None = None
) -> ExactAttention:
    """Attention in float64, in chunks of rows.

    Parameters
    ----------
    problem : AttentionProblem
        Arrays in host memory.
    rows : mapping of (sequence, head) to ndarray of int, optional
        Rows (numbered within the sequence) to compute; default every row of every head.

    Raises
    ------
    UnsupportedError
        If the arrays are not in host memory.
    """
    shape = (problem.batch, problem.heads_q, problem.len_q)
    out = np.full((*shape, problem.dim_v), np.nan)
    lse = np.full(shape, np.nan)
    error_upper = np.zeros((len(problem.sequences), problem.heads_q))
    for index in problem.heads():
        span = problem.sequences[index[0]]
        wanted = np.arange(span.len_q) if rows is None else rows.get(index, np.empty(0, int))
        arrays = head_arrays(problem, index)
        q, k, v = (x.astype(np.float64) for x in (arrays.query, arrays.key, arrays.value))
        seen = np.zeros(span.len_kv, bool)
        for chunk, first, last in _chunks(problem, index, wanted):
            visible, bias = visible_tile(problem, index, chunk, first, last)
            seen[first:last] |= visible.any(axis=0)
            where = (span.batch, index[1], span.q_start + chunk)
            with np.errstate(invalid="ignore", over="ignore"):
                scores = _capped(problem.scale * (q[chunk] @ k[first:last].T), problem) + bias
                sink = _sink(problem, index[1])
                weights, lse[where] = _softmax(scores, visible, sink)
                out[where] = _weighted_sum(weights, visible, v[first:last])
        error_upper[index] = _own_error_upper(problem, q[wanted], k[seen], v[seen])
    return ExactAttention(out, lse, error_upper)


def _chunks(
    problem: AttentionProblem, index: HeadIndex, rows: NDArray[Any]
) -> Iterator[tuple[NDArray[Any], int, int]]:
    """Rows in chunks, each with the range of keys that its rows may see."""
    start, stop = problem.intervals(index[0])
    step = max(1, _TILE_SCORES // max(1, problem.sequences[index[0]].len_kv))
    for i in range(0, len(rows), step):
        chunk = rows[i : i + step]
        first = int(start[chunk].min())
        yield chunk, first, max(first, int(stop[chunk].max()))


def _capped(scores: NDArray[Any], problem: AttentionProblem) -> NDArray[Any]:
    """Scaled scores under the problem's softcap, in the scores' own format."""
    if problem.softcap is None:
        return scores
    cap = scores.dtype.type(problem.softcap)
    return np.asarray(cap * np.tanh(scores / cap))


def _sink(problem: AttentionProblem, head: int) -> float:
    """Logit of a head's sink, -inf for none."""
    return -math.inf if problem.sinks is None else float(to_numpy(problem.sinks)[head])


def _softmax(
    scores: Float64, visible: NDArray[np.bool_], sink: float = -math.inf
) -> tuple[Float64, Float64]:
    """Weights of the visible keys and lse; a sink counts in both, as one more key would."""
    masked = np.where(visible, scores, -np.inf)
    sees = visible.any(axis=1) | (sink != -math.inf)
    top = np.where(sees, np.max(masked, axis=1, initial=sink), 0.0)
    weights = np.where(visible, np.exp(masked - top[:, None]), 0.0)
    total = weights.sum(axis=1) + np.where(sees, np.exp(sink - top), 0.0)
    with np.errstate(divide="ignore"):
        lse = np.where(sees, top + np.log(total), -np.inf)
    return weights / np.where(sees, total, 1.0)[:, None], lse


def _weighted_sum(weights: Float64, visible: NDArray[np.bool_], value: Float64) -> Float64:
    """Weights times values, where 0 * NaN of an invisible key is 0."""
    bad = np.flatnonzero(~np.isfinite(value).all(axis=1))
    clean = value.copy()
    clean[bad] = 0.0
    total: Float64 = weights @ clean
    for key in bad:
        sees = visible[:, key]
        total[sees] += weights[sees, key, None] * value[key]
    return total


def _own_error_upper(problem: AttentionProblem, q: Float64, k: Float64, v: Float64) -> float:
    """Bound the float64 error of a row: scores off by delta move a mean of the values."""
    if not (len(q) and len(k)):
        return 0.0
    ulp = 2.0**-52
    norms = [float(row_norms(x).max()) for x in (q, k, v)]
    bias = 0.0
    if problem.mask.bias is not None:
        finite = to_numpy(problem.mask.bias).astype(np.float64)
        bias = float(np.max(np.abs(finite), initial=0.0, where=np.isfinite(finite)))
    if problem.sinks is not None:
        sinks = to_numpy(problem.sinks).astype(np.float64)
        bias += float(np.max(np.abs(sinks), initial=0.0, where=np.isfinite(sinks)))
    # A softcap is 1-Lipschitz; its own roundings are within the eight.
    delta = (problem.dim_qk + 8) * ulp * (problem.scale * norms[0] * norms[1] + bias)
    return (2.0 * min(delta, 1.0) + (len(k) + 16) * ulp) * norms[2]


# -- the naive computation of the same format -------------------------------------------------
@dataclass(frozen=True, slots=True)
class NaiveAttention:
    """Naive attention: ``out`` (batch, heads_q, len_q, dim_v) and ``lse``, float64 copies."""

    out: Float64
    lse: Float64


def naive_attention(
    problem: AttentionProblem, qk: str = "f32", pv: str = "f32"
) -> NaiveAttention:
    """Whole-matrix attention with operands rounded to formats: the yardstick of the 2x rule.

    Operands are rounded once, products and sums run in float32 (float64 for ``f64``), the
    output is rounded to the input's dtype. 8-bit operands get one scale per vector (per channel
    for the values) after the mean visible key is subtracted. For small problems only.
    """
    shape = (problem.batch, problem.heads_q, problem.len_q)
    out, lse = np.zeros((*shape, problem.dim_v)), np.full(shape, -np.inf)
    for index in problem.heads():
        span = problem.sequences[index[0]]
        if not (span.len_q and span.len_kv):
            continue
        visible, bias = visible_tile(problem, index, np.arange(span.len_q), 0, span.len_kv)
        seen = np.asarray(visible.any(axis=0))
        arrays = head_arrays(problem, index)
        key = np.where(seen[:, None], arrays.key, 0).astype(np.float64)
        value = np.where(seen[:, None], arrays.value, 0).astype(np.float64)
        mean = key[seen].mean(axis=0) if seen.any() else np.zeros(problem.dim_qk)
        smooth = get_format(qk).is_quantised and problem.softcap is None
        shift = mean if smooth else np.zeros_like(mean)
        query = arrays.query.astype(np.float64)
        wide: Any = np.float64 if "f64" in (qk, pv) else np.float32
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            q_hat, k_hat = (_operand(x, qk, axis=1).astype(wide) for x in (query, key - shift))
            scores = _capped((q_hat @ k_hat.T) * wide(problem.scale), problem)
            scores = scores + np.asarray(bias, wide)
            sink = wide(_sink(problem, index[1]))
            weights, row_lse, total = _naive_softmax(
                np.where(visible, scores, wide(-np.inf)), sink
            )
            top = get_format(pv).max_finite if get_format(pv).is_quantised else 1.0
            p_hat = round_to_format(weights * wide(top), pv).astype(wide) / wide(top)
            summed = p_hat @ _operand(value, pv, axis=0).astype(wide)
            result = np.divide(summed, total, out=np.zeros_like(summed), where=total > 0)
            result = result.astype(to_numpy(problem.query).dtype)
        where = (span.batch, index[1], slice(span.q_start, span.q_stop))
        out[where] = result
        lse[where] = row_lse + problem.scale * (query @ shift)
    return NaiveAttention(out, lse)


def _operand(x: Float64, name: str, axis: int) -> NDArray[Any]:
    if not get_format(name).is_quantised:
        return round_to_format(x, name)
    peak = np.max(np.abs(x), axis=axis, keepdims=True)
    scale = np.where(peak > 0, peak / get_format(name).max_finite, 1.0)
    return np.asarray(round_to_format(x / scale, name) * scale)


def _naive_softmax(
    scores: NDArray[Any], sink: Any
) -> tuple[NDArray[Any], Float64, NDArray[Any]]:
    """Weights, lse and total, shape (rows, 1), with the sink in both."""
    top = np.max(scores, axis=1, keepdims=True, initial=sink)
    shift = np.where(np.isfinite(top), top, 0)
    weights, of_sink = np.exp(scores - shift), np.exp(sink - shift)
    with np.errstate(divide="ignore"):
        sums = weights.sum(axis=1, dtype=np.float64) + of_sink[:, 0]
        row_lse = top[:, 0].astype(np.float64) + np.log(sums)
    return weights, row_lse, weights.sum(axis=1, keepdims=True) + of_sink


# -- error measures ---------------------------------------------------------------------------
def row_norms(x: NDArray[Any]) -> Float64:
    """Euclidean norms along the last axis in float64, safe from overflow and underflow."""
    wide = np.abs(np.asarray(x, dtype=np.float64))
    peak = np.max(wide, axis=-1, initial=0.0)
    unit = np.where((peak > 0) & np.isfinite(peak), peak, 1.0)
    return np.asarray(unit * np.sqrt(np.sum((wide / unit[..., None]) ** 2, axis=-1)))


def rms_row_norm(x: NDArray[Any]) -> float:
    """Root-mean-square Euclidean norm of the rows of `x` (0 for no rows)."""
    norms = row_norms(x).ravel()
    return float(row_norms(norms) / math.sqrt(norms.size)) if norms.size else 0.0


def row_errors(out: NDArray[Any], exact: NDArray[Any]) -> Float64:
    """``|out_i - exact_i|`` of every row (last axis = channels), in the values' own unit."""
    with np.errstate(invalid="ignore"):
        return row_norms(np.asarray(out, np.float64) - np.asarray(exact, np.float64))


def row_quantile(out: NDArray[Any], exact: NDArray[Any], rows: float) -> float:
    """Smallest e such that at least a share `rows` of the rows err by ``<= e * rms|out|``.

    Parameters
    ----------
    out, exact : ndarray, shape (len_q, dim_v)
        One head.
    rows : float
        In (0, 1]; 1 gives the worst row.
    """
    errors = np.sort(row_errors(out, exact).ravel())
    if not errors.size:
        return 0.0
    # The tiny allowance undoes products such as 0.07 * 100 = 7.000000000000001.
    rank = max(1, math.ceil(rows * errors.size * (1.0 - 1e-12)))
    return _ratio(float(errors[rank - 1]), rms_row_norm(out))


def relative_frobenius(out: NDArray[Any], exact: NDArray[Any]) -> float:
    """``|out - exact|_F / |exact|_F`` (0/0 is 0)."""
    return _ratio(rms_row_norm(_difference(out, exact)), rms_row_norm(exact))


def relative_l1(out: NDArray[Any], exact: NDArray[Any]) -> float:
    """``sum|out - exact| / sum|exact|`` (0/0 is 0)."""
    return _ratio(float(np.abs(_difference(out, exact)).sum()), float(np.abs(exact).sum()))


def rmse(out: NDArray[Any], exact: NDArray[Any]) -> float:
    """Root-mean-square error per element, in the values' own unit."""
    difference = _difference(out, exact)
    return rms_row_norm(difference.reshape(-1, 1)) if difference.size else 0.0


def cosine_similarity(out: NDArray[Any], exact: NDArray[Any]) -> float:
    """Cosine between the two arrays as flat vectors (1 if both are zero)."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (out, exact))
    lengths = float(row_norms(a)), float(row_norms(b))
    if 0.0 in lengths:
        return 1.0 if lengths[0] == lengths[1] else 0.0
    return float((a / lengths[0]) @ (b / lengths[1]))


def _difference(out: NDArray[Any], exact: NDArray[Any]) -> Float64:
    with np.errstate(invalid="ignore"):
        return np.asarray(out, np.float64) - np.asarray(exact, np.float64)


def _ratio(error: float, size: float) -> float:
    return 0.0 if error == 0 else (error / size if size else math.inf)
