"""Euclidean norms that neither overflow nor underflow, and on which side of the truth they lie.

A square below 1e-308 is lost and one above 1e308 is infinite, long before the number itself is.
So a row is divided by a power of two near its largest entry before it is squared, unless its
sum of squares shows that this was not needed. A norm is 0 for rows of exact zeros alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds.rounding import down, up

Float64 = NDArray[np.float64]

_SQUARES = {np.dtype(np.float32): (1e-20, 1e30), np.dtype(np.float64): (1e-240, 1e300)}
"""Sums of squares in this range have lost nothing: no square of weight was out of range."""
_SPARE = 8
"""Roundings besides those of the sum: of a measured difference, the root, the factor."""


def row_norms_upper(x: NDArray[Any]) -> Float64:
    """Upper bounds of the Euclidean norms of rows.

    Parameters
    ----------
    x : ndarray, shape (..., dim)
        Of any real format; entries may be the rounded result of one operation.

    Returns
    -------
    ndarray of float64, shape (...)
        Exactly 0 for rows of zeros; inf for rows that hold NaN or Inf.
    """
    x = _wide_enough(x)
    unit, norms = _scaled_norms(x)
    slack = (x.shape[-1] + _SPARE) * float(np.finfo(x.dtype).epsneg)
    raised = norms * (1 + slack + 2.0**-51)
    if unit is None:
        return np.asarray(raised)
    with np.errstate(over="ignore", invalid="ignore"):
        upper = np.where(unit == 1, raised, up(raised * unit))
    return np.where(np.isnan(norms), np.inf, np.where(norms == 0, 0.0, upper))


def largest_norm_upper(x: NDArray[Any]) -> float:
    """Upper bound of the largest Euclidean norm of a row; 0 without rows."""
    return float(row_norms_upper(x).max(initial=0.0))


def row_norms_estimate(x: NDArray[Any]) -> Float64:
    """Euclidean norms of rows in float64, to nearest; NaN stays NaN, Inf stays Inf."""
    wide = _wide_enough(x).astype(np.float64, copy=False)
    unit, norms = _scaled_norms(wide)
    with np.errstate(over="ignore"):
        return norms if unit is None else norms * unit


def rms_estimate(values: NDArray[Any]) -> float:
    """Root-mean-square of numbers, to nearest; 0 without numbers."""
    flat = np.abs(np.asarray(values, np.float64).ravel())
    peak = float(flat.max(initial=0.0))
    if not 0 < peak < math.inf:
        return peak
    return max(peak * math.sqrt(float(np.mean(np.square(flat / peak)))), math.ulp(0.0))


def rms_norm_estimate(x: NDArray[Any]) -> float:
    """Root-mean-square Euclidean norm of rows, to nearest; 0 without rows."""
    return rms_estimate(row_norms_estimate(x))


def rms_norm_lower(x: NDArray[Any]) -> float:
    """Lower bound of the root-mean-square Euclidean norm of the rows; 0 without rows.

    Parameters
    ----------
    x : ndarray, shape (rows, dim)

    Returns
    -------
    float
        NaN or inf where an entry is.
    """
    x = _wide_enough(x)
    unit, norms = _scaled_norms(x)
    if not norms.size:
        return 0.0
    size = 1.0
    if unit is not None:
        size = float(unit.max())
        norms = norms * (unit / size)
    peak = float(norms.max())
    if not 0 < peak < math.inf:
        return peak
    mean = float(np.mean(np.square(norms / peak)))
    roundings = (x.shape[-1] + _SPARE) * float(np.finfo(x.dtype).epsneg)
    slack = roundings + (norms.size + _SPARE) * 2.0**-53
    return max(float(down(float(down(peak * math.sqrt(mean) * (1 - slack))) * size)), 0.0)


def _wide_enough(x: NDArray[Any]) -> NDArray[Any]:
    """Return the array in float32 or float64, without a loss."""
    x = np.asarray(x)
    if x.dtype in _SQUARES:
        return x
    narrow = x.dtype.itemsize <= 2 and x.dtype.kind not in "iu"
    return x.astype(np.float32 if narrow else np.float64)


def _scaled_norms(x: NDArray[Any]) -> tuple[Float64 | None, Float64]:
    """Norms in units that are powers of two (None: all 1), each row's its own."""
    with np.errstate(all="ignore"):
        squares = np.einsum("...i,...i->...", x, x)
        low, high = _SQUARES[x.dtype]
        norms = np.array(np.sqrt(squares, dtype=np.float64))
        if low <= squares.min(initial=low) and squares.max(initial=high) <= high:
            return None, norms  # NaN is in no range
        odd = ~((squares >= low) & (squares <= high))
        wide = np.abs(x[odd].astype(np.float64))
        peak = wide.max(axis=-1, initial=0.0)
        exponent = np.frexp(np.where(np.isfinite(peak), peak, 1.0))[1]
        some = np.ldexp(1.0, np.where(peak > 0, np.maximum(exponent - 1, -1074), 0))
        scaled = wide / some[..., None]
        unit = np.ones(norms.shape)
        unit[odd] = some
        norms[odd] = np.sqrt(np.einsum("...i,...i->...", scaled, scaled))
        return unit, norms
