"""The quantiser: centres, scales and codes, equal bit by bit to what the GPU's kernel writes.

``smxx_quantize.cuh`` is the twin for `adaattn_core.formats.SCALE_BLOCKS` ``["tile"]``: the same
float32 operations in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.formats import get_format, round_to_format

Float = NDArray[np.floating[Any]]

__all__ = ["CENTRE_SAMPLES", "centre", "codes", "dequantised", "steps"]

TINY = 1e-30
"""Smallest amax that a scale is built from: an all-zero vector must not give 0/0."""
CENTRE_SAMPLES, CENTRE_GROUPS = 64, 4
"""Keys that a centre is made from, and the groups whose means are compared."""


def centre(key: Float, seen: NDArray[np.bool_]) -> Float:
    """Return about the mean key, (dim,): any will do, since softmax does not see it.

    Up to 64 evenly spaced visible keys in four groups; of the groups' means the middle two are
    averaged in each channel, so that one outlying key does not move it far. What is not finite
    counts as 0, and a centre that is not finite is 0.
    """
    rows = np.flatnonzero(seen)
    count, samples = len(rows), min(len(rows), CENTRE_SAMPLES)
    if not samples:
        return np.zeros(key.shape[1], key.dtype)
    picked = key[rows[(2 * np.arange(samples) + 1) * count // (2 * samples)]]
    picked = np.where(np.isfinite(picked), picked, key.dtype.type(0))
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.zeros((CENTRE_GROUPS, key.shape[1]), key.dtype)
        for number, row in enumerate(picked):
            sums[number % CENTRE_GROUPS] += row
        if samples < CENTRE_GROUPS:
            found = (sums[0] + sums[1] + sums[2]) / key.dtype.type(samples)
        else:
            sizes = [-(-(samples - group) // CENTRE_GROUPS) for group in range(CENTRE_GROUPS)]
            a, b, c, d = sums / np.array(sizes, key.dtype)[:, None]
            half = key.dtype.type(0.5)
            low = np.maximum(np.minimum(a, b), np.minimum(c, d))
            high = np.minimum(np.maximum(a, b), np.maximum(c, d))
            found = half * low + half * high
    return np.where(np.isfinite(found), found, key.dtype.type(0))


def steps(x: Float, groups: NDArray[np.int64], name: str) -> tuple[Float, Float]:
    """Return each group's step and the factor that takes its numbers to codes, (groups,).

    Parameters
    ----------
    x : ndarray, shape (rows, dim)
        What is not finite sets no scale.
    groups : ndarray of int64, shape (rows,)
        Number of each row's group, from 0.
    name : str
        ``i8`` or ``e4m3``.
    """
    size = np.abs(np.where(np.isfinite(x), x, 0)).max(axis=1, initial=0)
    amax = np.zeros(int(groups.max(initial=-1)) + 1, x.dtype)
    np.maximum.at(amax, groups, size)
    kind = x.dtype.type
    amax = np.maximum(amax, kind(TINY))
    limit = kind(get_format(name).max_finite)
    return amax * (kind(1) / limit), limit / amax


def codes(x: Float, groups: NDArray[np.int64], name: str) -> tuple[Float, Float]:
    """Return the codes of rows, as floats, and the groups' steps."""
    size, inverse = steps(x, groups, name)
    with np.errstate(invalid="ignore", over="ignore"):
        return round_to_format(x * inverse[groups][:, None], name), size


def dequantised(x: Float, groups: NDArray[np.int64], name: str) -> tuple[Float, Float]:
    """Return what codes stand for, in units of x, and the groups' steps."""
    found, size = codes(x, groups, name)
    return np.asarray(found.astype(x.dtype) * size[groups][:, None]), size
