"""Where near and far fields of a head with landmarks begin, and how many landmarks it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import Landmark

__all__ = [
    "BASE_WEIGHT",
    "BIAS_RANGE",
    "LANDMARK_STEP",
    "Fields",
    "heaviest",
    "landmark_count",
    "probe_draws",
]

Ints = NDArray[np.int64]
Masses = NDArray[np.floating[Any]]
Own = TypeVar("Own", bound="Fields")
LANDMARK_STEP = 64
"""Landmarks come in multiples of this: the width of a key tile."""
BASE_WEIGHT = 0.1
"""Share of the mean mass that every pooled key gets, so that unsampled keys still count."""
BIAS_RANGE = (-3.0, 6.0)
"""Fitted pool biases are clipped: a few sampled rows must not move a pool by more."""


def landmark_count(needed: int, keys: int) -> int:
    """Landmarks of a group that needs so many of its `keys`: in steps, as far as there are."""
    return min(-(-needed // LANDMARK_STEP) * LANDMARK_STEP, keys)


def heaviest(mass: Masses, rising: Masses, count: int) -> Ints:
    """Return the `count` heaviest keys in order of position; of equals, the first.

    Parameters
    ----------
    mass, rising : ndarray, shape (keys,)
        Masses, and the same ones sorted.
    count : int
        0 .. keys.
    """
    keys = len(mass)
    if count in (0, keys):
        return np.arange(count)
    chosen = np.flatnonzero(mass >= rising[keys - count])
    if len(chosen) != count:  # some are equally heavy
        chosen = np.sort(np.argsort(-mass, kind="stable")[:count])
    return chosen


def probe_draws(structure: Landmark, group: slice, clusters: int, size: int, seed: int) -> Ints:
    """Which members of each cluster of a group are computed exactly, shape (clusters, draws).

    Distinct numbers below `size`, in the order of their draw; they follow from the plan's seed
    and the group alone.
    """
    rng = np.random.default_rng((seed, 1, group.start))
    drawn = np.argsort(rng.random((clusters, size)), axis=1)
    return np.asarray(drawn[:, : max(structure.samples // clusters, 1)], np.int64)


@dataclass(frozen=True)
class Fields:
    """Near and far fields of one head and one structure.

    Attributes
    ----------
    structure : Landmark
    offset : int
        Row r sees keys up to r + offset where the mask is causal.
    causal : bool
        Otherwise every row sees every key.
    len_q, len_kv : int
    """

    structure: Landmark
    offset: int
    causal: bool
    len_q: int
    len_kv: int

    @classmethod
    def of_intervals(
        cls: type[Own], structure: Landmark, start: Ints, stop: Ints, len_kv: int
    ) -> Own | None:
        """Return the fields, or None where rows' intervals are neither causal nor full.

        Parameters
        ----------
        structure : Landmark
        start, stop : ndarray of int64, shape (len_q,)
            First and one-past-last key that each row may see.
        len_kv : int
        """
        len_q = len(start)
        if not len_q or (start != 0).any():
            return None
        if (stop == len_kv).all():
            return cls(structure, 0, False, len_q, len_kv)
        first = int(np.argmax(stop > 0))
        offset = int(stop[first]) - 1 - first
        if not np.array_equal(stop, np.clip(np.arange(len_q) + 1 + offset, 0, len_kv)):
            return None
        return cls(structure, offset, True, len_q, len_kv)

    @property
    def tail(self) -> slice:
        """Rows at the end that are computed densely: from the start of a tile."""
        tile = self.structure.tile
        start = max(self.len_q - self.structure.tail, 0) // tile * tile
        return slice(start if self.structure.tail else self.len_q, self.len_q)

    def groups(self) -> list[slice]:
        """Row ranges that are probed together: everything before the tail."""
        size, stop = self.structure.group, self.tail.start
        return [slice(g, min(g + size, stop)) for g in range(0, stop, size)]

    def near(self, first_row: Ints | int) -> tuple[Any, Any]:
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

    def near_holds_all(self, row_stop: Ints) -> bool:
        """Whether every row before the tail finds the keys it may see in its near field.

        Parameters
        ----------
        row_stop : ndarray of int64, shape (len_q,)
            One past the last key that each row may see.
        """
        start, stop = self.near_of_rows(np.arange(self.tail.start))
        seen = row_stop[: self.tail.start]
        return bool(((seen == 0) | ((start == 0) & (stop >= seen))).all())

    def keys_of(self, group: slice) -> int:
        """Keys that the group's rows can reach."""
        if not self.causal:
            return self.len_kv
        return int(max(min(group.stop + self.offset, self.len_kv), 0))
