"""Score-then-skip: every visible score; softmax and P·V only for keys that can still matter.

A key tile is skipped for a query tile when all its scores lie at least ln(1/lam) below each
row's running log-sum-exp. That never exceeds the final one, so a skipped key carries at most
`lam` of its row (docs/math/04-dropped-mass.md, corollary 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.facts import Arithmetic
from adaattn_core.structure import ScoreSkip
from adaattn_reference.dense import CHUNK_KEYS, HeadOutput, add_chunk, key_range
from adaattn_reference.operands import Operands
from adaattn_reference.scratch import scratch
from adaattn_reference.softmax import RowAccumulator
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

KEYS_AT_ONCE = 512
"""Keys whose scores are held while deciding which of them matter: 512 kB for 256 rows stays in
a core's cache."""
NEAR_KEYS, FIRST_KEYS = 64, 16
"""Keys beside a tile of rows, and at the start of the sequence, that are visited first."""
SLACK = 1e-4
"""Relative allowance for the rounding of a chunk's sums and exponentials in a reported dropped
mass."""
STEP_ROUNDINGS = 4
"""Units more for every chunk visited: exponential, product and sum of the running sums."""


def score_skip(view: HeadView, operands: Operands, structure: ScoreSkip) -> HeadOutput:
    """Run the structure on one head.

    The nearest and the first keys of a tile of rows come first: they mostly hold the largest
    scores, so that the other keys meet a running log-sum-exp that is already high. What each
    row loses is bounded as it happens.
    """
    result, most = HeadOutput.empty(view, operands), 1
    for start in range(0, view.len_q, structure.tile_q):
        rows = slice(start, min(start + structure.tile_q, view.len_q))
        tile = _Tile(view, operands, rows)
        unmasked = view.seen_by_all(rows)
        for first, last in visiting_order(view, rows, structure.tile_kv):
            scores = operands.scores(rows, slice(first, last))
            if not (unmasked[0] <= first and last <= unmasked[1]):
                view.mask_scores(scores, rows, first, last)
            keep = tile.keys_that_matter(scores, structure)
            if len(keep) == last - first:
                tile.take(scores.copy(), first + keep)
            elif len(keep):
                tile.take(scores.take(keep, axis=1), first + keep)
        tile.add()
        result.computed += tile.computed
        result.out[rows], result.lse[rows] = tile.accumulator.finish()
        result.dropped_mass_upper = max(result.dropped_mass_upper, tile.dropped_mass_upper())
        most = max(most, tile.sum_keys_max)
    # Kept scores wait until there are CHUNK_KEYS of them.
    result.arithmetic = Arithmetic(step_keys=CHUNK_KEYS, sum_keys_max=most)
    return result


def visiting_order(view: HeadView, rows: slice, size: int) -> Iterator[tuple[int, int]]:
    """Chunks of whole key tiles covering what the rows may see: nearest, first, the others."""
    low, high = key_range(view, rows)
    low -= low % size
    if low >= high:
        return
    stop = high
    if view.len_q == view.len_kv and (view.stop[rows] == high).all():
        # No causal edge: the nearest keys lie on both sides of the rows' own positions.
        stop = min(-(-(rows.stop + NEAR_KEYS) // size) * size, high)
        stop = stop if stop > low else high
    near = max(stop - (rows.stop - rows.start) - (1 + (stop < high)) * NEAR_KEYS, low)
    near -= near % size
    yield near, stop
    middle = min(low + -(-FIRST_KEYS // size) * size, near)
    if low < middle:
        yield low, middle
    width = max(KEYS_AT_ONCE // size, 1) * size
    for begin, end in ((middle, near), (stop, high)):
        for first in range(begin, end, width):
            yield first, min(first + width, end)


class _Tile:
    """A tile of rows on its way through its keys: kept scores wait until there are enough.

    Few keys of a chunk are kept, and a product with a handful of values costs as much as one
    with many. The running sums that decide what is skipped do not wait.

    Attributes
    ----------
    top : ndarray, shape (rows,)
        Largest kept score of each row; -inf for none.
    total : ndarray, shape (rows,)
        Sum of ``exp(score - top)`` over the kept keys.
    dropped : ndarray, shape (rows,)
        Upper bound of the same sum over the skipped keys.
    """

    def __init__(self, view: HeadView, operands: Operands, rows: slice) -> None:
        self.view, self.operands, self.rows = view, operands, rows
        self.accumulator = RowAccumulator(rows.stop - rows.start, operands)
        self.top = self.accumulator.top.copy()
        self.total = self.accumulator.total.copy()
        self.dropped = np.zeros_like(self.total)
        self.computed = 0
        self.sum_keys_max = 1
        self.steps = 0
        self._scores: list[Float] = []
        self._keys: list[NDArray[np.int64]] = []
        self._waiting = 0

    def keys_that_matter(self, scores: Float, structure: ScoreSkip) -> NDArray[np.int64]:
        """Columns of the key tiles that some row needs; counts what the others can lose.

        NaN compares false, so a tile with a NaN score is kept and reported; so is every visible
        key while a row has kept none. Hidden keys are needed by no row.
        """
        self.steps += 1
        size, keys = structure.tile_kv, scores.shape[1]
        shift = np.where(self.top == -np.inf, 0, self.top)
        with np.errstate(divide="ignore"):
            limit = shift + np.log(self.total.astype(np.float64)) + np.log(structure.lam)
        # Rounded down, so that a score at the limit is no higher than the limit.
        limit = np.nextafter(limit.astype(scores.dtype), -np.inf)[:, None]
        if size == 1:
            below = np.less_equal(scores, limit, out=scratch("below", scores.shape, bool))
            skip = below.all(axis=0)
            self.dropped += skip.sum() * structure.lam * self.total
            return np.flatnonzero(~skip)
        edges = np.arange(0, keys, size)
        best = np.maximum.reduceat(scores, edges, axis=1)
        skip = (best <= limit).all(axis=0)
        counts = np.diff(np.append(edges, keys))
        if skip.any():
            lost = np.exp(best[:, skip] - shift[:, None])
            self.dropped += lost @ counts[skip].astype(lost.dtype)
        return np.flatnonzero(np.repeat(~skip, counts))

    def take(self, scores: Float, keys: NDArray[np.int64]) -> None:
        """Keep some masked scores; sums count against the new maximum."""
        top = np.maximum(self.top, scores.max(axis=1))
        shift = np.where(top == -np.inf, 0, top)
        factor = np.exp(self.top - shift)
        self.dropped *= factor
        self.total *= factor
        self.total += np.exp(scores - shift[:, None]).sum(axis=1)
        self.top = top
        self._scores.append(scores)
        self._keys.append(keys)
        self._waiting += len(keys)
        if self._waiting >= CHUNK_KEYS:
            self.add()

    def add(self) -> None:
        """Add the scores that wait."""
        if not self._waiting:
            return
        scores, keys = np.hstack(self._scores), np.concatenate(self._keys)
        self._scores, self._keys, self._waiting = [], [], 0
        self.computed += int((scores != -np.inf).sum())
        self.sum_keys_max = max(self.sum_keys_max, len(keys))
        add_chunk(self.view, self.operands, self.accumulator, scores, self.rows, keys, keys)

    def dropped_mass_upper(self) -> float:
        """Largest share of a row's mass that was dropped, rounded up."""
        total = np.where(self.total > 0, self.total, 1)
        unit = float(np.finfo(self.total.dtype).eps)
        return float((self.dropped / total).max(initial=0.0)) * (
            1 + SLACK + STEP_ROUNDINGS * self.steps * unit
        )
