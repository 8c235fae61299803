"""Near and far fields of a call's heads, and what sampled masses make of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaattn_core.choosing import BASE_WEIGHT, Fields, heaviest, landmark_count
from adaattn_core.problem import SequenceSpan
from adaattn_core.structure import Landmark
from adaattn_cuda.work.geometry import Geometry

__all__ = ["Far", "choose_far", "fields_of", "row_intervals"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def row_intervals(geometry: Geometry, span: SequenceSpan) -> tuple[Ints, Ints]:
    """First and one-past-last key that each row may see."""
    first, last = geometry.offsets(span)
    row = np.arange(span.len_q, dtype=np.int64)
    start = np.clip(first + row, 0, span.len_kv)
    return start, np.maximum(np.clip(last + row, 0, span.len_kv), start)


def fields_of(structure: Landmark, geometry: Geometry, span: SequenceSpan) -> Fields | None:
    """Return a sequence's fields, of no row too; None where the mask is a window."""
    start, stop = row_intervals(geometry, span)
    if (start != 0).any():
        return None
    causal = bool((stop != span.len_kv).any())
    offset = geometry.offsets(span)[1] - 1 if causal else 0
    return Fields(structure, offset, causal, span.len_q, span.len_kv)


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
    landmarks = heaviest(mass, rising, landmark_count(needed, keys))
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
