"""Where near and far fields begin, for one sequence and one landmark structure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import Landmark
from adaattn_torch.backend.masking import SequenceMask

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """Near and far fields of every row, as the structure cuts them."""

    structure: Landmark
    offset: int
    causal: bool
    len_q: int
    len_kv: int

    @classmethod
    def of(cls, mask: SequenceMask, structure: Landmark) -> Geometry | None:
        """Return the geometry, or None where the mask is not causal or full."""
        if not mask.structural or not mask.len_q or mask.start.any():
            return None
        rows = np.arange(mask.len_q)
        if (mask.stop == mask.len_kv).all():
            return cls(structure, 0, False, mask.len_q, mask.len_kv)
        first = int(np.argmax(mask.stop > 0))
        offset = int(mask.stop[first]) - 1 - first
        if not np.array_equal(mask.stop, np.clip(rows + 1 + offset, 0, mask.len_kv)):
            return None
        return cls(structure, offset, True, mask.len_q, mask.len_kv)

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

    @cached_property
    def step(self) -> int:
        """Near fields begin at multiples of this."""
        return max(self.structure.pool, 1)

    @cached_property
    def near(self) -> tuple[Rows, Rows]:
        """First and one-past-last near key of every row, that of its tile."""
        tile = self.structure.tile
        position = np.arange(self.len_q) // tile * tile + self.offset
        start = (position - self.structure.band) // self.step * self.step
        start = np.clip(start, 0, self.len_kv // self.step * self.step)
        stop = position + tile
        if not self.causal:
            stop = -(-(stop + self.structure.band) // self.step) * self.step
        return start, np.clip(stop, 0, self.len_kv)

    def far_keys(self, group: slice) -> int:
        """Keys up to the last one that is far for a row of the group."""
        if not self.causal:
            return self.len_kv
        return int(self.near[0][group].max(initial=0))

    def reached(self, group: slice) -> int:
        """Keys that the group's rows can reach."""
        if not self.causal:
            return self.len_kv
        return max(min(group.stop + self.offset, self.len_kv), 0)

    def near_holds_all(self, row_stop: Rows) -> bool:
        """Whether every row before the tail finds the keys it may see in its near field."""
        start, stop = (edge[: self.tail.start] for edge in self.near)
        seen = row_stop[: self.tail.start]
        return bool(((seen == 0) | ((start == 0) & (stop >= seen))).all())

    def same_fields(self, other: Any) -> bool:
        """Whether a structure splits the fields and draws the rows that this one does."""
        if not isinstance(other, Landmark):
            return False
        names = ("group", "clusters", "samples", "band", "tile", "pool", "fitted", "tail")
        return all(getattr(self.structure, n) == getattr(other, n) for n in names)
