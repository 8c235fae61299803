"""Float64 arithmetic for bounds: every result is rounded outward.

All operands are non-negative, so one outward step per operation keeps an upper bound an upper
bound; there is no cancellation to watch. An exact zero stays an exact zero, and zero times
infinity is zero: a residual that is exactly nought contributes nought, whatever multiplies it.

Scalars take a path without arrays: a certificate is a hundred scalar operations, and a policy
asks for many certificates.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Real = float | NDArray[np.float64]
"""What the bounds return: a float64 scalar, or an array of the inputs' broadcast shape."""

LIBRARY_ULPS = 4
"""Steps that cover the error of tanh, exp, log and log1p in NumPy and libm (at most 4 ulp)."""


def up(x: ArrayLike, ulps: int = 1) -> Real:
    """Return `x` moved `ulps` representable numbers towards plus infinity.

    Examples
    --------
    >>> float(up(1.0)) > 1.0
    True
    """
    return _moved(x, ulps, math.inf)


def down(x: ArrayLike, ulps: int = 1) -> Real:
    """Return `x` moved `ulps` representable numbers towards minus infinity."""
    return _moved(x, ulps, -math.inf)


def add_up(*terms: ArrayLike) -> Real:
    """Upper bound of a sum of non-negative terms; exact where at most one is not zero."""
    if _are_scalars(*terms):
        total = 0.0
        for value in map(_scalar, terms):
            exact = total == 0 or value == 0
            total = total + value if exact else math.nextafter(total + value, math.inf)
        return total
    sums = np.zeros((), dtype=np.float64)
    for term in terms:
        values = np.asarray(term, dtype=np.float64)
        inexact = (sums != 0) & (values != 0)
        with np.errstate(over="ignore"):
            sums = np.where(inexact, up(sums + values), sums + values)
    return sums[()]


def mul_up(*factors: ArrayLike) -> Real:
    """Upper bound of a product of non-negative factors; zero if one is zero, even times inf."""
    if _are_scalars(*factors):
        product = 1.0
        for value in map(_scalar, factors):
            if product == 0 or value == 0:
                return 0.0
            exact = product == 1 or value == 1
            product = product * value if exact else math.nextafter(product * value, math.inf)
        return product
    products = np.ones((), dtype=np.float64)
    for factor in factors:
        values = np.asarray(factor, dtype=np.float64)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            raised = up(products * values)
        exact_too = np.where(values == 1, products, np.where(products == 1, values, raised))
        products = np.where((products == 0) | (values == 0), 0.0, exact_too)
    return products[()]


def div_up(numerator: ArrayLike, denominator: ArrayLike) -> Real:
    """Upper bound of a quotient of non-negative numbers; 0/0 is 0 and x/0 is inf."""
    if _are_scalars(numerator, denominator):
        over, under = _scalar(numerator), _scalar(denominator)
        if over == 0:
            return 0.0
        return math.inf if under <= 0 else math.nextafter(over / under, math.inf)
    a = np.asarray(numerator, dtype=np.float64)
    b = np.asarray(denominator, dtype=np.float64)
    with np.errstate(all="ignore"):
        raised = up(a / b)
    return np.where(a == 0, 0.0, np.where(b <= 0, np.inf, raised))[()]


def sub_down(a: ArrayLike, b: ArrayLike) -> Real:
    """Lower bound of ``a - b``, at least 0; 0 for ``inf - inf``."""
    if _are_scalars(a, b):
        lowered = math.nextafter(_scalar(a) - _scalar(b), -math.inf)
        return lowered if lowered > 0 else 0.0
    with np.errstate(invalid="ignore"):
        all_lowered = down(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))
    return np.fmax(all_lowered, 0.0)[()]


def sqrt_up(x: ArrayLike) -> Real:
    """Upper bound of a square root; exact at zero."""
    value = np.asarray(x, dtype=np.float64)
    return np.where(value == 0, 0.0, up(np.sqrt(value)))[()]


def tanh_up(x: ArrayLike) -> Real:
    """Upper bound of the hyperbolic tangent of a non-negative number, at most 1."""
    if _are_scalars(x):
        value = _scalar(x)
        moved = _moved(math.tanh(value), LIBRARY_ULPS, math.inf)
        return 0.0 if value == 0 else moved if not moved > 1 else 1.0
    values = np.asarray(x, dtype=np.float64)
    raised = np.minimum(up(np.tanh(values), LIBRARY_ULPS), 1.0)
    return np.where(values == 0, 0.0, raised)[()]


def _moved(x: ArrayLike, ulps: int, towards: float) -> Real:
    if _are_scalars(x):
        value = _scalar(x)
        for _ in range(ulps):
            value = math.nextafter(value, towards)
        return value
    out = np.asarray(x, dtype=np.float64)
    with np.errstate(over="ignore"):
        for _ in range(ulps):
            out = np.nextafter(out, towards)
    return out[()]


def _are_scalars(*values: Any) -> bool:
    return all(isinstance(value, float | int) for value in values)


def _scalar(value: Any) -> float:
    """Return a Python float: NumPy's scalars would warn of overflow."""
    return float(value)
