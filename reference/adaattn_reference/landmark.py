"""Near field + landmarks + pooled remainder: the token-dimension low-rank executor.

The near field goes tile by tile, in order of position; the far field cluster by cluster
(`adaattn_reference.farfield`). All columns of a row meet in one softmax.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.choosing import BIAS_RANGE
from adaattn_core.structure import Landmark
from adaattn_reference.dense import HeadOutput, dense_tile
from adaattn_reference.farfield import (
    FarField,
    GroupProbe,
    far_field,
    probe_head,
)
from adaattn_reference.geometry import Geometry
from adaattn_reference.operands import Operands
from adaattn_reference.scratch import scratch
from adaattn_reference.sketch import ScoreSketch
from adaattn_reference.softmax import RowAccumulator
from adaattn_reference.view import HeadView, hide

Float = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]

EXPONENT_MAX = 87.0
"""Largest exponent that float32 can represent the exponential of."""
NEAR_ROWS = 1024
"""Rows whose near fields are computed at once: their scores stay in a core's cache."""


def landmark(
    view: HeadView,
    operands: Operands,
    structure: Landmark,
    seed: int,
    probes: list[GroupProbe] | None = None,
) -> HeadOutput | None:
    """Run the structure on one head; None where the mask does not allow it.

    Parameters
    ----------
    probes : list of GroupProbe, optional
        What `measure` found with the same seed; probed again if left out.
    """
    geometry = Geometry.of(view, structure)
    if geometry is None:
        return None
    result = HeadOutput.empty(view, operands)
    result.dropped_mass_upper = np.inf
    probes = probe_head(view, geometry, seed) if probes is None else probes
    sketch = (
        ScoreSketch(operands, structure) if structure.screen_rank and structure.pool else None
    )
    columns = []
    for group, probe in zip(geometry.groups(), probes, strict=True):
        far = far_field(operands, geometry, probe, structure.tau)
        columns.append(far.columns())
        run = _GroupRun(view, operands, geometry, group)
        batches = _of_one_size(probe.clusters)
        if sketch is None:
            for numbers, members in batches:
                run.begin_far(far, numbers, members)
        for rows in _even_runs(geometry, group):
            run.add_near(rows)
        if sketch is not None:  # it must know what the near field holds
            for numbers, members in batches:
                run.add_far(far, numbers, members, sketch)
        result.computed += run.computed
        result.out[group], result.lse[group] = run.accumulator.finish()
    tail = geometry.tail
    if tail.start < tail.stop:
        result.out[tail], result.lse[tail] = dense_tile(view, operands, tail)
        result.computed += int((view.stop[tail] - view.start[tail]).sum())
    result.rank = round(sum(columns) / max(len(columns), 1))
    if geometry.near_holds_all(view.stop):
        result.dropped_mass_upper = 0.0
    return result


def _is_bounded(view: HeadView, operands: Operands, structure: Landmark) -> bool:
    """Whether weights may do without a maximum: small scores, and P not rounded below 1."""
    if not {operands.plan.qk, operands.plan.pv} <= {"f32", "f64"}:
        return False
    pool_bias_max = math.log(max(structure.pool, 1)) + BIAS_RANGE[1]
    return view.bounded_by(EXPONENT_MAX - pool_bias_max)


def _of_one_size(clusters: list[Rows]) -> list[tuple[list[int], Rows]]:
    """Numbers and rows (clusters, rows) of the clusters with as many rows: one batch each."""
    batches: dict[int, list[int]] = {}
    for number, members in enumerate(clusters):
        batches.setdefault(len(members), []).append(number)
    return [(n, np.stack([clusters[c] for c in n])) for n in batches.values()]


