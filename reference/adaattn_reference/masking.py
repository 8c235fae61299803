"""Boolean and additive masks of a head: what its rows see, and what is added to their scores.

Softmax is shift-invariant, so the largest entry that a row sees in an additive mask is taken
off the whole row before anything is cast or added: the mask's own size then costs no accuracy,
and no finite entry can overflow. The row's log-sum-exp gets it back.

A key is hidden where a mask says False or -inf, and where its weight is *certainly* 0 beside
the row's largest, whatever the scores. With ``r`` the largest ``scale |q| |k|`` and ``V`` the
largest ``|v|``, over the keys that the row or one near it sees, an entry (shifted) below

    -(2 r + 750 + ln max(V, 1))

leaves the key less than exp(-750) of the output, which float64 cannot hold. That is what masks
filled with -1e9 or with the lowest finite number mean to say.

Where the shift is so large that no floating-point format holds a score beside it, the sum of
score and mask is the mask alone: such a row weighs its keys by the mask, as plain arithmetic
does. A row of nothing but the lowest finite number is the mean of its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]
Picked = slice | NDArray[np.int64]

UNDERFLOW = 750.0
"""exp of less than minus this is 0 in float64 (and in float32), subnormal numbers included."""
ABSORBING = 2.0**70
"""A mask entry this many times larger than a score swallows it: their sum is the entry, in
float64 and in wider formats. (From 2^53 on a part of the score is lost: that is charged.)"""
FAR = 1e30
"""Entries this far below the largest are looked at one by one before they are cast."""
SCAN_ENTRIES = 1 << 18
"""Mask entries that are looked at at once."""


@dataclass(eq=False)
class MaskScan:
    """What one look at the masks of a head tells.

    Attributes
    ----------
    seen_keys : ndarray of bool, shape (len_kv,)
        Keys that at least one row sees.
    shift : ndarray of float64, shape (len_q,)
        Largest finite entry of the additive mask that a row sees; 0 without one.
    cutoff : ndarray of float64, shape (len_q,)
        Entries below it, after the shift, hide their key.
    absorbed : ndarray of bool, shape (len_q,)
        Rows whose sums of score and mask are the mask alone.
    bias_max_abs : float
        Largest magnitude of what a row adds to the score of a key that it sees.
    shift_max_abs : float
        Largest shift of a row that is not absorbed.
    nonfinite : bool
        Whether a row sees an entry that is NaN or +inf.
    plain : bool
        Whether the mask may be added as it is: no row is shifted, no finite entry hides a key.
    """

    seen_keys: NDArray[np.bool_]
    shift: NDArray[np.float64]
    cutoff: NDArray[np.float64]
    absorbed: NDArray[np.bool_]
    bias_max_abs: float = 0.0
    shift_max_abs: float = 0.0
    nonfinite: bool = False
    plain: bool = True


@dataclass(eq=False)
class HeadMask:
    """The masks of a head, cut to its rows and keys.

    Attributes
    ----------
    start, stop : ndarray of int64, shape (len_q,)
        Interval of keys that each row may see.
    allowed, bias : ndarray or None, shape (len_q, len_kv)
        Boolean and additive mask as the caller gave them, broadcast views.
    """

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    allowed: NDArray[np.bool_] | None
    bias: Float | None

    def visible(self, rows: slice, len_kv: int) -> NDArray[np.bool_]:
        """Whether the masks let rows see each key, shape (rows, len_kv), its weight aside."""
        start, stop = self.start[rows], self.stop[rows]
        parts = [] if self.allowed is None else [self.allowed[rows]]
        if self.bias is not None:
            parts.append(self.bias[rows] != -np.inf)
        if not parts or start.max(initial=0) > 0 or stop.min(initial=len_kv) < len_kv:
            keys = np.arange(len_kv)
            parts.append((keys >= start[:, None]) & (keys < stop[:, None]))
        seen = np.array(parts[0])
        for part in parts[1:]:
            seen &= part
        return seen

    def live(self, len_kv: int) -> NDArray[np.bool_]:
        """Whether each row sees a key."""
        live = self.stop > self.start
        if self.allowed is not None or self.bias is not None:
            for rows in self._chunks(len_kv):
                live[rows] = self.visible(rows, len_kv).any(axis=1)
        return live

    def _chunks(self, len_kv: int) -> list[slice]:
        step, len_q = max(SCAN_ENTRIES // max(len_kv, 1), 1), len(self.start)
        return [slice(a, min(a + step, len_q)) for a in range(0, len_q, step)]


@dataclass(eq=False)
class WeighedMask:
    """The masks of a head beside the sizes of its queries, keys and values.

    Attributes
    ----------
    mask : HeadMask
    query_reach : ndarray of float64, shape (len_q,)
        Norms of the queries times the score scale, rounded up.
    key_norm, value_norm : ndarray, shape (len_kv,)
        Rounded up; inf where a vector holds NaN or Inf.
    dtype : numpy dtype
        Of the scores.
    """

    mask: HeadMask
    query_reach: NDArray[np.float64]
    key_norm: Float
    value_norm: Float
    dtype: Any

    @cached_property
    def scan(self) -> MaskScan:
        """What one look at every entry tells."""
        len_q, len_kv = len(self.query_reach), len(self.key_norm)
        found = MaskScan(
            seen_keys=np.zeros(len_kv, bool),
            shift=np.zeros(len_q),
            cutoff=np.full(len_q, -np.inf),
            absorbed=np.zeros(len_q, bool),
        )
        for rows in self.mask._chunks(len_kv):
            seen = self.mask.visible(rows, len_kv)
            if self.mask.bias is not None:
                self._look(found, rows, seen)
            found.seen_keys |= seen.any(axis=0)
        return found

    def _look(self, found: MaskScan, rows: slice, seen: NDArray[np.bool_]) -> None:
        """Find out about some rows; keys that a cutoff hides are taken out of `seen`."""
        assert self.mask.bias is not None
        bias = self.mask.bias[rows]
        bias = bias if bias.dtype in (np.float32, np.float64) else bias.astype(np.float32)
        finite = np.isfinite(bias)
        finite &= seen
        found.nonfinite |= bool(np.count_nonzero(finite) < np.count_nonzero(seen))
        top = bias.max(axis=1, where=finite, initial=-np.inf).astype(np.float64)
        top[top == -np.inf] = 0
        columns = seen.any(axis=0)
        key, value = (
            float(x[columns].max(initial=0.0)) for x in (self.key_norm, self.value_norm)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            reach = self.query_reach[rows] * key
            cutoff = -(2 * reach + UNDERFLOW + np.log(max(value, 1.0)))
            absorbed = np.abs(top) > ABSORBING * reach
            least = bias.min(axis=1, where=finite, initial=np.inf).astype(np.float64) - top
        cutoff[np.isnan(cutoff)] = -np.inf
        found.shift[rows], found.cutoff[rows], found.absorbed[rows] = top, cutoff, absorbed
        moved = float(np.max(np.abs(top), where=~absorbed, initial=0.0))
        found.shift_max_abs = max(found.shift_max_abs, moved)
        if (least < np.maximum(cutoff, -FAR)).any():
            added = self._addend(found, rows, slice(0, len(self.key_norm)))
            seen &= added != -np.inf
            finite &= seen
            lowest = np.min(added, where=finite, initial=0.0)
            found.plain = False
        else:
            lowest = np.min(least, initial=0.0)
            found.plain &= not top.any()
        found.bias_max_abs = max(found.bias_max_abs, -float(lowest))

    def addend(self, rows: Picked, keys: Picked) -> Float:
        """Return what is added to scores of some rows and keys; -inf at hidden keys."""
        assert self.mask.bias is not None
        if self.scan.plain:
            with np.errstate(over="ignore"):  # of entries that no row sees
                return self.mask.bias[rows][:, keys].astype(self.dtype, copy=False)
        return self._addend(self.scan, rows, keys)

    def _addend(self, found: MaskScan, rows: Picked, keys: Picked) -> Float:
        assert self.mask.bias is not None
        bias: Float = self.mask.bias[rows][:, keys]
        shift, cutoff = found.shift[rows], found.cutoff[rows]
        hidden = bias == -np.inf
        with np.errstate(over="ignore", invalid="ignore"):
            if shift.any() or bias.dtype.itemsize > np.dtype(self.dtype).itemsize:
                bias = bias.astype(np.float64)
                bias -= shift[:, None]
            hidden |= bias < cutoff[:, None]
            added: Float = bias.astype(self.dtype)
        # What is not hidden stays finite in the scores' format, sums included.
        np.maximum(added, -np.finfo(self.dtype).max / 4, out=added)
        added[hidden] = -np.inf
        return added
