"""What decides a work list: sequences, heads, dims and the interval mask of a problem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import HeadIndex, SequenceSpan

__all__ = ["UNLIMITED", "Geometry"]

UNLIMITED = 1 << 29
"""Most rows or keys of an array, and the window extent that stands for "no limit".

It reaches every key from every row, so wider windows saturate to it without changing what a
row sees, and sums of three stay within 32 bits. The twin is kUnlimited in work/work_item.cuh.
"""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Everything that decides the work list.

    Attributes
    ----------
    spans : tuple of SequenceSpan
    heads_q, heads_kv, dim_qk, dim_v : int
    bottom_right : bool
        Whether row i is aligned with key i + len_kv - len_q rather than key i.
    left, right : int or None
        A row aligned with key p sees keys p - left .. p + right; None: unlimited.
    heads : tuple of (sequence, head) or None
        Which to compute; None is all.
    """

    spans: tuple[SequenceSpan, ...]
    heads_q: int
    heads_kv: int
    dim_qk: int
    dim_v: int
    bottom_right: bool = False
    left: int | None = None
    right: int | None = None
    heads: tuple[HeadIndex, ...] | None = None

    def heads_of(self, span: SequenceSpan) -> NDArray[np.int64]:
        """Query heads of a sequence that are to be computed, rising."""
        if self.heads is None:
            return np.arange(self.heads_q, dtype=np.int64)
        return np.unique([head for index, head in self.heads if index == span.index]).astype(
            np.int64
        )

    def offsets(self, span: SequenceSpan) -> tuple[int, int]:
        """(start, stop) such that row r of the span sees keys start + r <= j < stop + r."""
        shift = span.len_kv - span.len_q if self.bottom_right else 0
        return shift - extent(self.left), shift + extent(self.right) + 1

    def key_ranges(
        self, span: SequenceSpan, tile_m: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return each query tile's first row, and the keys [first, stop) that it may see."""
        start, stop = self.offsets(span)
        first = np.arange(0, span.len_q, tile_m, dtype=np.int64)
        last = np.minimum(first + tile_m, span.len_q) - 1
        key_first = np.clip(start + first, 0, span.len_kv)
        return first, key_first, np.maximum(np.clip(stop + last, 0, span.len_kv), key_first)


def extent(window: int | None) -> int:
    """Return one side of a window as a kernel takes it: None and whatever is wider saturate."""
    return UNLIMITED if window is None else min(window, UNLIMITED)