def _even_runs(geometry: Geometry, group: slice) -> list[slice]:
    """Cut rows into runs of equal tiles whose near fields are evenly (or not at all) spaced."""
    tile, band = geometry.structure.tile, geometry.structure.band
    clipped = (
        -(-(band + tile - geometry.offset) // tile) * tile
    )  # near fields that start at key 0
    whole = group.stop - (group.stop - group.start) % tile
    steps = range(group.start, group.stop, max(NEAR_ROWS // tile, 1) * tile)
    edges = {e for e in (clipped, whole, *steps) if group.start < e < group.stop}
    return [slice(a, b) for a, b in pairwise(sorted({group.start, *edges, group.stop}))]


class _GroupRun:
    """The rows of one group on their way through near and far field."""

    def __init__(
        self, view: HeadView, operands: Operands, geometry: Geometry, rows: slice
    ) -> None:
        self.view, self.operands, self.geometry, self.rows = view, operands, geometry, rows
        bounded = _is_bounded(view, operands, geometry.structure)
        self.accumulator = RowAccumulator(rows.stop - rows.start, operands, bounded=bounded)
        self.computed = 0

    def add_near(self, rows: slice) -> None:
        """Add the near fields of consecutive tiles of one size, all at once."""
        operands, view = self.operands, self.view
        size = min(self.geometry.structure.tile, rows.stop - rows.start)
        tiles = (rows.stop - rows.start) // size
        query = operands.query[rows]
        start, stop = self.geometry.near(rows.start + size * np.arange(tiles))
        width = int((stop - start).max())
        if not width:
            return  # rows before the first key: they see nothing
        # Every tile reads a window of one width; the columns it has no use for are masked.
        window = np.minimum(start, max(view.len_kv - width, 0))
        scores = scratch("scores", (len(query), width), query.dtype)
        by_tile = scores.reshape(tiles, size, width)
        key_t = _windows(operands.key_t, window, width, axis=1)
        np.matmul(query.reshape(tiles, size, -1), key_t, out=by_tile)
        self.computed += _mask_near(view, rows, by_tile, window, start, stop)
        mine = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
        weights = self.accumulator.weights(scores, mine).reshape(by_tile.shape)
        value = _windows(operands.value, window, width, axis=0)
        product = operands.weighted_sum(weights, value)
        self.accumulator.sums[mine] += product.reshape(len(query), -1)

    def begin_far(self, far: FarField, numbers: list[int], members: Rows) -> None:
        """Begin with landmarks and pools of clusters of one size.

        Parameters
        ----------
        numbers : list of int
            Of the clusters.
        members : ndarray of int64, shape (clusters, rows)
            Their rows.
        """
        scores, value, _ = self._far_scores(far, numbers, members)
        if scores.size:
            self.accumulator.begin(scores, value, members.ravel() - self.rows.start)

    def add_far(
        self, far: FarField, numbers: list[int], members: Rows, sketch: ScoreSketch
    ) -> None:
        """Add them to what the rows have seen, and open heavy pools; see `begin_far`."""
        scores, value, landmarks = self._far_scores(far, numbers, members)
        if not scores.size:
            return
        for n in range(len(numbers)):
            self._open_heavy_pools(members[n], scores[n], landmarks[n], sketch)
        mine = members.ravel() - self.rows.start
        weights = self.accumulator.weights(scores.reshape(len(mine), -1), mine)
        product = self.operands.weighted_sum(weights.reshape(scores.shape), value)
        self.accumulator.sums[mine] += product.reshape(len(mine), -1)

    def _far_scores(
        self, far: FarField, numbers: list[int], members: Rows
    ) -> tuple[Float, Float, Rows]:
        """Masked scores (clusters, rows, columns), columns' values, and landmarks in front."""
        operands, geometry, view = self.operands, self.geometry, self.view
        landmarks = far.landmarks[numbers]
        count = landmarks.shape[1]
        key = np.concatenate([operands.key[landmarks], far.pool_key[numbers]], axis=1)
        value = np.concatenate([operands.value[landmarks], far.pool_value[numbers]], axis=1)
        scores = scratch("far", (*members.shape, key.shape[1]), key.dtype)
        np.matmul(operands.query[members], key.transpose(0, 2, 1), out=scores)
        self.computed += _mask_landmarks(
            scores[..., :count], landmarks, members, geometry, view
        )
        bias = far.pool_bias[numbers]
        self.computed += _bias_pools(scores[..., count:], bias, members, geometry, view)
        return scores, value, landmarks

    def _open_heavy_pools(
        self,
        members: Rows,
        scores: Float,
        landmarks: Rows,
        sketch: ScoreSketch,
    ) -> None:
        """Replace pools in which a row may have a heavy key by their keys, tile by tile."""
        operands, size = self.operands, self.geometry.structure.pool
        of_pools = scores[:, len(landmarks) :]
        mine = members - self.rows.start
        known = _log_sum_exp(scores)
        known = np.logaddexp(known, self.accumulator.lse(mine))
        tile = self.geometry.structure.tile
        for first in range(0, len(members), tile):
            part = slice(first, min(first + tile, len(members)))
            heavy = sketch.heavy(
                operands.query[members[part]], known[part], landmarks, of_pools.shape[1]
            )
            pools = np.flatnonzero(heavy & (of_pools[part] != -np.inf).all(axis=0))
            if not len(pools):
                continue
            of_pools[part][:, pools] = -np.inf
            keys = (pools[:, None] * size + np.arange(size)).ravel()
            keys = keys[keys < self.geometry.len_kv]
            keys = keys[~np.isin(keys, landmarks)]
            opened = operands.query[members[part]] @ operands.key[keys].T
            self.accumulator.add(opened, operands.value[keys], rows=mine[part])
            self.computed += (part.stop - part.start) * (len(keys) - len(pools))


def _log_sum_exp(scores: Float) -> Float:
    """Log-sum-exp of rows; -inf for rows of which every score is."""
    top = scores.max(axis=1, keepdims=True)
    top[top == -np.inf] = 0
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0])


def _mask_landmarks(
    scores: Float,
    landmarks: NDArray[np.int64],
    members: NDArray[np.int64],
    geometry: Geometry,
    view: HeadView,
) -> int:
    """Hide landmarks (clusters, columns) that are not far for a row; count the others."""
    start, stop = (x[..., None] for x in geometry.near_of_rows(members))
    if geometry.causal:  # only the last landmarks can lie in a near field, or right of it
        first = int((landmarks < start.min()).sum(axis=1).min())
        hidden = landmarks[:, None, first:] >= start
    else:
        first = 0
        hidden = (landmarks[:, None] >= start) & (landmarks[:, None] < stop)
    if hidden.size:
        hide(scores[..., first:], hidden, view.finite_scores)
    return int(scores.size - hidden.sum())


def _bias_pools(
    scores: Float,
    bias: Float,
    members: NDArray[np.int64],
    geometry: Geometry,
    view: HeadView,
) -> int:
    """Add the pools' bias and hide pools that are not far for a row; count the others."""
    scores += bias[:, None]
    pools = scores.shape[2]
    empty = bias == -np.inf
    if not pools:
        return 0
    if not geometry.causal:
        far = geometry.far_pools(members, pools)
        hide(scores, ~far, view.finite_scores)
        return int(far.sum() - (far & empty[:, None]).sum())
    stop = np.minimum(geometry.near_of_rows(members)[0] // geometry.structure.pool, pools)
    first = int(stop.min())
    if first < pools:
        hide(
            scores[..., first:], np.arange(first, pools) >= stop[..., None], view.finite_scores
        )
    filled = np.concatenate([np.zeros((len(bias), 1), np.int64), np.cumsum(~empty, axis=1)], 1)
    return int(np.take_along_axis(filled, stop, axis=1).sum())


def _windows(x: Float, first: NDArray[np.int64], width: int, axis: int) -> Float:
    """Entries first[t] .. first[t] + width - 1 along an axis of x (2-D), stacked over tiles t.

    A view where the tiles are evenly spaced, else a copy.
    """
    steps = np.diff(first)
    if len(first) > 1 and (steps != steps[0]).any():
        return np.stack([x.take(np.arange(f, f + width), axis=axis) for f in first])
    step = int(steps[0]) if len(steps) else 0
    base = x[int(first[0]) :] if axis == 0 else x[:, int(first[0]) :]
    shape = (width, x.shape[1]) if axis == 0 else (x.shape[0], width)
    return np.lib.stride_tricks.as_strided(
        base, (len(first), *shape), (step * x.strides[axis], *x.strides), writeable=False
    )


def _mask_near(
    view: HeadView,
    rows: slice,
    scores: Float,
    window: NDArray[np.int64],
    near_start: NDArray[np.int64],
    near_stop: NDArray[np.int64],
) -> int:
    """Mask the near columns (tiles, size, width) that a row may not see; count the others."""
    tiles, size, width = scores.shape
    low = near_start - window
    # Keys right of a tile's near field are another column's, or hidden by the causal mask.
    high = np.minimum(view.stop[rows].reshape(tiles, size), near_stop[:, None])
    high = high - window[:, None]
    alike = not low.any() and bool((high == high[0]).all())
    first = 0 if low.any() else int(high.min())
    columns = np.arange(first, width)
    hidden = columns >= (high[:1] if alike else high)[:, :, None]
    if low.any():
        hidden |= columns < low[:, None, None]
    hide(scores[:, :, first:], hidden, finite=view.finite_scores)
    return int(np.clip(high, 0, width).sum() - low.sum() * size)
