"""Exact attention of a few rows, and how far returned rows are from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds import row_norms_estimate
from adaattn_core.certificates.theorem import theorem_certificate
from adaattn_core.facts import Arithmetic, RowErrors, RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem
from adaattn_reference.score_rule import cap, with_sink
from adaattn_reference.scratch import scratch
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

SUM_KEYS = 256
"""Keys of one product P·V; products are added in float64."""
CHUNK_KEYS, CHUNK_ROWS = 4 * SUM_KEYS, 256
"""Working set of about 1 MB of scores: what stays in a core's cache."""
ARITHMETIC = Arithmetic(step_keys=CHUNK_KEYS, sum_keys_max=SUM_KEYS)


def errors_against(
    view: HeadView, out: NDArray[np.float64], facts: RunFacts, problem: AttentionProblem
) -> RowErrors:
    """Errors of returned rows against exact ones in the arithmetic of a view of these rows.

    Parameters
    ----------
    view : HeadView
        The rows, in float32 or float64.
    out : ndarray of float64, shape (rows, dim_v)
    facts : RunFacts
        Norms of the view's inputs.
    """
    exact = exact_rows(view)
    name = "f64" if view.query.dtype == np.float64 else "f32"
    oracle = theorem_certificate(
        replace(facts, output_rms=1.0, arithmetic=ARITHMETIC),
        HeadPlan(qk=name, pv=name),
        dim_qk=problem.dim_qk,
        dim_v=problem.dim_v,
        scale=problem.scale,
        dtype=name,
        len_q=max(view.len_q, 1),
        softcap=view.softcap,
        sinks=view.sink is not None,
    )
    return RowErrors(
        error=row_norms_estimate(out - exact),
        exact_norm=row_norms_estimate(exact),
        oracle_upper=oracle.upper,
    )


def exact_rows(view: HeadView) -> NDArray[np.float64]:
    """Exact attention of the rows of a view in its own arithmetic, shape (rows, dim_v)."""
    rows = _Rows(view)
    for low in range(0, view.len_kv, CHUNK_KEYS):
        high = min(low + CHUNK_KEYS, view.len_kv)
        for block in _blocks(view, low, high):
            rows.add(block, low, high)
    seen = rows.total != 0
    out = np.zeros(rows.sums.shape)
    if not view.regular:
        out[view.live] = np.nan
    out[seen] = rows.sums[seen] / rows.total[seen, None]
    if view.sink is not None:
        out *= with_sink(rows.lse(), view.sink)[0][:, None]
    return out


def _blocks(view: HeadView, low: int, high: int) -> Iterator[slice]:
    """Rows that see some of the keys low..high-1, those that see only some of them apart.

    Rows come sorted: between the first and the last that see the chunk, nearly all do, and
    under a causal mask only the first few see just a part of it.
    """
    seeing = np.flatnonzero((view.stop > low) & (view.start < high))
    if not len(seeing):
        return
    first, last = int(seeing[0]), int(seeing[-1]) + 1
    whole = first + int(np.argmax(np.append(view.stop[first:last] >= high, True)))
    edges = {first, whole, *range(whole, last, CHUNK_ROWS), last}
    for a, b in pairwise(sorted(edges)):
        yield slice(a, b)


class _Rows:
    """Running maximum, normaliser and weighted values of the rows; sums in float64."""

    def __init__(self, view: HeadView) -> None:
        self.view = view
        self.query = view.query * view.query.dtype.type(view.scale)
        self.top = np.full(view.len_q, -np.inf, view.query.dtype)
        self.total = np.zeros(view.len_q)
        self.sums = np.zeros((view.len_q, view.value.shape[1]))

    def add(self, rows: slice, low: int, high: int) -> None:
        """Add the keys low..high-1 to some rows."""
        view = self.view
        scores = scratch("scores", (rows.stop - rows.start, high - low), self.query.dtype)
        np.matmul(self.query[rows], view.kv.key_t[:, low:high], out=scores)
        cap(scores, view.softcap)
        view.mask_scores(scores, rows, low, high)
        bad = view.kv.bad_values
        bad = bad[(bad >= low) & (bad < high)]
        bad_scores = scores[:, bad - low].copy()
        top = np.maximum(self.top[rows], scores.max(axis=1))
        shift = np.where(top == -np.inf, 0, top)
        fading = np.exp(self.top[rows] - shift)
        self.top[rows] = top
        scores -= shift[:, None]
        weights = np.exp(scores, out=scores)
        sums, total = _sums_in_parts(weights, view.kv.clean_value[low:high])
        self.sums[rows] *= fading[:, None]
        self.sums[rows] += sums
        self.total[rows] *= fading
        self.total[rows] += total
        sees = view.sees(rows, bad)
        for j, key in enumerate(bad):
            seen = sees[:, j]
            weight = np.exp(bad_scores[seen, j : j + 1] - shift[seen, None])
            self.sums[rows][seen] += weight * view.value[key]

    def lse(self) -> NDArray[np.float64]:
        """Log-sum-exp over the keys, with what a mask's shift left out."""
        with np.errstate(divide="ignore"):
            seen = np.log(self.total) + np.where(self.total > 0, self.top, 0)
        shift = self.view.lse_shift
        return seen if shift is None else np.where(np.isneginf(seen), seen, seen + shift)


def _sums_in_parts(weights: Float, value: Float) -> tuple[Float, Float]:
    """P·V and the rows' sums in float64, out of products of at most SUM_KEYS keys."""
    rows, keys = weights.shape
    whole = keys // SUM_KEYS
    edge = whole * SUM_KEYS
    parts = weights[:, :edge].reshape(rows, whole, SUM_KEYS).transpose(1, 0, 2)
    products = np.matmul(parts, value[:edge].reshape(whole, SUM_KEYS, value.shape[1]))
    sums = products.sum(axis=0, dtype=np.float64)
    total = (parts @ np.ones(SUM_KEYS, weights.dtype)).sum(axis=0, dtype=np.float64)
    if edge < keys:
        sums += weights[:, edge:] @ value[edge:]
        total += weights[:, edge:] @ np.ones(keys - edge, weights.dtype)
    return sums, total
