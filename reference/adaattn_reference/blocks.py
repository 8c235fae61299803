"""Choosing key blocks from sampled rows, for the block-sparse structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import BlockSparse
from adaattn_reference.quantise import TINY
from adaattn_reference.score_rule import cap
from adaattn_reference.scratch import scratch
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]


def sample_rows(group: slice, count: int, seed: int) -> NDArray[np.int64]:
    """Draw distinct rows of a group; reproducible from the plan's seed alone."""
    size = group.stop - group.start
    rng = np.random.default_rng((seed, 1, group.start))
    drawn = rng.choice(size, min(count, size), replace=False)
    return np.asarray(np.sort(drawn) + group.start)


def exact_scores(view: HeadView, rows: NDArray[np.int64], keys: int) -> Float:
    """Masked scores of some rows and the first `keys` keys, in this thread's buffer."""
    query = view.query[rows] * view.query.dtype.type(view.scale)
    scores = scratch("probe", (len(rows), keys), query.dtype)
    np.matmul(query, view.kv.key_t[:, :keys], out=scores)
    cap(scores, view.softcap)
    view.mask_scores(scores, rows, 0, keys)
    return scores


def softmax_in_place(scores: Float) -> tuple[Float, Float]:
    """Turn masked scores into softmax weights in place; also return the log-sum-exp."""
    top = scores.max(axis=1, initial=-np.inf)
    top[top == -np.inf] = 0
    scores -= top[:, None]
    weights = np.exp(scores, out=scores)
    total = np.maximum(weights @ np.ones(weights.shape[1], weights.dtype), TINY)
    weights /= total[:, None]
    return weights, top + np.log(total)


@dataclass(frozen=True)
class KeyBlocks:
    """Key blocks that each query tile attends to.

    Attributes
    ----------
    numbers : tuple of tuple of int
        Of every query tile.
    size : int
        Keys per block.
    origin : int
        Where block 0 begins, counted from the view's first key: not after it.
    """

    numbers: tuple[tuple[int, ...], ...]
    size: int
    origin: int = 0

    def holds(self, tile: int, low: int, high: int) -> NDArray[np.bool_]:
        """Whether each of the view's keys low..high-1 lies in a block of the query tile."""
        held = np.zeros(high - low, bool)
        for number in self.numbers[tile]:
            first = self.origin + number * self.size - low
            held[max(first, 0) : max(first + self.size, 0)] = True
        return held


def key_blocks(view: HeadView, structure: BlockSparse, seed: int) -> KeyBlocks:
    """Blocks that the plan gives (counted from the sequence's first key), or chosen ones."""
    if structure.blocks is not None:
        return KeyBlocks(structure.blocks, structure.tile_kv, -view.first_key)
    return KeyBlocks(choose_blocks(view, structure, seed), structure.tile_kv)


def choose_blocks(
    view: HeadView, structure: BlockSparse, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Key blocks of every query tile: the near band, and the fewest that leave mass tau."""
    size = structure.tile_kv
    total = -(-view.len_kv // size)
    chosen: list[tuple[int, ...]] = []
    for first in range(0, view.len_q, structure.group):
        group = slice(first, min(first + structure.group, view.len_q))
        rows = sample_rows(group, structure.samples, seed)
        weights, _ = softmax_in_place(exact_scores(view, rows, view.len_kv))
        mass = np.add.reduceat(weights.mean(axis=0), np.arange(0, view.len_kv, size))
        order = np.argsort(-mass)
        rest = mass.sum() - np.cumsum(mass[order])
        common = np.zeros(total, bool)
        common[order[: int((rest > structure.tau).sum()) + 1]] = True
        for start in range(group.start, group.stop, structure.tile_q):
            tile = slice(start, min(start + structure.tile_q, group.stop))
            low, high = int(view.start[tile].min()), int(view.stop[tile].max())
            diagonal = min(int(view.stop[tile].min()), start + structure.tile_q)
            near = np.zeros(total, bool)
            near[max(diagonal - structure.band, 0) // size : -(-high // size)] = (
                high <= diagonal + structure.tile_q
            )
            if high > diagonal + structure.tile_q:  # no causal edge: a band on both sides
                stop = min(start + structure.tile_q + structure.band, high)
                near[max(start - structure.band, 0) // size : -(-stop // size)] = True
            keep = np.flatnonzero(common | near)
            chosen.append(
                tuple(int(j) for j in keep if low < (j + 1) * size and j * size < high)
            )
    return tuple(chosen)
