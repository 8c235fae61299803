"""Where near and far fields begin, for one head and one landmark structure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import Landmark
from adaattn_reference.view import HeadView


@dataclass(frozen=True)
class Geometry:
    """Where near and far fields begin, for one head and one structure."""

    structure: Landmark
    offset: int
    causal: bool
    len_q: int
    len_kv: int

    @classmethod
    def of(cls, view: HeadView, structure: Landmark) -> Geometry | None:
        """Return the geometry, or None where the mask is not causal or full."""
        if not view.structural or not view.len_q or (view.start != 0).any():
            return None
        rows = np.arange(view.len_q)
        if (view.stop == view.len_kv).all():
            return cls(structure, 0, False, view.len_q, view.len_kv)
        first = int(np.argmax(view.stop > 0))
        offset = int(view.stop[first]) - 1 - first
        if not np.array_equal(view.stop, np.clip(rows + 1 + offset, 0, view.len_kv)):
            return None
        return cls(structure, offset, True, view.len_q, view.len_kv)

    def groups(self) -> list[slice]:
        """Row ranges that are probed together: everything before the tail."""
        size, stop = self.structure.group, self.tail.start
        return [slice(g, min(g + size, stop)) for g in range(0, stop, size)]

    @property
    def tail(self) -> slice:
        """Rows at the end that are computed densely: from the start of a tile."""
        tile = self.structure.tile
        start = max(self.len_q - self.structure.tail, 0) // tile * tile
        return slice(start if self.structure.tail else self.len_q, self.len_q)

    def near(self, first_row: NDArray[np.int64] | int) -> tuple[Any, Any]:
        """First and one-past-last near key of the tile that starts at `first_row`."""
        step = max(self.structure.pool, 1)
        position = np.asarray(first_row) + self.offset
        start = (position - self.structure.band) // step * step
        start = np.clip(start, 0, self.len_kv // step * step)
        stop = position + self.structure.tile
        if not self.causal:
            stop = -(-(stop + self.structure.band) // step) * step
        return start, np.clip(stop, 0, self.len_kv)

    @cached_property
    def _near(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Near range of every row."""
        rows = np.arange(self.len_q)
        start, stop = self.near(rows // self.structure.tile * self.structure.tile)
        return start, stop

    def near_holds_all(self, row_stop: NDArray[np.int64]) -> bool:
        """Whether every row before the tail finds the keys it may see in its near field.

        Parameters
        ----------
        row_stop : ndarray of int64, shape (len_q,)
            One past the last key that each row may see.
        """
        start, stop = (edge[: self.tail.start] for edge in self._near)
        seen = row_stop[: self.tail.start]
        return bool(((seen == 0) | ((start == 0) & (stop >= seen))).all())

    def near_of_rows(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Near range of the tile that each row belongs to."""
        start, stop = self._near
        return start[rows], stop[rows]

    def far_pools(self, rows: NDArray[np.int64], pools: int) -> NDArray[np.bool_]:
        """Whether each pool lies wholly in the far field of each row, shape (*rows, pools)."""
        start, stop = self.near_of_rows(rows)
        numbers = np.arange(pools)
        far = numbers < (start // self.structure.pool)[..., None]
        if not self.causal:
            far |= numbers >= -(-stop // self.structure.pool)[..., None]
        return np.asarray(far)

    def keys_of(self, group: slice) -> int:
        """Keys that the group's rows can reach."""
        return (
            self.len_kv
            if not self.causal
            else max(min(group.stop + self.offset, self.len_kv), 0)
        )
