"""The score sketch: which pools may hide a heavy key from some row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import Landmark
from adaattn_reference.linalg import principal_directions
from adaattn_reference.operands import Operands
from adaattn_reference.scratch import scratch

Float = NDArray[np.floating[Any]]

SCREEN_KEYS = 512
"""Keys whose sketch scores are held at once."""


class ScoreSketch:
    """Rank-r sketch of the scores: principal directions of the centred keys, exact mean."""

    def __init__(self, operands: Operands, structure: Landmark) -> None:
        key = operands.key
        mean = key.mean(axis=0, dtype=np.float64).astype(key.dtype)
        centred = key - mean
        rank = min(structure.screen_rank, key.shape[1])
        basis = principal_directions(key, rank).astype(key.dtype)
        ones = np.ones((len(key), 1), key.dtype)
        self.basis, self.mean, self.size = basis, mean, structure.pool
        self.key = np.ascontiguousarray(np.hstack([centred @ basis, ones]))
        self.log_theta = math.log(structure.screen_theta)

    def heavy(
        self, query: Float, lse: Float, landmarks: NDArray[np.int64], pools: int
    ) -> NDArray[np.bool_]:
        """Whether, by the sketch, one key of a pool may hold more than theta of a row's mass.

        Parameters
        ----------
        query : ndarray, shape (rows, dim_qk)
        lse : ndarray, shape (rows,)
            Log-sum-exp of the columns known so far.

        Returns
        -------
        ndarray of bool, shape (pools,)
        """
        constant = query @ self.mean - lse - self.log_theta
        sketch = np.hstack([query @ self.basis, constant[:, None]])
        best = np.full(pools * self.size, -np.inf, query.dtype)
        keys = min(pools * self.size, len(self.key))
        for first in range(0, keys, SCREEN_KEYS):
            last = min(first + SCREEN_KEYS, keys)
            values = scratch("screen", (len(query), last - first), query.dtype)
            np.matmul(sketch, self.key[first:last].T, out=values)
            best[first:last] = values.max(axis=0)
        best[landmarks] = -np.inf
        return np.asarray(best.reshape(pools, self.size).max(axis=1) > 0)
