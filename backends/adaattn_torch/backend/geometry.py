"""Where near and far fields begin, for one sequence and one landmark structure."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.choosing import Fields
from adaattn_core.structure import Landmark
from adaattn_torch.backend.masking import SequenceMask

Rows = NDArray[np.int64]


class Geometry(Fields):
    """Near and far fields of every row, as the structure cuts them."""

    @classmethod
    def of(cls, mask: SequenceMask, structure: Landmark) -> Geometry | None:
        """Return the geometry, or None where the mask is not causal or full."""
        if not mask.structural:
            return None
        return cls.of_intervals(structure, mask.start, mask.stop, mask.len_kv)

    @cached_property
    def step(self) -> int:
        """Near fields begin at multiples of this."""
        return max(self.structure.pool, 1)

    @cached_property
    def near_edges(self) -> tuple[Rows, Rows]:
        """First and one-past-last near key of every row, that of its tile."""
        return self.near_of_rows(np.arange(self.len_q))

    def far_keys(self, group: slice) -> int:
        """Keys up to the last one that is far for a row of the group."""
        if not self.causal:
            return self.len_kv
        return int(self.near_edges[0][group].max(initial=0))

    def same_fields(self, other: Any) -> bool:
        """Whether a structure splits the fields and draws the rows that this one does."""
        if not isinstance(other, Landmark):
            return False
        names = ("group", "clusters", "samples", "band", "tile", "pool", "fitted", "tail")
        return all(getattr(self.structure, n) == getattr(other, n) for n in names)
