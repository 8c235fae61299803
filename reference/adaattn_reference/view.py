"""One head of a problem as plain NumPy arrays, with what executors need about its mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import to_numpy
from adaattn_core.bounds import row_norms_upper
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_reference.key_values import Float, KeyValues, diameter_upper
from adaattn_reference.masking import HeadMask, MaskScan, WeighedMask

Picked = slice | NDArray[np.int64]

SCORE_RANGE = {np.dtype(np.float32): 1e37, np.dtype(np.float64): 1e307}
"""Scores, and sums of values, of at most this magnitude neither overflow nor become NaN."""
SCALE_RANGE = (1e-30, 1e30)
"""Score scales that float32 holds with room to spare on both sides."""


@dataclass(eq=False)
class HeadView:
    """One (sequence, head): contiguous operands and the visible interval of every row.

    Attributes
    ----------
    query : ndarray, shape (len_q, dim_qk)
        In the working dtype.
    kv : KeyValues
        What the head attends to, shared with the other heads of its group.
    start, stop : ndarray of int64, shape (len_q,)
        Visible keys of each row, counted from the first key kept here.
    allowed, bias : ndarray or None, shape (len_q, len_kv)
        Broadcast views of boolean and additive masks, cut to the same keys.
    scale : float
    live : ndarray of bool, shape (len_q,)
        Rows that see a key; the queries of the others are 0 here, and count nowhere.
    first_key : int
        Number, within the sequence, of the first key kept here.
    softcap : float
        What scores are capped to; 0 for no cap.
    sink : float or None
        The head's sink.
    """

    query: Float
    kv: KeyValues
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    allowed: NDArray[np.bool_] | None
    bias: Float | None
    scale: float
    live: NDArray[np.bool_]
    first_key: int = 0
    softcap: float = 0.0
    sink: float | None = None

    @property
    def key(self) -> Float:
        """Keys, shape (len_kv, dim_qk)."""
        return self.kv.key

    @property
    def value(self) -> Float:
        """Values, shape (len_kv, dim_v)."""
        return self.kv.value

    @property
    def len_q(self) -> int:
        """Query rows."""
        return len(self.query)

    @property
    def len_kv(self) -> int:
        """Keys that some row's interval reaches."""
        return len(self.key)

    @property
    def structural(self) -> bool:
        """Whether the mask is an interval per row and nothing else."""
        return self.allowed is None and self.bias is None

    @cached_property
    def visible(self) -> int:
        """Scores that the structural mask leaves."""
        return int((self.stop - self.start).sum())

    @cached_property
    def query_norm(self) -> NDArray[np.float64]:
        """Euclidean norm of every query, rounded up."""
        return row_norms_upper(self.query)

    @cached_property
    def query_norm_upper(self) -> float:
        """Largest Euclidean norm of a query row."""
        return float(self.query_norm.max(initial=0.0))

    @property
    def value_diameter_upper(self) -> float:
        """Upper bound of the distance between two values that the head's rows see."""
        # Intervals of consecutive rows leave no gap: every key kept here is seen by the head.
        if self.structural or self.seen_keys.all():
            return self.kv.value_diameter_upper
        return diameter_upper(self.kv.clean_value[self.seen_keys])

    @cached_property
    def nonfinite(self) -> bool:
        """Whether a row sees NaN or Inf: in its query, a key, a value or the additive mask."""
        if not np.isfinite(self.query_norm_upper) and not np.isfinite(self.query).all():
            return True
        if self.bias is not None and self.scanned.nonfinite:
            return True
        return bool(self.kv.bad.any()) and bool((self.kv.bad & self.seen_keys).any())

    @cached_property
    def in_range(self) -> bool:
        """Whether no score that a row sees, and no sum of values, can overflow.

        By Cauchy-Schwarz, before an additive mask is added; the scale itself counts too.
        """
        return self._in_range(self.seen(self.kv.key_norm)) and (
            self.query.dtype != np.float32 or SCALE_RANGE[0] < self.scale < SCALE_RANGE[1]
        )

    def _in_range(self, key_norm: Float) -> bool:
        key, value = (
            float(x.max(initial=0.0)) for x in (key_norm, self.seen(self.kv.value_norm))
        )
        reach = self.query_norm_upper * max(self.scale, 1.0)
        largest = max(reach, reach * key, key, value * max(self.len_kv, 1))
        return largest < SCORE_RANGE[self.query.dtype]

    @cached_property
    def regular(self) -> bool:
        """Whether every score that a row sees is sure to be finite.

        Only such heads run under a structure: what NaN, Inf and overflow reach is then exactly
        the rows that see them.
        """
        return self.in_range and not self.nonfinite

    @cached_property
    def finite_products(self) -> bool:
        """Whether no product of query and key can be NaN or Inf, hidden ones included."""
        return self._in_range(self.kv.key_norm)

    @property
    def finite_scores(self) -> bool:
        """Whether no score can be, with what a mask adds."""
        return self.bias is None and self.finite_products

    def bounded_by(self, exponent: float) -> bool:
        """Whether sums of ``exp(score)``, and of values weighted by it, are in range.

        That is, below ``exp(exponent)`` and above its inverse, whatever the keys of a row.
        """
        largest = self.query_norm_upper * float(self.kv.key_norm.max(initial=0.0)) * self.scale
        value = float(self.kv.value_norm.max(initial=0.0))
        if self.bias is not None or not 0 < value < math.inf:
            return False
        return largest < exponent - math.log(self.len_kv) - abs(math.log(value))

    def seen(self, per_key: Float) -> Float:
        """Entries of a per-key array that belong to keys some row sees."""
        return per_key if self.seen_keys.all() else per_key[self.seen_keys]

    def seen_by_all(self, rows: slice) -> tuple[int, int]:
        """First and one-past-last key that every row of a tile is sure to see."""
        if not self.structural:
            return 0, 0
        return int(self.start[rows].max(initial=0)), int(self.stop[rows].min(initial=2**62))

    @cached_property
    def seen_keys(self) -> NDArray[np.bool_]:
        """Keys that at least one row sees."""
        if self.structural:
            edges = np.zeros(self.len_kv + 1, np.int64)
            rows = self.stop > self.start
            np.add.at(edges, self.start[rows], 1)
            np.add.at(edges, self.stop[rows], -1)
            return np.asarray(np.cumsum(edges[:-1]) > 0)
        return self.scanned.seen_keys

    @cached_property
    def weighed_mask(self) -> WeighedMask:
        """Boolean and additive masks, as `adaattn_reference.masking` reads them."""
        return WeighedMask(
            mask=HeadMask(self.start, self.stop, self.allowed, self.bias),
            query_reach=self.query_norm * self.scale,
            key_norm=self.kv.key_norm,
            value_norm=self.kv.value_norm,
            dtype=self.query.dtype,
        )

    @property
    def scanned(self) -> MaskScan:
        """What one look at boolean and additive masks tells."""
        return self.weighed_mask.scan

    def sees(self, rows: slice, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether rows see keys, whatever the scores are, shape (rows, keys)."""
        flags = np.zeros((rows.stop - rows.start, len(keys)), self.query.dtype)
        self.mask_columns(flags, rows, keys)
        return np.asarray(flags != -np.inf)

    @property
    def lse_shift(self) -> NDArray[np.float64] | None:
        """What `mask_scores` leaves out of a row's scores, to be added to its log-sum-exp."""
        return None if self.bias is None else self.scanned.shift

    def mask_scores(
        self, scores: Float, rows: slice | NDArray[np.int64], first: int, last: int
    ) -> bool:
        """Apply the mask to scores of keys first..last-1 in place.

        Masked entries become -inf by selection, so that NaN in a masked key cannot survive.

        Returns
        -------
        bool
            Whether anything may have been masked.
        """
        start, stop = self.start[rows], self.stop[rows]
        masked = self._mask_arrays(scores, rows, slice(first, last))
        if not len(start):
            return masked
        # Only the columns that some row does not see need a comparison per row.
        low, high = min(int(start.max()), last), max(int(stop.min()), first)
        if first < low:
            hidden = np.arange(first, low) < start[:, None]
            hide(scores[:, : low - first], hidden, self.finite_scores)
        if high < last:
            hidden = np.arange(high, last) >= stop[:, None]
            hide(scores[:, high - first :], hidden, self.finite_scores)
        masked |= first < low or high < last
        return masked

    def mask_columns(self, scores: Float, rows: slice, keys: NDArray[np.int64]) -> None:
        """Apply the mask to scores of keys in any order in place; see `mask_scores`."""
        self._mask_arrays(scores, rows, keys)
        hidden = (keys < self.start[rows, None]) | (keys >= self.stop[rows, None])
        np.copyto(scores, -np.inf, where=hidden)

    def _mask_arrays(self, scores: Float, rows: Picked, keys: Picked) -> bool:
        """Add the additive mask, hide what the arrays hide, and turn overflow into NaN."""
        bias = None
        if self.bias is not None:
            bias = self.weighed_mask.addend(rows, keys)
            with np.errstate(invalid="ignore"):
                absorbed = self.scanned.absorbed[rows]
                if absorbed.any():
                    scores[absorbed] *= 0
                np.add(scores, bias, out=scores)
        if not self.regular:  # a score that is too large is no key that is hidden
            overflown = np.isinf(scores) & self.kv.finite_key[keys]
            overflown &= np.isfinite(self.query[rows]).all(axis=1, keepdims=True)
            np.copyto(scores, np.nan, where=overflown)
        # -inf alone hides: neither NaN of a product nor what was taken for overflow stays.
        if bias is not None and not (self.regular and self.finite_products):
            np.copyto(scores, -np.inf, where=bias == -np.inf)
        if self.allowed is not None:
            np.copyto(scores, -np.inf, where=~self.allowed[rows][:, keys])
        return not self.structural


class ProblemViews:
    """Views of every head of a problem, converted once; keys and values per key/value head."""

    def __init__(self, problem: AttentionProblem, dtype: Any = np.float32) -> None:
        self.problem = problem
        self.dtype = np.dtype(dtype)
        self._query = to_numpy(problem.query)
        self._sinks = None if problem.sinks is None else to_numpy(problem.sinks)
        self._allowed = self._mask_array(problem.mask.allowed)
        self._bias = self._mask_array(problem.mask.bias)
        self._kv: dict[tuple[int, int], KeyValues] = {}
        self._views: dict[HeadIndex, HeadView] = {}
        self._lock = Lock()

    @cached_property
    def _key_value(self) -> tuple[NDArray[Any], NDArray[Any]]:
        p = self.problem
        if p.paged is not None:
            return p.paged.gather()
        return to_numpy(p.key), to_numpy(p.value)

    def _mask_array(self, mask: Any) -> NDArray[Any] | None:
        if mask is None:
            return None
        p = self.problem
        array = to_numpy(mask)
        return np.broadcast_to(array, (p.batch, p.heads_q, p.len_q, p.len_kv))

    def __getitem__(self, index: HeadIndex) -> HeadView:
        if index not in self._views:
            self._views[index] = self.rows(index, slice(None))
        return self._views[index]

    def rows(self, index: HeadIndex, rows: slice | NDArray[np.int64]) -> HeadView:
        """View of some rows of a head; keys and values are those of the whole head."""
        p, (sequence, head) = self.problem, index
        span = p.sequences[sequence]
        start, stop = p.intervals(sequence)
        seen = stop > start
        low = int(start[seen].min()) if seen.any() else 0
        high = int(stop[seen].max()) if seen.any() else 0
        whole = slice(span.q_start, span.q_stop)
        columns = slice(span.kv_start + low, span.kv_start + high)
        allowed, bias = (
            None if m is None else m[span.batch, head, whole, columns][rows]
            for m in (self._allowed, self._bias)
        )
        start = np.clip(start[rows] - low, 0, high - low)
        stop = np.clip(stop[rows] - low, 0, high - low)
        query = self._convert(self._query[span.batch, head, whole][rows])
        live = HeadMask(start, stop, allowed, bias).live(high - low)
        if not live.all():
            query = np.where(live[:, None], query, query.dtype.type(0))
        return HeadView(
            query=query,
            kv=self._key_values(sequence, head // p.group_size, low, high),
            start=start,
            stop=stop,
            allowed=allowed,
            bias=bias,
            scale=p.scale,
            live=live,
            first_key=low,
            softcap=p.softcap or 0.0,
            sink=None if self._sinks is None else float(self._sinks[head]),
        )

    def _key_values(self, sequence: int, head_kv: int, low: int, high: int) -> KeyValues:
        with self._lock:
            if (sequence, head_kv) not in self._kv:
                span = self.problem.sequences[sequence]
                rows = slice(span.kv_start + low, span.kv_start + high)
                key, value = self._key_value
                self._kv[sequence, head_kv] = KeyValues(
                    self._convert(key[span.batch, head_kv, rows]),
                    self._convert(value[span.batch, head_kv, rows]),
                )
            return self._kv[sequence, head_kv]

    def _convert(self, x: NDArray[Any]) -> Float:
        with np.errstate(over="ignore"):  # f64 beyond f32: becomes Inf and is reported
            return np.ascontiguousarray(x, dtype=self.dtype)


def hide(scores: Float, hidden: NDArray[np.bool_], finite: bool) -> None:
    """Set hidden scores to -inf in place.

    Taking a minimum is several times faster than a masked copy, but would keep a NaN: it is
    used only where the scores are known to be finite.
    """
    if finite:
        cap = np.where(hidden, scores.dtype.type(-np.inf), scores.dtype.type(np.inf))
        np.minimum(scores, cap, out=scores)
    else:
        np.copyto(scores, -np.inf, where=hidden)
