"""Number formats as data, and rounding to them.

A format is a row in a table; everything else is derived from that row. The names here are the
only spellings used anywhere in the project (Python, CUDA, file names, documentation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adaattn_core.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """A number format.

    Attributes
    ----------
    name : str
        The project-wide name.
    bits : int
        Storage bits of one operand.
    significand_bits : int
        Significand bits, hidden bit included; for ``i8`` the bits of the integer.
    max_finite : float
        Largest finite magnitude.
    smallest_normal : float
        Smallest positive normal number (0 for integers).
    dtype : numpy.dtype or None
        NumPy (or ml_dtypes) storage type; None where no storage type exists (tf32).
    is_float : bool
        False for uniformly spaced integer formats.
    accumulator_bits : int
        Fraction bits that Hopper's tensor cores keep while adding products of this format
        (numerics: FP8 keeps 13, everything wider is treated as f32).
    """

    name: str
    bits: int
    significand_bits: int
    max_finite: float
    smallest_normal: float
    dtype: np.dtype[Any] | None
    is_float: bool = True
    accumulator_bits: int = 24

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding normal numbers to nearest (step/2 of 1 for i8)."""
        return 0.5 if not self.is_float else 2.0**-self.significand_bits

    @property
    def is_quantised(self) -> bool:
        """Whether operands need a scale to be representable (8-bit formats)."""
        return self.bits == 8


def _table() -> dict[str, FormatInfo]:
    rows = (
        FormatInfo(
            "f64", 64, 53, float(np.finfo(np.float64).max), 2.0**-1022, np.dtype("f8"), True, 53
        ),
        FormatInfo("f32", 32, 24, float(np.finfo(np.float32).max), 2.0**-126, np.dtype("f4")),
        FormatInfo("tf32", 32, 11, (2 - 2.0**-10) * 2.0**127, 2.0**-126, None),
        FormatInfo("f16", 16, 11, 65504.0, 2.0**-14, np.dtype("f2")),
        FormatInfo(
            "bf16",
            16,
            8,
            (2 - 2.0**-7) * 2.0**127,
            2.0**-126,
            np.dtype(ml_dtypes.bfloat16),
        ),
        FormatInfo("i8", 8, 8, 127.0, 0.0, np.dtype("i1"), False),
        FormatInfo("e4m3", 8, 4, 448.0, 2.0**-6, np.dtype(ml_dtypes.float8_e4m3fn), True, 13),
        FormatInfo("e5m2", 8, 3, 57344.0, 2.0**-14, np.dtype(ml_dtypes.float8_e5m2), True, 13),
    )
    return {row.name: row for row in rows}


FORMATS: dict[str, FormatInfo] = _table()
"""Every format by name, widest first."""


def get_format(name: str) -> FormatInfo:
    """Return the format called `name`.

    Raises
    ------
    ArgumentError
        If there is no such format.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise ArgumentError(
            got=f"format {name!r}",
            needed=f"one of {', '.join(FORMATS)}",
            do="use the project's spelling: e4m3 (not fp8), i8 (not int8), f16 (not half)",
            name=name,
        ) from None


def format_of_dtype(dtype: np.dtype[Any]) -> FormatInfo | None:
    """Return the format stored by `dtype`, or None."""
    for row in FORMATS.values():
        if row.dtype is not None and row.dtype == dtype:
            return row
    return None


@dataclass(frozen=True, slots=True)
class ScaleBlocks:
    """Which rows of 8-bit operands share a scale, counted from a sequence's first.

    Attributes
    ----------
    query_rows : int
        Consecutive queries with one scale.
    key_rows : int
        Consecutive keys with ``key_lanes`` scales between them.
    key_lanes : int
        1, or 4: of every eight keys the first two, the second two, and so on. A lane of a
        quad of threads then has one scale for all keys that it holds of a score tile.
    value_rows : int
        Consecutive keys whose values share one scale, all channels; 0: every channel has one
        of its own, for all keys.
    """

    query_rows: int
    key_rows: int
    key_lanes: int = 1
    value_rows: int = 0

    def query_groups(self, length: int) -> NDArray[np.int64]:
        """Return the number of each query's scale, (length,)."""
        return np.arange(length, dtype=np.int64) // self.query_rows

    def key_groups(self, length: int) -> NDArray[np.int64]:
        """Return the number of each key's scale, (length,)."""
        key = np.arange(length, dtype=np.int64)
        lane = key % 8 // 2 if self.key_lanes == 4 else 0
        return key // self.key_rows * self.key_lanes + lane

    def value_groups(self, length: int) -> NDArray[np.int64]:
        """Return the number of each value's scale, (length,), where channels share one."""
        return np.arange(length, dtype=np.int64) // self.value_rows


