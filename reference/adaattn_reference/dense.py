"""Executors that compute exact scores: dense, score-then-skip, and given or chosen key blocks.

All of them stream: a tile of query rows meets chunks of keys, and nothing of size
len_q x len_kv is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import BlockSparse, ScoreSkip
from adaattn_reference.operands import Operands
from adaattn_reference.scratch import scratch
from adaattn_reference.softmax import RowAccumulator
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

TILE_ROWS, CHUNK_KEYS = 256, 1024
"""Working set of about 1 MB of scores: what stays in a core's cache."""
SKIP_KEYS = 512
"""Keys whose scores are held while deciding which of them matter: 512 kB for 256 rows stays in
a core's cache."""
SKIP_NEAR_KEYS, SKIP_FIRST_KEYS = 64, 16
"""Keys before a tile of rows, and at the start of the sequence, that are never skipped."""


@dataclass(eq=False)
class HeadOutput:
    """What an executor returns for one head.

    Attributes
    ----------
    out : ndarray, shape (len_q, dim_v)
    lse : ndarray, shape (len_q,)
    computed : int
        Scores that entered the softmax (pooled columns included), among the visible ones.
    rank : int
        Columns standing for the far field, or feature rank.
    dropped_mass_upper : float
        Largest share of a row's mass left out; inf where nothing is known.
    sum_keys_max : int
        Most keys of one product P·V; 0 where it is not recorded.
    """

    out: Float
    lse: Float
    computed: int
    rank: int = 0
    dropped_mass_upper: float = 0.0
    sum_keys_max: int = 0

    @classmethod
    def empty(cls, view: HeadView, operands: Operands) -> HeadOutput:
        """Output of a head whose rows see nothing yet."""
        return cls(
            out=np.zeros((view.len_q, view.value.shape[1]), operands.query.dtype),
            lse=np.full(view.len_q, -np.inf, operands.query.dtype),
            computed=0,
        )


def dense(view: HeadView, operands: Operands) -> HeadOutput:
    """Attend to every visible key."""
    result = HeadOutput.empty(view, operands)
    for first in range(0, view.len_q, TILE_ROWS):
        rows = slice(first, min(first + TILE_ROWS, view.len_q))
        result.out[rows], result.lse[rows] = dense_tile(view, operands, rows)
    result.computed = view.visible
    result.sum_keys_max = CHUNK_KEYS
    return result


def dense_tile(view: HeadView, operands: Operands, rows: slice) -> tuple[Float, Float]:
    """Attend to every visible key from one tile of rows."""
    accumulator = RowAccumulator(rows.stop - rows.start, operands)
    low, high = _key_range(view, rows)
    for first in range(low, high, CHUNK_KEYS):
        last = min(first + CHUNK_KEYS, high)
        scores = operands.scores(rows, slice(first, last))
        view.mask_scores(scores, rows, first, last)
        _add_chunk(
            view, operands, accumulator, scores, np.arange(first, last), slice(first, last)
        )
    return accumulator.finish()


def score_skip(view: HeadView, operands: Operands, structure: ScoreSkip) -> HeadOutput:
    """Compute every visible score; softmax and P·V only for key tiles that can still matter.

    The nearest and the first keys of a tile of rows come first and are kept whole: they mostly
    hold the largest scores, so the other keys meet a running maximum that is already high. A
    key tile is dropped when its best score lies below every row's running maximum by more than
    ln(1/lam). What each row loses that way is bounded as it happens.
    """
    result = HeadOutput.empty(view, operands)
    for start in range(0, view.len_q, structure.tile_q):
        rows = slice(start, min(start + structure.tile_q, view.len_q))
        tile = _SkipTile(view, operands, rows)
        unmasked = view.seen_by_all(rows)
        for first, last in _skip_chunks(view, rows, structure.tile_kv):
            scores = operands.scores(rows, slice(first, last))
            if not (unmasked[0] <= first and last <= unmasked[1]):
                view.mask_scores(scores, rows, first, last)
            keep = _keys_that_matter(scores, tile.top, structure, tile.dropped)
            if len(keep) == last - first:
                tile.take(scores.copy(), first + keep)
            elif len(keep):
                tile.take(scores.take(keep, axis=1), first + keep)
        tile.add()
        result.computed += tile.computed
        result.out[rows], result.lse[rows] = tile.accumulator.finish()
        result.dropped_mass_upper = max(result.dropped_mass_upper, tile.dropped_mass_upper())
        result.sum_keys_max = max(result.sum_keys_max, tile.sum_keys_max)
    return result


