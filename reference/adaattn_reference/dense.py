"""Executors that compute exact scores: dense, and given or chosen key blocks.

All of them stream: a tile of query rows meets chunks of keys, and nothing of size
len_q x len_kv is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.facts import Arithmetic
from adaattn_core.structure import BlockSparse
from adaattn_reference.blocks import KeyBlocks
from adaattn_reference.operands import Operands
from adaattn_reference.softmax import RowAccumulator
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

TILE_ROWS, CHUNK_KEYS = 256, 1024
"""Working set of about 1 MB of scores: what stays in a core's cache."""
CHUNKS = Arithmetic(step_keys=CHUNK_KEYS, sum_keys_max=CHUNK_KEYS)


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
    arithmetic : Arithmetic
        How the softmax was streamed.
    """

    out: Float
    lse: Float
    computed: int
    rank: int = 0
    dropped_mass_upper: float = 0.0
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

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
    result.arithmetic = CHUNKS
    return result


def dense_tile(view: HeadView, operands: Operands, rows: slice) -> tuple[Float, Float]:
    """Attend to every visible key from one tile of rows."""
    accumulator = RowAccumulator(rows.stop - rows.start, operands)
    low, high = key_range(view, rows)
    for first in range(low, high, CHUNK_KEYS):
        last = min(first + CHUNK_KEYS, high)
        scores = operands.scores(rows, slice(first, last))
        view.mask_scores(scores, rows, first, last)
        keys = np.arange(first, last)
        add_chunk(view, operands, accumulator, scores, rows, keys, slice(first, last))
    return accumulator.finish()


def block_sparse(
    view: HeadView,
    operands: Operands,
    structure: BlockSparse,
    blocks: KeyBlocks,
) -> HeadOutput:
    """Attend to the visible keys of the given key blocks of each query tile.

    Complete, for the theorems, is what multiplied every key that a row of its tile can see.
    """
    result = HeadOutput.empty(view, operands)
    complete = True
    for tile, start in enumerate(range(0, view.len_q, structure.tile_q)):
        rows = slice(start, min(start + structure.tile_q, view.len_q))
        accumulator = RowAccumulator(rows.stop - rows.start, operands)
        low, high = key_range(view, rows)
        multiplied = blocks.holds(tile, low, high)
        keys = low + np.flatnonzero(multiplied)
        complete &= bool(multiplied.all())
        for first in range(0, len(keys), CHUNK_KEYS):
            chunk = keys[first : first + CHUNK_KEYS]
            scores = operands.scores(rows, chunk)
            view.mask_columns(scores, rows, chunk)
            result.computed += int((scores != -np.inf).sum())
            add_chunk(view, operands, accumulator, scores, rows, chunk, chunk)
        result.out[rows], result.lse[rows] = accumulator.finish()
    result.dropped_mass_upper = 0.0 if complete else np.inf
    result.arithmetic = CHUNKS
    return result


def add_chunk(
    view: HeadView,
    operands: Operands,
    accumulator: RowAccumulator,
    scores: Float,
    rows: slice,
    keys: NDArray[np.int64],
    selection: slice | NDArray[np.int64],
) -> None:
    """Add masked scores of some keys; non-finite values reach only the rows that see them."""
    bad = view.kv.bad_values
    positions = np.flatnonzero(np.isin(keys, bad)) if len(bad) else ()
    bad_scores = scores[:, positions].copy() if len(positions) else None
    accumulator.add(scores, operands.value[selection])
    if bad_scores is not None:
        bad_keys = keys[positions]
        accumulator.add_bad_values(bad_scores, view.value[bad_keys], view.sees(rows, bad_keys))


def key_range(view: HeadView, rows: slice) -> tuple[int, int]:
    """First and one-past-last key that any row of the tile may see."""
    start, stop = view.start[rows], view.stop[rows]
    seen = stop > start
    if not seen.any():
        return 0, 0
    return int(start[seen].min()), int(stop[seen].max())
