"""Choosing key blocks from sampled rows, for the block-sparse structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.choosing import block_groups, choose_blocks
from adaattn_core.structure import BlockSparse
from adaattn_reference.quantise import TINY
from adaattn_reference.score_rule import cap
from adaattn_reference.scratch import scratch
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]


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
    return KeyBlocks(chosen_blocks(view, structure, seed), structure.tile_kv)


def chosen_blocks(
    view: HeadView, structure: BlockSparse, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Key blocks of every query tile, from the masses of sampled rows."""
    groups = block_groups(structure, view.len_q, seed)
    masses = []
    for _, rows in groups:
        weights, _ = softmax_in_place(exact_scores(view, rows, view.len_kv))
        masses.append(weights.mean(axis=0))
    parts = [group for group, _ in groups]
    return choose_blocks(structure, parts, masses, view.start, view.stop, view.len_kv)
