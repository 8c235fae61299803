"""Near and far fields of one head's view, looked up by row."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.choosing import Fields
from adaattn_core.structure import Landmark
from adaattn_reference.view import HeadView


class Geometry(Fields):
    """Where near and far fields begin, for one head and one structure."""

    @classmethod
    def of(cls, view: HeadView, structure: Landmark) -> Geometry | None:
        """Return the geometry, or None where the mask is not causal or full."""
        if not view.structural:
            return None
        return cls.of_intervals(structure, view.start, view.stop, view.len_kv)

    @cached_property
    def _near(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Near range of every row."""
        return super().near_of_rows(np.arange(self.len_q))

    def near_of_rows(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Near range of the tile that each row belongs to."""
        start, stop = self._near
        return start[rows], stop[rows]

    def far_pools(self, rows: NDArray[np.int64], pools: int) -> NDArray[np.bool_]:
        """Whether each pool lies wholly in the far field of each row, shape (*rows, pools)."""
        start, stop = self.near_of_rows(rows)
        numbers: NDArray[Any] = np.arange(pools)
        far = numbers < (start // self.structure.pool)[..., None]
        if not self.causal:
            far |= numbers >= -(-stop // self.structure.pool)[..., None]
        return np.asarray(far)
