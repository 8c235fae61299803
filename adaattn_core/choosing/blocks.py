"""Key blocks of query tiles, chosen from the masses of sampled rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import BlockSparse

__all__ = ["block_groups", "choose_blocks"]

Ints = NDArray[np.int64]


def block_groups(structure: BlockSparse, len_q: int, seed: int) -> list[tuple[slice, Ints]]:
    """Return the query groups of a head, and the rows of each that vote for its blocks.

    Rows are distinct, rise, and follow from the plan's seed and the group alone.
    """
    groups = []
    for first in range(0, len_q, structure.group):
        group = slice(first, min(first + structure.group, len_q))
        size = group.stop - group.start
        rng = np.random.default_rng((seed, 1, group.start))
        drawn = rng.choice(size, min(structure.samples, size), replace=False)
        groups.append((group, np.asarray(np.sort(drawn) + group.start, np.int64)))
    return groups


def choose_blocks(
    structure: BlockSparse,
    groups: Sequence[slice],
    masses: Sequence[NDArray[np.floating[Any]]],
    start: Ints,
    stop: Ints,
    len_kv: int,
) -> tuple[tuple[int, ...], ...]:
    """Key blocks of every query tile: the near band, and the fewest that leave mass tau.

    Parameters
    ----------
    structure : BlockSparse
    groups : sequence of slice
        Query rows that share their choice.
    masses : sequence of ndarray, shape (len_kv,)
        Mean softmax mass of every key over the sampled rows of each group.
    start, stop : ndarray of int64, shape (len_q,)
        First and one-past-last key that each row may see.
    len_kv : int

    Returns
    -------
    tuple of tuple of int
        Numbers of the blocks of ``structure.tile_kv`` keys, rising, of every query tile.
    """
    size, total = structure.tile_kv, -(-len_kv // structure.tile_kv)
    chosen: list[tuple[int, ...]] = []
    for group, of_keys in zip(groups, masses, strict=True):
        common = np.zeros(total, bool)
        if len_kv:
            mass = np.add.reduceat(of_keys[:len_kv], np.arange(0, len_kv, size))
            order = np.argsort(-mass)
            rest = mass.sum() - np.cumsum(mass[order])
            common[order[: int((rest > structure.tau).sum()) + 1]] = True
        for first in range(group.start, group.stop, structure.tile_q):
            tile = slice(first, min(first + structure.tile_q, group.stop))
            low, high = int(start[tile].min()), int(stop[tile].max())
            diagonal = min(int(stop[tile].min()), first + structure.tile_q)
            near = np.zeros(total, bool)
            near[max(diagonal - structure.band, 0) // size : -(-high // size)] = (
                high <= diagonal + structure.tile_q
            )
            if high > diagonal + structure.tile_q:  # no causal edge: a band on both sides
                last = min(first + structure.tile_q + structure.band, high)
                near[max(first - structure.band, 0) // size : -(-last // size)] = True
            kept = np.flatnonzero(common | near)
            chosen.append(
                tuple(int(j) for j in kept if low < (j + 1) * size and j * size < high)
            )
    return tuple(chosen)
