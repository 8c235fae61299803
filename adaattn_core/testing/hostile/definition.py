"""What attention is, in extended precision: the oracle of the fuzz suite.

Written from the definition and nothing else: no module of the library is imported, so that no
mistake can be made twice. NumPy's ``longdouble`` has the exponent range that the products of
two float64 numbers need; positions are Python integers, which do not wrap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.longdouble]

HAS_EXTENDED_RANGE = bool(np.finfo(np.longdouble).maxexp > 4 * np.finfo(np.float64).maxexp)
"""False where ``longdouble`` is float64 (Windows, some ARM systems): no oracle there."""
UNIT = 2.0**-63
"""Twice the unit roundoff of the x87 extended format; wider formats are better still."""


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """A mask as plain data: the public attributes of a mask, read from any object.

    Attributes
    ----------
    alignment, left, right, lengths, cu_seqlens_q, cu_seqlens_kv, allowed, bias
        As documented for ``adaattn_core.Mask``; arrays broadcast to
        (batch, heads_q, len_q, len_kv).
    """

    alignment: str | None = None
    left: int | None = None
    right: int | None = None
    lengths: tuple[int, ...] | None = None
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_kv: tuple[int, ...] | None = None
    allowed: Any = None
    bias: Any = None

    @classmethod
    def of(cls, mask: Any) -> MaskFacts:
        """Read the attributes of a mask."""
        return cls(*(getattr(mask, name) for name in cls.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class Span:
    """Rows ``q0:q1`` and keys ``k0:k1`` of one batch entry that belong to one sequence."""

    batch: int
    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True, slots=True)
class Head:
    """One head of one sequence: what exact attention returns, and facts about it.

    Attributes
    ----------
    out : longdouble, shape (len_q, dim_v)
    lse : longdouble, shape (len_q,)
    sees : bool, shape (len_q,)
        Rows that see a key. Others give 0 and the sink (-inf without one), whatever they hold.
    reached : bool, shape (len_q,)
        Rows that see a key and whose query, a visible key, its value or its bias is not
        finite.
    visible : bool, shape (len_q, len_kv)
    slack : longdouble, shape (len_q,)
        Upper bound of this computation's own error (Euclidean norm of a row).
    query_max, key_max, value_max, bias_max : float
        Largest finite magnitudes of what live rows see.
    score_max : longdouble
        Largest sum of the magnitudes of a score's terms, in rows that are not `reached`.
    """

    out: Wide
    lse: Wide
    sees: NDArray[np.bool_]
    reached: NDArray[np.bool_]
    visible: NDArray[np.bool_]
    slack: Wide
    query_max: float
    key_max: float
    value_max: float
    bias_max: float
    score_max: Any


def spans(mask: MaskFacts, batch: int, len_q: int, len_kv: int) -> list[Span]:
    """Sequences of a problem: one per batch entry, or one per packed sequence."""
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_kv is not None:
        q, kv = mask.cu_seqlens_q, mask.cu_seqlens_kv
        return [Span(0, q[i], q[i + 1], kv[i], kv[i + 1]) for i in range(len(q) - 1)]
    ends = mask.lengths if mask.lengths is not None else (len_kv,) * batch
    return [Span(b, 0, len_q, 0, ends[b]) for b in range(batch)]


def intervals(mask: MaskFacts, rows: int, keys: int) -> Iterator[tuple[int, int]]:
    """First and one-past-last key that each row may see by position."""
    shift = keys - rows if mask.alignment == "bottom_right" else 0
    for i in range(rows):
        p = i + shift
        low = 0 if mask.left is None else max(0, p - int(mask.left))
        high = keys if mask.right is None else min(keys, p + int(mask.right) + 1)
        yield low, max(low, high)


def visibility(
    mask: MaskFacts, span: Span, head: int, full: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Which key each row sees, shape (rows, keys): positions, boolean mask, bias of -inf."""
    rows, keys = span.q1 - span.q0, span.k1 - span.k0
    seen = np.zeros((rows, keys), bool)
    for i, (low, high) in enumerate(intervals(mask, rows, keys)):
        seen[i, low:high] = True
    if mask.allowed is not None:
        seen &= _part(mask.allowed, span, head, full)
    if mask.bias is not None:
        seen &= _part(mask.bias, span, head, full) != -np.inf
    return seen


