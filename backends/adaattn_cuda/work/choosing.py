"""What sampled masses decide: key blocks of query tiles; near fields, landmarks and pools.

The rules are those of the NumPy backend (``adaattn_reference.blocks``, ``.geometry`` and
``.farfield``), from the same seeds, so that both choose alike but for rounding; a test holds
them to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import SequenceSpan
from adaattn_core.structure import BlockSparse, Landmark
from adaattn_cuda.work.geometry import Geometry

__all__ = ["Far", "Fields", "block_groups", "choose_blocks", "choose_far"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
LANDMARK_STEP = 64
BASE_WEIGHT = 0.1


# --- key blocks ------------------------------------------------------------------------------
def block_groups(structure: BlockSparse, len_q: int, seed: int) -> list[tuple[slice, Ints]]:
    """Return the query groups of a head, and the rows of each that vote for its blocks."""
    groups = []
    for first in range(0, len_q, structure.group):
        group = slice(first, min(first + structure.group, len_q))
        size = group.stop - group.start
        rng = np.random.default_rng((seed, 1, group.start))
        drawn = rng.choice(size, min(structure.samples, size), replace=False)
        groups.append((group, np.sort(drawn) + group.start))
    return groups


def choose_blocks(
    structure: BlockSparse,
    groups: Sequence[tuple[slice, Ints]],
    masses: Sequence[Floats],
    geometry: Geometry,
    span: SequenceSpan,
) -> tuple[tuple[int, ...], ...]:
    """Keep the near band, and the fewest blocks that leave sampled mass tau to others.

    Parameters
    ----------
    masses : sequence of ndarray of float32, shape (len_kv,)
        Mean softmax mass of every key over the sampled rows of each group.
    """
    size, len_kv = structure.tile_kv, span.len_kv
    total = -(-len_kv // size)
    start, stop = row_intervals(geometry, span)
    chosen: list[tuple[int, ...]] = []
    for (group, _), of_keys in zip(groups, masses, strict=True):
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


def row_intervals(geometry: Geometry, span: SequenceSpan) -> tuple[Ints, Ints]:
    """First and one-past-last key that each row may see."""
    first, last = geometry.offsets(span)
    row = np.arange(span.len_q, dtype=np.int64)
    start = np.clip(first + row, 0, span.len_kv)
    return start, np.maximum(np.clip(last + row, 0, span.len_kv), start)


# --- near and far fields ---------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Fields:
    """Where near and far fields of a head begin; twin of ``adaattn_reference.geometry``.

    Attributes
    ----------
    structure : Landmark
    causal : bool
        Row r sees keys up to r + offset; else every key.
    offset, len_q, len_kv : int
    """

    structure: Landmark
    causal: bool
    offset: int
    len_q: int
    len_kv: int

    @classmethod
    def of(cls, structure: Landmark, geometry: Geometry, span: SequenceSpan) -> Fields | None:
        """Return the fields; None where the mask is neither causal nor full."""
        start, stop = row_intervals(geometry, span)
        if (start != 0).any():
            return None
        if (stop == span.len_kv).all():
            return cls(structure, False, 0, span.len_q, span.len_kv)
        _, last = geometry.offsets(span)
        return cls(structure, True, last - 1, span.len_q, span.len_kv)

    @property
    def tail(self) -> int:
        """First of the rows at the end that are computed densely: a tile's."""
        tile = self.structure.tile
        if not self.structure.tail:
            return self.len_q
        return int(max(self.len_q - self.structure.tail, 0) // tile * tile)

    def groups(self) -> list[slice]:
        """Row ranges that are probed together: everything before the tail."""
        size, stop = self.structure.group, self.tail
        return [slice(g, min(g + size, stop)) for g in range(0, stop, size)]

    def near(self, first_row: Ints) -> tuple[Ints, Ints]:
        """First and one-past-last near key of the tiles that start at these rows."""
        step = max(self.structure.pool, 1)
        position = np.asarray(first_row) + self.offset
        start = (position - self.structure.band) // step * step
        start = np.clip(start, 0, self.len_kv // step * step)
        stop = position + self.structure.tile
        if not self.causal:
            stop = -(-(stop + self.structure.band) // step) * step
        return start, np.clip(stop, 0, self.len_kv)

    def near_of_rows(self, rows: Ints) -> tuple[Ints, Ints]:
        """Near range of the tile that each row belongs to."""
        tile = self.structure.tile
        return self.near(rows // tile * tile)

    def keys_of(self, group: slice) -> int:
        """Keys that the group's rows can reach."""
        if not self.causal:
            return self.len_kv
        return int(max(min(group.stop + self.offset, self.len_kv), 0))

    def samples(self, group: slice, seed: int) -> Ints:
        """Rows of a group that are computed exactly to choose its far field."""
        size = group.stop - group.start
        rng = np.random.default_rng((seed, 1, group.start))
        drawn = np.argsort(rng.random((1, size)), axis=1)[0, : max(self.structure.samples, 1)]
        return np.asarray(group.start + drawn, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Far:
    """Far field of a group.

    Attributes
    ----------
    landmarks : ndarray of int64
        Keys, rising.
    base : float
        What every pooled key weighs besides its mass.
    filled : ndarray of bool, shape (pools,)
        Pools that stand for a key.
    """

    landmarks: Ints
    base: float
    filled: NDArray[np.bool_]


def choose_far(structure: Landmark, mass: Floats) -> Far:
    """Choose the fewest heaviest keys, in steps, that leave a mass of at most tau to others.

    Parameters
    ----------
    mass : ndarray of float32, shape (keys,)
        Mean softmax mass over the sampled rows; 0 for near keys.
    """
    keys = len(mass)
    rising = np.sort(mass)
    rest = np.cumsum(rising)
    needed = keys - int(np.searchsorted(rest, np.float32(structure.tau), "right"))
    count = min(-(-needed // LANDMARK_STEP) * LANDMARK_STEP, keys)
    landmarks = np.arange(count)
    if 0 < count < keys:
        landmarks = np.flatnonzero(mass >= rising[keys - count])
        if len(landmarks) != count:  # some are equally heavy
            landmarks = np.sort(np.argsort(-mass, kind="stable")[:count])
    size = structure.pool
    if not size or not keys:
        return Far(landmarks, 0.0, np.zeros(0, bool))
    pools = -(-keys // size)
    counts = np.full(pools, size)
    counts[-1] -= pools * size - keys
    counts -= np.bincount(landmarks // size, minlength=pools)
    left = float(mass.sum() - mass[landmarks].sum())
    base = BASE_WEIGHT * max(left, 0.0) / max(int(counts.sum()), 1) + 1e-12
    return Far(landmarks, base, counts > 0)
