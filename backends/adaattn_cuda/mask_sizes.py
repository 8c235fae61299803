"""Magnitudes of an additive mask on a device: what its sums with the scores may round away.

Masks filled with the lowest finite number mean to hide keys. A key whose entry lies so far
below its row's largest that its weight is 0 in every format is hidden for the bounds too, and a
row whose largest entry swallows every score is the mask alone, without rounding. Which of the
two holds depends on norms that the device measures: both figures are enqueued, and one is
chosen when the norms are known.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat

from adaattn_core.mask import Mask

__all__ = ["MaskSizes"]

_DEEP = 1e4
"""Entries this far below their row's largest are left out of the nearer figure."""
_UNDERFLOW = 750.0
"""exp of less than minus this is 0 in float64, subnormal numbers included."""
_SWALLOWING = 1e30
"""Largest entries of a row from here on are no part of the nearer figure either."""
_ABSORBING = 2.0**70
"""A score this many times smaller than an entry leaves no trace in their sum."""


class MaskSizes:
    """Largest magnitudes of an additive mask's entries; reading them waits for the device.

    Parameters
    ----------
    mask : Mask
    scale : float
        Factor on the scores.
    """

    def __init__(self, mask: Mask, scale: float) -> None:
        self._scale = scale
        self._all: Any = 0.0
        self._near: Any = math.inf
        if mask.bias is None or 0 in mask.bias.shape:
            return
        xp = array_api_compat.array_namespace(mask.bias)
        wide = xp.astype(mask.bias, xp.float32)
        finite = xp.isfinite(wide)
        zero = xp.zeros_like(wide)
        size = xp.abs(xp.where(finite, wide, zero))
        self._all = xp.max(size)
        # Another mask might hide the entry that the row is compared with.
        alone = (mask.allowed, mask.left, mask.right, mask.lengths, mask.cu_seqlens_kv)
        if all(x is None for x in alone):
            top = xp.max(xp.where(finite, wide, zero - math.inf), axis=-1, keepdims=True)
            near = (wide >= top - _DEEP) & (xp.abs(top) < _SWALLOWING)
            self._near = xp.max(xp.where(near, size, zero))

    def largest(self, query_norm: float, key_norm: float, value_norm: float) -> float:
        """Largest magnitude that counts, given upper bounds of the norms of a head."""
        reach = self._scale * query_norm * key_norm
        weightless = 2 * reach + _UNDERFLOW + math.log(max(value_norm, 1.0))
        if weightless < _DEEP and reach * _ABSORBING < _SWALLOWING:
            return min(float(self._near), float(self._all))
        return float(self._all)