SCALE_BLOCKS: dict[str, ScaleBlocks] = {
    "tile": ScaleBlocks(1, 64, 4, 256),
    "token": ScaleBlocks(1, 1),
    "block": ScaleBlocks(64, 128),
}
"""Granularities of scales by the names that plans use; kernels have the first."""


def round_to_format(x: NDArray[np.floating[Any]], name: str) -> NDArray[np.float32]:
    """Round `x` to the nearest numbers of a format, ties to even, saturating at its maximum.

    Parameters
    ----------
    x : ndarray of float
        Any shape. NaN and Inf pass unchanged: a format never hides them. For ``i8`` the values
        are rounded to integers in [-127, 127]; scaling is the caller's (see the backend's
        quantiser). ``f32`` is a plain cast: what overflows there becomes Inf.
    name : str
        A name in `FORMATS`.

    Returns
    -------
    ndarray of float32
        The rounded values; for ``f64`` no cast is made and float64 is returned.
    """
    info = get_format(name)
    if name == "f64":
        return x.astype(np.float64)
    if name == "f32":
        return x.astype(np.float32, copy=False)
    if name == "tf32":
        return _round_tf32(_to_float32(x))
    rounded: NDArray[np.float32]
    if name == "i8":
        rounded = np.clip(np.rint(x), -127.0, 127.0).astype(np.float32)
    else:
        assert info.dtype is not None
        finite = _to_float32(np.clip(x, -info.max_finite, info.max_finite))
        rounded = np.asarray(finite.astype(info.dtype), np.float32)
    infinite = np.isinf(x)
    if infinite.any():
        rounded[infinite] = x[infinite]
    return rounded


def _to_float32(x: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Cast on the way to a narrower format, so that rounding twice equals rounding once.

    A float64 that float32 cannot hold becomes its neighbour with an odd last bit, which is no
    tie and lies on the same side of every tie of the narrower format (rounding to odd).
    """
    if x.dtype != np.float64:
        return x.astype(np.float32, copy=False)
    largest = FORMATS["f32"].max_finite
    finite = np.isfinite(x)
    near = np.where(finite, np.clip(x, -largest, largest), x).astype(np.float32)
    bits = near.view(np.uint32)
    inexact = finite & (near != x)
    towards_zero = bits - (inexact & (np.abs(near) > np.abs(x)))
    return (
        np.where(inexact, towards_zero | np.uint32(1), bits).astype(np.uint32).view(np.float32)
    )


def _round_tf32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keep 10 fraction bits of float32, to nearest, ties to even; NaN and Inf pass."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    lowest = np.uint32(1 << 13)
    half = np.uint32((1 << 12) - 1)
    rounded = bits + half + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded &= ~(lowest - np.uint32(1))
    limit = np.float32(FORMATS["tf32"].max_finite)
    return np.where(np.isfinite(x), np.clip(rounded.view(np.float32), -limit, limit), x)


def stochastic_round(
    x: NDArray[np.floating[Any]], name: str, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Round `x` up or down to a neighbour in the format, at random and without bias.

    Each rounding error is independent of the others, has mean zero and lies in an interval
    whose length is the local spacing: the hypothesis of the probabilistic bounds (docs/math,
    theorem 9) is then true by construction, not assumed.

    Parameters
    ----------
    x : ndarray of float
        Values within the format's range; larger ones saturate, NaN and Inf pass unchanged.
    name : str
        ``i8``, ``e4m3``, ``e5m2``, ``bf16`` or ``f16``.
    rng : numpy.random.Generator
        Source of the random bits.
    """
    spacing = format_spacing(x, name)
    low = np.floor(x / spacing) * spacing
    # 53 random bits: the chance to go up is met to 2**-53, whatever the value.
    up = rng.random(x.shape) < (x - low) / spacing
    limit = get_format(name).max_finite
    rounded = np.clip(low + up * spacing, -limit, limit)
    return np.where(np.isfinite(x), rounded, x).astype(np.float32)


def format_spacing(x: NDArray[np.floating[Any]], name: str) -> NDArray[np.float64]:
    """Distance between neighbouring numbers of the format around each `x` (float64)."""
    info = get_format(name)
    if not info.is_float:
        return np.ones(x.shape)
    magnitude = np.maximum(np.abs(x.astype(np.float64)), info.smallest_normal)
    _, exponent = np.frexp(magnitude)
    return np.asarray(np.ldexp(1.0, exponent - info.significand_bits), np.float64)
