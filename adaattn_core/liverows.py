"""Rows that see a key: the rows that a certificate speaks about."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import array_device, to_numpy
from adaattn_core.problem import AttentionProblem, HeadIndex

_CHUNK_ENTRIES = 1 << 20
"""Mask entries that are looked at at once."""


class LiveRows:
    """Rows of each head that see a key; looked up once per mask, not per head.

    Parameters
    ----------
    problem : AttentionProblem
        Boolean and additive masks on a device are copied to the host when asked for.
    """

    def __init__(self, problem: AttentionProblem) -> None:
        self._problem = problem
        mask = problem.mask
        self._arrays = [x for x in (mask.allowed, mask.bias) if x is not None]
        self._by_head = any(len(x.shape) > 2 and x.shape[-3] > 1 for x in self._arrays)
        self._host: list[NDArray[Any]] | None = None
        self._known: dict[HeadIndex, NDArray[np.int64]] = {}

    def __getitem__(self, index: HeadIndex) -> NDArray[np.int64]:
        """Row numbers within the sequence, rising."""
        sequence, head = index
        kept = (sequence, head if self._by_head else 0)
        if kept not in self._known:
            self._known[kept] = self._find(*kept)
        return self._known[kept]

    def _find(self, sequence: int, head: int) -> NDArray[np.int64]:
        start, stop = self._problem.intervals(sequence)
        live = stop > start
        if self._arrays:
            masks = self._masks(sequence, head)
            span = self._problem.sequences[sequence]
            keys = np.arange(span.len_kv)
            step = max(_CHUNK_ENTRIES // max(span.len_kv, 1), 1)
            for first in range(0, span.len_q, step):
                rows = slice(first, first + step)
                seen = (keys >= start[rows, None]) & (keys < stop[rows, None])
                for x in masks:
                    seen &= x[rows] if x.dtype == bool else x[rows] != -np.inf
                live[rows] = seen.any(axis=1)
        return np.flatnonzero(live)

    def _masks(self, sequence: int, head: int) -> list[NDArray[Any]]:
        """Masks of one head on the host, broadcast views of shape (len_q, len_kv)."""
        if self._host is None:
            self._host = [_on_host(x) for x in self._arrays]
        p, span = self._problem, self._problem.sequences[sequence]
        full = (p.batch, p.heads_q, p.len_q, p.len_kv)
        rows, keys = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
        return [np.broadcast_to(x, full)[span.batch, head, rows, keys] for x in self._host]


def _on_host(x: Any) -> NDArray[Any]:
    if array_device(x).startswith("cpu"):
        return to_numpy(x)
    return to_numpy(array_api_compat.to_device(x, "cpu"))
