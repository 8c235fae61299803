"""What certificates must know of 8-bit operands: bounds from the scales that the device chose.

Every bound follows from the largest step of a head's operands. With n numbers in a vector, i8
codes are off by half a step and what is lost on the way to them: 0.501 step sqrt(n). A centred
key is no longer than 127.01 step sqrt(n), 127 steps being the largest number of its group. e4m3
values are off by 2^-4 of themselves, or, below the normal numbers, by 2^-10 of a step; never by
more than themselves, since 0 is a number of the format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import SequenceSpan
from adaattn_cuda.device import driver
from adaattn_cuda.kernels.smxx_quantize import Codes
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import TILE_KEYS, TILE_SCALES

__all__ = [
    "VALUE_STEP",
    "HeadSteps",
    "QuantisedRun",
    "i8_norm",
    "i8_residual",
    "value_residual",
]

VALUE_STEP = 16
"""Place of the values' step in a tile's record; kValueScale in quant/scale_tile.cuh."""


@dataclass(frozen=True, slots=True)
class HeadSteps:
    """Largest finite steps, shape (sequences, heads); zeros where an operand is not quantised.

    Attributes
    ----------
    query, key, value : ndarray of float64
        `key` and `value` by key head.
    """

    query: NDArray[np.float64]
    key: NDArray[np.float64]
    value: NDArray[np.float64]


class QuantisedRun:
    """Scales of one run, on the device until somebody asks.

    Parameters
    ----------
    layout : Codes
    sequences : sequence of SequenceSpan
    places : sequence of int
        Row of each sequence's first key among the codes.
    memory : object
        Keeps the scales alive.
    address, size_bytes, device : int
    """

    def __init__(
        self,
        layout: Codes,
        sequences: Sequence[SequenceSpan],
        places: Sequence[int],
        memory: Any,
        address: int,
        size_bytes: int,
        device: int,
    ) -> None:
        self._layout, self._sequences, self._places = layout, sequences, places
        self._memory = memory
        self._where = address, size_bytes, device
        self.size_bytes = size_bytes
        self._steps: HeadSteps | None = None

    def steps(self) -> HeadSteps:
        """Return the steps; waits for the device.

        Raises
        ------
        AdaAttnError
            If a stream is recording a CUDA graph: read after its replay instead.
        """
        if self._steps is None:
            self._steps = self._read(driver.read(*self._where))
            self._memory = None
        return self._steps

    def _read(self, raw: bytes) -> HeadSteps:
        layout = self._layout
        offsets, _ = layout.scales()
        count = len(self._sequences)
        tiles = layout.rows_kv // TILE_KEYS
        records = _floats(raw, offsets["tile_scales"], layout.batch, layout.heads_kv, tiles,
                          TILE_SCALES)  # fmt: skip
        queries = _floats(raw, offsets["query_scales"], layout.batch, layout.heads_q,
                          layout.len_q if layout.qk else 0)  # fmt: skip
        found = HeadSteps(
            np.zeros((count, layout.heads_q)),
            np.zeros((count, layout.heads_kv)),
            np.zeros((count, layout.heads_kv)),
        )
        for number, (span, place) in enumerate(zip(self._sequences, self._places, strict=True)):
            first, stop = place // TILE_KEYS, (place + span.len_kv + TILE_KEYS - 1) // TILE_KEYS
            own = records[span.batch, :, first:stop]
            if layout.qk:
                rows = queries[span.batch, :, span.q_start : span.q_stop]
                found.query[number] = _largest(rows, 1)
                found.key[number] = _largest(own[..., :VALUE_STEP], (1, 2))
            if layout.pv:
                found.value[number] = _largest(own[..., VALUE_STEP], 1)
        return found


def _floats(raw: bytes, offset: int, *shape: int) -> NDArray[np.float32]:
    return np.frombuffer(raw, np.float32, math.prod(shape), offset).reshape(shape)


def _largest(x: NDArray[np.float32], axes: int | tuple[int, ...]) -> NDArray[np.float64]:
    """Return the largest finite numbers: others are of rows that were repaired."""
    finite = np.where(np.isfinite(x), x, 0.0).astype(np.float64)
    return np.asarray(finite.max(axis=axes, initial=0.0))


def i8_residual(step: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """Bound what rounding to i8 takes from a vector of `dim` numbers."""
    return np.asarray(0.501 * math.sqrt(dim) * step)


def i8_norm(step: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """Bound the norm of a vector whose largest number is 127 steps."""
    return np.asarray(127.01 * math.sqrt(dim) * step)


def value_residual(
    step: NDArray[np.float64], norm: NDArray[np.float64], dim: int
) -> NDArray[np.float64]:
    """Bound what rounding to e4m3 takes from a vector of this norm."""
    rounded = (2.0**-4 * norm + 2.0**-10 * math.sqrt(dim) * step) * (1 + 2.0**-16)
    return np.asarray(np.minimum(rounded, norm))
