"""Clusters of like queries: rows that look for the same far keys share landmarks and pools.

Neighbouring rows of a text often want different far keys, and rows further apart the same ones.
So the rows of a group are halved again and again, each time along the direction in which their
scores differ most, into equal parts: with coordinates in which the distance of two queries is
the root-mean-square difference of their scores,

    |L^T (q - q')|^2 = (q - q')^T L L^T (q - q'),      L L^T = covariance of the keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_reference.linalg import eigh, gram
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

DIRECTIONS = 8
"""Principal directions of the scores that rows are compared along."""
LEAST_ROWS = 32
"""Rows below which a cluster is not worth landmarks of its own."""
COVARIANCE_ROWS = 1024
"""Rows, evenly spaced, from which covariances are computed."""
SQUARINGS = 4
"""Squarings of a covariance matrix that isolate its first direction well enough."""


def query_clusters(
    view: HeadView, groups: list[slice], count: int
) -> list[list[NDArray[np.int64]]]:
    """Split the rows of every group into `count` (a power of 2) clusters of equal size.

    Fewer where a group is short. A function of queries and keys alone: a replayed plan finds
    the same clusters.
    """
    if count == 1:
        return [[np.arange(g.start, g.stop)] for g in groups]
    points = _coordinates(view)
    sizes = [g.stop - g.start for g in groups]
    whole = sum(size == sizes[0] for size in sizes)  # all but perhaps the last
    out: list[list[NDArray[np.int64]]] = []
    for part in (groups[:whole], groups[whole:]):
        if part:
            out += _split(points, part, count)
    return out


def _split(points: Float, groups: list[slice], count: int) -> list[list[NDArray[np.int64]]]:
    """Split groups of one size; rows that are left over join the last cluster."""
    size = groups[0].stop - groups[0].start
    while count > 1 and size < count * LEAST_ROWS:
        count //= 2
    even = size - size % count
    first = np.array([g.start for g in groups])
    rows = first[:, None] + np.arange(even)
    for _ in range(count.bit_length() - 1):
        half = rows.shape[1] // 2
        order = np.argpartition(_first_coordinate(points[rows]), half, axis=1)
        rows = np.take_along_axis(rows, order, axis=1).reshape(2 * len(rows), -1)
    clusters = [list(part) for part in rows.reshape(len(groups), count, -1)]
    for group, part in zip(groups, clusters, strict=True):
        part[-1] = np.concatenate([part[-1], np.arange(group.start + even, group.stop)])
    return clusters


def _first_coordinate(points: Float) -> Float:
    """Coordinate of every point along its batch's first principal direction (batch, rows)."""
    centred = points - points.mean(axis=1, keepdims=True)
    power = np.matmul(centred.transpose(0, 2, 1), centred)
    for _ in range(SQUARINGS):
        trace = np.trace(power, axis1=1, axis2=2)
        power /= np.maximum(trace, np.finfo(power.dtype).tiny)[:, None, None]
        power = np.matmul(power, power)
    longest = np.argmax((power**2).sum(axis=1), axis=1)
    direction = power[np.arange(len(power)), :, longest]
    return np.asarray(np.matmul(centred, direction[:, :, None])[:, :, 0])


def _coordinates(view: HeadView) -> Float:
    """Coordinates of all query rows along the first directions of their scores."""
    key, query = view.seen(view.kv.key), view.query
    factor = _root(gram(_some(key)))
    spread = factor.T @ gram(_some(query)) @ factor
    found = eigh(spread)
    if found is None or not spread.any():
        return np.zeros((view.len_q, 1), np.float32)
    directions = factor @ found[1][:, : -DIRECTIONS - 1 : -1]
    directions /= max(float(np.abs(directions).max()), 1e-30)
    largest = query.dtype.type(np.abs(query).max())
    return np.asarray((query / largest) @ directions.astype(query.dtype))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """L with L Lᵀ equal to a covariance; NaN where it has none."""
    found = eigh(covariance)
    if found is None:
        return np.full_like(covariance, np.nan)
    values, vectors = found
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def _some(x: Float) -> Float:
    """Evenly spaced rows."""
    return x[:: max(len(x) // COVARIANCE_ROWS, 1)]
