"""Oracles of the backward pass: exact gradients in float64, and the naive same-format ones.

Both are written to be read, head by head. With weights p, output o and its gradient do:

    dv = p^T do,  dp = do v^T,  ds = p (dp - sum(o do) + dlse),
    dq = scale ds k,  dk = scale ds^T q,

where under a softcap ds is first multiplied by the cap's derivative. A sink of weight w has a
gradient of -w (sum(o do) - dlse) a row, and keys and values sum over the query heads that share
them. A row that sees nothing has no gradient, and neither has a key that nobody sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import to_numpy
from adaattn_core.formats import round_to_format
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import head_arrays, visible_tile

__all__ = ["ExactGradients", "exact_gradients", "naive_gradients"]

Float = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class ExactGradients:
    """Gradients with respect to the inputs, float64, each of its input's shape.

    `bias` is None where there is no additive mask, `sinks` where there are none.
    """

    query: NDArray[np.float64]
    key: NDArray[np.float64]
    value: NDArray[np.float64]
    bias: NDArray[np.float64] | None
    sinks: NDArray[np.float64] | None = None


def exact_gradients(
    problem: AttentionProblem, grad_out: Any, grad_lse: Any = None
) -> ExactGradients:
    """Gradients of exact attention in float64. For small problems only.

    Parameters
    ----------
    problem : AttentionProblem
        Arrays in host memory.
    grad_out : array, shape (batch, heads_q, len_q, dim_v)
    grad_lse : array, shape (batch, heads_q, len_q), optional
    """
    return _gradients(problem, grad_out, grad_lse, None)


def naive_gradients(
    problem: AttentionProblem, grad_out: Any, grad_lse: Any = None, *, multiply: str
) -> ExactGradients:
    """Whole-matrix gradients with operands rounded to `multiply`: the yardstick of the 2x rule.

    Products and sums run in float32; the output that delta is taken from, and the gradients,
    are rounded to the input's dtype.
    """
    return _gradients(problem, grad_out, grad_lse, multiply)


def _gradients(
    problem: AttentionProblem, grad_out: Any, grad_lse: Any, multiply: str | None
) -> ExactGradients:
    wide: Any = np.float64 if multiply is None else np.float32
    stored = to_numpy(problem.query).dtype

    def rounded(x: Float) -> Float:
        return x if multiply is None else round_to_format(x, multiply).astype(wide)

    grads = to_numpy(grad_out).astype(wide)
    found = [np.zeros(x.shape, wide) for x in (problem.query, problem.key, problem.value)]
    bias = None if problem.mask.bias is None else to_numpy(problem.mask.bias)
    full = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
    d_bias = None if bias is None else np.zeros(full, wide)
    sinks = None if problem.sinks is None else to_numpy(problem.sinks).astype(wide)
    d_sinks = None if sinks is None else np.zeros(problem.heads_q, wide)
    for index in problem.heads():
        span, head_kv = problem.sequences[index[0]], index[1] // problem.group_size
        if not span.len_q or not (span.len_kv or d_sinks is not None):
            continue
        rows, keys = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
        visible, added = visible_tile(problem, index, np.arange(span.len_q), 0, span.len_kv)
        sees, seen = (np.asarray(visible.any(axis=i)) for i in (1, 0))
        arrays = head_arrays(problem, index)
        # What nobody sees may be NaN, and 0 * NaN is NaN.
        q = rounded(np.where(sees[:, None], arrays.query, 0).astype(wide))
        k = rounded(np.where(seen[:, None], arrays.key, 0).astype(wide))
        v = rounded(np.where(seen[:, None], arrays.value, 0).astype(wide))
        g = np.where(sees[:, None], grads[span.batch, index[1], rows], 0)
        g_lse = np.zeros(span.len_q, wide)
        if grad_lse is not None:
            g_lse = to_numpy(grad_lse)[span.batch, index[1], rows].astype(wide)
        scores, slope = (q @ k.T) * wide(problem.scale), wide(1.0)
        if problem.softcap is not None:
            bent = np.tanh(scores / wide(problem.softcap))
            scores, slope = wide(problem.softcap) * bent, 1 - bent**2
        scores = scores + np.asarray(added, wide)
        top = np.where(visible, scores, -np.inf).max(axis=1, initial=-np.inf)
        sink = wide(-np.inf) if sinks is None else sinks[index[1]]
        top = np.maximum(top, sink)
        shift = np.where(np.isfinite(top), top, 0)[:, None]
        weights = np.where(visible, np.exp(np.where(visible, scores, 0) - shift), 0)
        share = np.exp(sink - shift[:, 0])
        total = weights.sum(axis=1) + share
        total = np.where(total > 0, total, 1)
        weights, share = weights / total[:, None], share / total
        out = rounded(weights) @ v
        if multiply is not None:
            out, g = out.astype(stored).astype(wide), rounded(g)
        delta = (out * g).sum(axis=1) - g_lse
        if d_sinks is not None:
            d_sinks[index[1]] -= np.where(share > 0, share * delta, 0).sum()
        d_scores = np.where(visible, weights * (g @ v.T - delta[:, None]), 0)
        if d_bias is not None:
            d_bias[span.batch, index[1], rows, keys] = d_scores
        d_scores = d_scores * slope
        where_kv = (span.batch, head_kv, keys)
        found[0][span.batch, index[1], rows] = rounded(d_scores) @ k * wide(problem.scale)
        found[1][where_kv] += rounded(d_scores).T @ q * wide(problem.scale)
        found[2][where_kv] += rounded(weights).T @ g
    if multiply is not None:
        found = [x.astype(stored) for x in found]
    query, key, value = (x.astype(np.float64) for x in found)
    of_sinks = None if d_sinks is None else d_sinks.astype(np.float64)
    if bias is None or d_bias is None:
        return ExactGradients(query, key, value, None, of_sinks)
    folded = _folded(d_bias, bias.shape)
    if multiply is not None:
        folded = folded.astype(bias.dtype)
    return ExactGradients(query, key, value, folded.astype(np.float64), of_sinks)


def _folded(x: Float, shape: tuple[int, ...]) -> Float:
    """Sum over the axes along which an array of `shape` is broadcast."""
    padded = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(i for i, n in enumerate(padded) if n == 1 and x.shape[i] != 1)
    return np.asarray(x.sum(axis=axes, keepdims=True).reshape(shape))