class _SkipTile:
    """A tile of rows on its way through its keys: kept scores wait until there are enough.

    Few keys of a chunk are kept, and a product with a handful of values costs as much as one
    with many.
    """

    def __init__(self, view: HeadView, operands: Operands, rows: slice) -> None:
        self.view, self.operands = view, operands
        self.accumulator = RowAccumulator(rows.stop - rows.start, operands)
        self.top = self.accumulator.top.copy()
        self.dropped = np.zeros(rows.stop - rows.start, operands.query.dtype)
        self.computed = 0
        self.sum_keys_max = 1
        self._scores: list[Float] = []
        self._keys: list[NDArray[np.int64]] = []
        self._waiting = 0

    def take(self, scores: Float, keys: NDArray[np.int64]) -> None:
        """Keep some masked scores; what was dropped counts against the new maximum."""
        top = np.maximum(self.top, scores.max(axis=1))
        raised = self.top < top
        self.dropped[raised] *= np.exp(self.top[raised] - top[raised])
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
        _add_chunk(self.view, self.operands, self.accumulator, scores, keys, keys)

    def dropped_mass_upper(self) -> float:
        """Largest share of a row's mass that was dropped, rounded up."""
        total = np.where(self.accumulator.total > 0, self.accumulator.total, 1)
        return float((self.dropped / total).max(initial=0.0)) * (1 + 1e-4)


def _skip_chunks(view: HeadView, rows: slice, size: int) -> Iterator[tuple[int, int]]:
    """Chunks of whole key tiles covering what the rows may see: nearest, first, the others."""
    low, high = _key_range(view, rows)
    low -= low % size
    if low >= high:
        return
    near = max(high - (rows.stop - rows.start) - SKIP_NEAR_KEYS, low)
    near -= near % size
    yield near, high
    middle = min(low + -(-SKIP_FIRST_KEYS // size) * size, near)
    if low < middle:
        yield low, middle
    width = max(SKIP_KEYS // size, 1) * size
    for first in range(middle, near, width):
        yield first, min(first + width, near)


def _keys_that_matter(
    scores: Float, top: Float, structure: ScoreSkip, dropped: Float
) -> NDArray[np.int64]:
    """Columns of the key tiles that some row needs; adds what the others can lose to `dropped`.

    `top` is the rows' maximum so far. NaN compares false, so a tile with a NaN score is kept
    and reported, and so is everything while a row has no maximum yet.
    """
    size, keys = structure.tile_kv, scores.shape[1]
    limit = (top + np.log(structure.lam)).astype(scores.dtype)[:, None]
    if size == 1:
        below = np.less(scores, limit, out=scratch("below", scores.shape, bool))
        skip = below.all(axis=0)
        dropped += skip.sum() * structure.lam
        return np.flatnonzero(~skip)
    edges = np.arange(0, keys, size)
    best = np.maximum.reduceat(scores, edges, axis=1)
    skip = (best < limit).all(axis=0)
    counts = np.diff(np.append(edges, keys))
    if skip.any():
        dropped += np.exp(best[:, skip] - top[:, None]) @ counts[skip].astype(dropped.dtype)
    return np.flatnonzero(np.repeat(~skip, counts))


def block_sparse(
    view: HeadView,
    operands: Operands,
    structure: BlockSparse,
    blocks: tuple[tuple[int, ...], ...],
) -> HeadOutput:
    """Attend to the visible keys of the given key blocks of each query tile."""
    result = HeadOutput.empty(view, operands)
    complete = True
    for tile, start in enumerate(range(0, view.len_q, structure.tile_q)):
        rows = slice(start, min(start + structure.tile_q, view.len_q))
        accumulator = RowAccumulator(rows.stop - rows.start, operands)
        low, high = _key_range(view, rows)
        kept = np.asarray(blocks[tile] if tile < len(blocks) else (), np.int64)
        keys = (kept[:, None] * structure.tile_kv + np.arange(structure.tile_kv)).ravel()
        keys = keys[(keys >= low) & (keys < high)]
        complete &= len(keys) == high - low
        for first in range(0, len(keys), CHUNK_KEYS):
            chunk = keys[first : first + CHUNK_KEYS]
            scores = operands.scores(rows, chunk)
            hidden = ~view.visible_block(np.arange(rows.start, rows.stop), low, high)
            hidden = hidden[:, chunk - low]
            if view.bias is not None:
                scores += view.bias[rows][:, chunk]
            np.copyto(scores, -np.inf, where=hidden)
            result.computed += int(hidden.size - hidden.sum())
            _add_chunk(view, operands, accumulator, scores, chunk, chunk)
        result.out[rows], result.lse[rows] = accumulator.finish()
    result.dropped_mass_upper = 0.0 if complete else np.inf
    result.sum_keys_max = CHUNK_KEYS
    return result


def _add_chunk(
    view: HeadView,
    operands: Operands,
    accumulator: RowAccumulator,
    scores: Float,
    keys: NDArray[np.int64],
    selection: slice | NDArray[np.int64],
) -> None:
    """Add masked scores of some keys; non-finite values reach only the rows that see them."""
    bad = view.kv.bad_values
    positions = np.flatnonzero(np.isin(keys, bad)) if len(bad) else ()
    bad_scores = scores[:, positions].copy() if len(positions) else None
    accumulator.add(scores, operands.value[selection])
    if bad_scores is not None:
        accumulator.add_bad_values(bad_scores, view.value[keys[positions]])


def _key_range(view: HeadView, rows: slice) -> tuple[int, int]:
    """First and one-past-last key that any row of the tile may see."""
    start, stop = view.start[rows], view.stop[rows]
    seen = stop > start
    if not seen.any():
        return 0, 0
    return int(start[seen].min()), int(stop[seen].max())
