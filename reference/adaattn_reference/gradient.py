"""Gradients of exact attention in float64, in chunks of rows: memory linear in the length.

The readable twin of every backward kernel. Per chunk of query rows of one head, with weights p,
output o and its gradient do:

    dv += p^T do,  dp = do v^T,  ds = p (dp - sum(o do) + dlse),
    dq = scale ds k,  dk += scale ds^T q,

where under a softcap ds is first multiplied by the cap's derivative. A sink of weight w adds
-w (sum(o do) - dlse) a row to its own gradient. Neither output nor lse is taken from the
caller: both are part of the chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.backend import Gradients
from adaattn_core.errors import ShapeError, UnsupportedError
from adaattn_core.problem import AttentionProblem, HeadIndex

__all__ = ["backward"]

CHUNK_SCORES = 1 << 20
"""Scores of one chunk."""


def backward(
    problem: AttentionProblem, grad_out: Any, grad_lse: Any, need_bias: bool
) -> Gradients:
    """Compute what `adaattn_core.backend.Differentiates.backward` describes.

    Raises
    ------
    UnsupportedError
        If keys and values are pages.
    ShapeError
        If a gradient does not have its array's shape.
    """
    if problem.paged is not None:
        raise UnsupportedError(
            got="keys and values as pages",
            needed="arrays: a cache has no gradient",
            do="pass the keys and values themselves, or paged.gather()",
        )
    rows = (problem.batch, problem.heads_q, problem.len_q)
    _check("grad_out", grad_out, (*rows, problem.dim_v))
    if grad_lse is not None:
        _check("grad_lse", grad_lse, rows)
    inputs = (problem.query, problem.key, problem.value)
    found = [np.zeros(x.shape, np.float64) for x in inputs]
    bias = problem.mask.bias
    d_bias = np.zeros(bias.shape, np.float64) if need_bias and bias is not None else None
    d_sinks = None if problem.sinks is None else np.zeros(problem.heads_q, np.float64)
    for index in problem.heads():
        _add_head(problem, index, grad_out, grad_lse, found, d_bias, d_sinks)
    d_query, d_key, d_value = (x.astype(problem.query.dtype) for x in found)
    return Gradients(d_query, d_key, d_value, d_bias, d_sinks)


def _check(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if tuple(array.shape) != shape:
        raise ShapeError(
            got=f"{name} of shape {tuple(array.shape)}",
            needed=f"{shape}, the shape of what it is the gradient of",
            do="pass the gradient as autograd hands it over",
        )


def _add_head(
    problem: AttentionProblem,
    index: HeadIndex,
    grad_out: NDArray[Any],
    grad_lse: NDArray[Any] | None,
    found: list[NDArray[np.float64]],
    d_bias: NDArray[np.float64] | None,
    d_sinks: NDArray[np.float64] | None,
) -> None:
    span, head, head_kv = (
        problem.sequences[index[0]], index[1], index[1] // problem.group_size,
    )  # fmt: skip
    start, stop = problem.intervals(index[0])
    keys = slice(span.kv_start, span.kv_stop)
    key, value = (
        np.asarray(x[span.batch, head_kv, keys], np.float64)
        for x in (problem.key, problem.value)
    )
    step = max(1, CHUNK_SCORES // max(1, span.len_kv))
    sink = -np.inf if d_sinks is None else float(problem.sinks[head])
    for first in range(0, span.len_q, step):
        part = slice(first, min(first + step, span.len_q))
        low, high = int(start[part].min()), int(stop[part].max())
        if high <= low:
            low = high = 0
        if high <= low and d_sinks is None:
            continue
        where = (span.batch, head, slice(span.q_start + part.start, span.q_start + part.stop))
        visible, added = _mask(
            problem, where, start[part], stop[part], span.kv_start, low, high
        )
        sees, seen = (np.asarray(visible.any(axis=i, keepdims=True)) for i in (1, 0))
        seen = seen.T
        # What nobody sees may be NaN, and 0 * NaN is NaN.
        q = np.where(sees, problem.query[where], 0).astype(np.float64)
        g = np.where(sees, grad_out[where], 0).astype(np.float64)
        k, v = np.where(seen, key[low:high], 0), np.where(seen, value[low:high], 0)
        with np.errstate(invalid="ignore", over="ignore"):
            scores: NDArray[np.float64] = problem.scale * (q @ k.T)
            slope: NDArray[np.float64] | float = 1.0
            if problem.softcap is not None:
                bent = np.tanh(scores / problem.softcap)
                scores, slope = problem.softcap * bent, 1 - bent**2
            weights, share = _weights(scores + added, visible, sink)
            delta = ((weights @ v) * g).sum(axis=1, keepdims=True)
            if grad_lse is not None:
                delta -= grad_lse[where][:, None]
            if d_sinks is not None:
                d_sinks[head] -= np.where(share > 0, share * delta, 0).sum()
            d_scores = np.where(visible, weights * (g @ v.T - delta), 0)
            columns = slice(span.kv_start + low, span.kv_start + high)
            if d_bias is not None:
                target = _part(d_bias, where, columns)
                target += d_scores.sum(
                    axis=tuple(i for i in (0, 1) if target.shape[i] == 1), keepdims=True
                )
            d_scores = d_scores * slope
            found[0][where] = problem.scale * (d_scores @ k)
            found[1][span.batch, head_kv, columns] += problem.scale * (d_scores.T @ q)
            found[2][span.batch, head_kv, columns] += weights.T @ g


def _weights(
    scores: NDArray[np.float64], visible: NDArray[np.bool_], sink: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of the keys, and each row's of its sink; zeros where a row sees nothing."""
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=1, keepdims=True, initial=sink)
    top = np.where(top == -np.inf, 0, top)
    weights, share = np.where(visible, np.exp(scores - top), 0), np.exp(sink - top)
    total = weights.sum(axis=1, keepdims=True) + share
    total = np.where(total == 0, 1, total)
    return weights / total, share / total


def _mask(
    problem: AttentionProblem,
    where: tuple[int, int, slice],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    kv_start: int,
    low: int,
    high: int,
) -> tuple[NDArray[np.bool_], NDArray[np.float64] | float]:
    """Which keys of low..high-1 the rows see, and what is added to their scores."""
    positions = np.arange(low, high)
    visible = (positions >= start[:, None]) & (positions < stop[:, None])
    columns = slice(kv_start + low, kv_start + high)
    if problem.mask.allowed is not None:
        visible &= _part(problem.mask.allowed, where, columns)
    if problem.mask.bias is None:
        return visible, 0.0
    added = _part(problem.mask.bias, where, columns).astype(np.float64)
    added = np.broadcast_to(added, visible.shape)
    return visible & (added != -np.inf), added


def _part(mask: Any, where: tuple[int, int, slice], columns: slice) -> NDArray[Any]:
    """Cut rows of one head out of a broadcastable mask: axes of length 1 stay."""
    four = mask[(None,) * (4 - mask.ndim)]
    batch, head = (0 if four.shape[i] == 1 else where[i] for i in (0, 1))
    rows = slice(None) if four.shape[2] == 1 else where[2]
    keys = slice(None) if four.shape[3] == 1 else columns
    return np.asarray(four[batch, head][rows, keys])