def attention_of_head(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    scale: float,
    mask: MaskFacts,
    span: Span,
    head: int,
    group: int,
    softcap: float | None = None,
    sink: float = -np.inf,
) -> Head:
    """Attention of one head of one sequence.

    Parameters
    ----------
    query : ndarray, shape (batch, heads_q, len_q, dim_qk)
    key, value : ndarray, shapes (batch, heads_kv, len_kv, dim_qk), (..., dim_v)
    scale : float
    mask : MaskFacts
    span : Span
    head : int
        Query head; it reads key/value head ``head // group``.
    group : int
    softcap : float or None
        Scaled scores become ``softcap * tanh(score / softcap)``, before the bias.
    sink : float
        One more logit in the denominator of every row; the lse counts it.
    """
    full = (*query.shape[:3], key.shape[2])
    q = _wide(query[span.batch, head, span.q0 : span.q1])
    k = _wide(key[span.batch, head // group, span.k0 : span.k1])
    v = _wide(value[span.batch, head // group, span.k0 : span.k1])
    visible = visibility(mask, span, head, full)
    sees = _any(visible)
    bias = np.zeros(visible.shape, np.longdouble)
    if mask.bias is not None:
        bias = _wide(_part(mask.bias, span, head, full))
    bad_key = ~np.isfinite(k).all(axis=1) | ~np.isfinite(v).all(axis=1)
    bad = _any(visible & (bad_key | ~np.isfinite(bias)))
    reached = sees & (bad | _any(~np.isfinite(q)))

    out = np.zeros((len(q), v.shape[1]), np.longdouble)
    lse = np.full(len(q), sink, np.longdouble)
    slack = np.zeros(len(q), np.longdouble)
    score_max = np.longdouble(0)
    with np.errstate(all="ignore"):
        for i in np.flatnonzero(sees):
            j = np.flatnonzero(visible[i])
            scores = np.longdouble(scale) * (k[j] * q[i]).sum(axis=1)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            scores = scores + bias[i, j]
            top = np.maximum(scores.max(), sink)
            weights = np.exp(scores - top)
            total = weights.sum() + np.exp(sink - top)
            out[i] = (weights[:, None] * v[j]).sum(axis=0) / total
            lse[i] = top + np.log(total)
            if not reached[i]:
                # Terms, not their sum: what cancels has been rounded before.
                terms = np.longdouble(scale) * (abs(k[j]) * abs(q[i])).sum(axis=1)
                size = (terms + abs(bias[i, j])).max()
                size = max(size, abs(np.longdouble(sink)) if np.isfinite(sink) else 0)
                score_max = max(score_max, size)
                moved = min(np.longdouble(1), UNIT * (q.shape[1] + 8) * size)
                spread = _norm(v[j].max(axis=0) - v[j].min(axis=0))
                if sink != -np.inf:  # one more key, of value 0
                    spread = max(spread, 2 * _norm(abs(v[j]).max(axis=0)))
                slack[i] = 4 * moved * spread + UNIT * (len(j) + 16) * _norm(abs(v[j]).max(0))
    any_row = visible.any(axis=0)
    return Head(
        out=out,
        lse=lse,
        sees=sees,
        reached=reached,
        visible=visible,
        slack=slack,
        query_max=_largest(q[sees]),
        key_max=_largest(k[any_row]),
        value_max=_largest(v[any_row]),
        bias_max=_largest(bias[visible]),
        score_max=score_max,
    )


def row_norms(x: Wide) -> Wide:
    """Euclidean norms of the rows; squares do not overflow in this format."""
    with np.errstate(all="ignore"):
        return np.asarray(np.sqrt((x * x).sum(axis=-1)))


def root_mean_square(norms: Wide) -> Any:
    """Root of the mean square of some norms; 0 for none."""
    with np.errstate(all="ignore"):
        return np.sqrt((norms * norms).mean()) if norms.size else np.longdouble(0)


def _any(x: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether anything is true in each row."""
    return np.asarray(x.any(axis=1))


def _norm(x: Wide) -> Any:
    return np.sqrt((x * x).sum())


def _part(array: Any, span: Span, head: int, full: tuple[int, ...]) -> NDArray[Any]:
    whole = np.broadcast_to(np.asarray(array), full)
    return np.asarray(whole[span.batch, head, span.q0 : span.q1, span.k0 : span.k1])


def _wide(x: NDArray[Any]) -> Wide:
    # ml_dtypes' bfloat16 knows no cast to longdouble; through float64 it is exact.
    return np.asarray(x).astype(np.float64).astype(np.longdouble)


def _largest(x: Wide) -> float:
    finite = abs(x[np.isfinite(x)])
    return float(finite.max()) if finite.size else 0.0
