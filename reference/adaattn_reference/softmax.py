"""Online softmax over key chunks: the one accumulator that every executor uses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_reference.operands import Operands
from adaattn_reference.scratch import scratch

Float = NDArray[np.floating[Any]]
Rows = slice | NDArray[np.int64]
"""Rows of a tile: a range, or distinct row numbers."""


class RowAccumulator:
    """Running maximum, normaliser and weighted values of a tile of query rows.

    After chunks C of scores s and values v have been added::

        top = max s        total = sum exp(s - top)        sums = sum round(exp(s - top)) v

    One accumulator is in use per thread at a time: its sums live in the thread's buffer.

    Parameters
    ----------
    rows : int
    operands : Operands
        Knows how P is rounded and how P·V is accumulated.
    bounded : bool
        Whether every score is so small in magnitude that ``exp`` of it can be summed as it is:
        the maximum is then taken as 0.
    """

    def __init__(self, rows: int, operands: Operands, *, bounded: bool = False) -> None:
        dtype = operands.query.dtype
        self.operands = operands
        self.bounded = bounded
        self.top = np.full(rows, 0 if bounded else -np.inf, dtype)
        self.total = np.zeros(rows, dtype)
        self.sums = scratch("sums", (rows, operands.value.shape[1]), dtype)
        self.sums[:] = 0

    def rescale(self, chunk_top: Float, rows: Rows = slice(None)) -> tuple[Float, Float]:
        """Raise the running maximum; return the shift to subtract and the rescaling factors.

        Rows that have seen nothing get shift 0, so that -inf scores give weight exp(-inf) = 0.
        """
        top = np.maximum(self.top[rows], chunk_top)
        shift = np.where(top == -np.inf, np.zeros_like(top), top)
        factor = np.exp(self.top[rows] - shift)
        self.top[rows] = top
        self.total[rows] *= factor
        self.sums[rows] *= factor[:, None]
        return shift, factor

    def add(self, scores: Float, *values: Float, rows: Rows = slice(None)) -> None:
        """Add a chunk of scores (rows, keys), overwritten; `values` stack to (keys, dim_v)."""
        if not scores.shape[1]:
            return
        weights = self.weights(scores, rows)
        first = 0
        for block in values:
            part = weights[:, first : first + len(block)]
            self.sums[rows] += self.operands.weighted_sum(part, block)
            first += len(block)

    def weights(self, scores: Float, rows: Rows = slice(None)) -> Float:
        """Turn scores into softmax weights in place and count them; their values come later."""
        if not self.bounded:
            shift, _ = self.rescale(scores.max(axis=1), rows)
            scores -= shift[:, None]
        weights = np.exp(scores, out=scores)
        self.total[rows] += weights @ np.ones(weights.shape[1], weights.dtype)
        return weights

    def begin(self, scores: Float, value: Float, rows: NDArray[np.int64]) -> None:
        """Give rows that have seen nothing their first scores.

        `scores` has shape (batches, rows, keys) and is overwritten, `value` has shape
        (batches, keys, dim_v) and `rows` (batches * rows,).
        """
        if not self.bounded:
            top = scores.max(axis=2)
            self.top[rows] = top.ravel()
            scores -= np.where(top == -np.inf, np.zeros_like(top), top)[..., None]
        weights = np.exp(scores, out=scores)
        flat = weights.reshape(len(rows), -1)
        self.total[rows] = flat @ np.ones(flat.shape[1], flat.dtype)
        self.sums[rows] = self.operands.weighted_sum(weights, value).reshape(len(rows), -1)

    def add_bad_values(self, scores: Float, value: Float, sees: NDArray[np.bool_]) -> None:
        """Add the non-finite values that were left out of `add`, to the rows that see them.

        Parameters
        ----------
        scores : ndarray, shape (rows, bad keys)
            Masked scores of these keys, before any shift.
        value : ndarray, shape (bad keys, dim_v)
            Their original values.
        sees : ndarray of bool, shape (rows, bad keys)
            A row that may not see a key takes nothing from it.
        """
        for j in range(len(value)):
            seen = sees[:, j]
            weight = np.exp(scores[seen, j] - self.top[seen])
            self.sums[seen] += weight[:, None] * value[j]

    def lse(self, rows: Rows = slice(None)) -> Float:
        """Log-sum-exp of what the rows have seen so far; -inf for nothing."""
        with np.errstate(divide="ignore"):
            seen = self.top[rows] + np.log(self.total[rows])
        return np.where(self.total[rows] > 0, seen, -np.inf)

    def finish(self) -> tuple[Float, Float]:
        """Return output rows and their log-sum-exp (0 and -inf for rows that saw nothing).

        The rows lie in this thread's buffer: copy them before the next tile begins.
        """
        empty = self.total == 0
        safe = np.where(empty, np.ones_like(self.total), self.total)
        out = np.divide(self.sums, safe[:, None], out=self.sums)
        return out, np.where(empty, -np.inf, self.top + np.log(safe))
