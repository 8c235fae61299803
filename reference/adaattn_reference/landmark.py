"""Near field + landmarks + pooled remainder: the token-dimension low-rank executor.

A group of query rows shares its far field (`adaattn_reference.farfield`); its tiles are
computed together, each with its own near field. All columns of a row meet in one softmax.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import Landmark
from adaattn_reference.dense import HeadOutput, dense_tile
from adaattn_reference.farfield import (
    FarField,
    Geometry,
    GroupProbe,
    build_far_field,
    probe_head,
)
from adaattn_reference.operands import Operands
from adaattn_reference.scratch import scratch
from adaattn_reference.sketch import ScoreSketch
from adaattn_reference.softmax import RowAccumulator
from adaattn_reference.view import HeadView, hide

Float = NDArray[np.floating[Any]]


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
    probes = probes or probe_head(view, geometry, seed)
    sketch = (
        ScoreSketch(operands, structure) if structure.screen_rank and structure.pool else None
    )
    columns = []
    for number, group in enumerate(geometry.groups()):
        probe = probes[number]
        (count,) = probe.landmark_counts((structure.tau,))
        far = build_far_field(view, operands, geometry, probe, count)
        columns.append(len(far.landmarks) + len(far.pool_bias))
        last = group.stop
        if structure.tail and last == view.len_q:
            last = max(_tail_start(geometry), group.start)
            tail = slice(last, view.len_q)
            result.out[tail], result.lse[tail] = dense_tile(view, operands, tail)
            result.computed += int((view.stop[tail] - view.start[tail]).sum())
        for rows in _even_runs(geometry, group.start, last):
            result.computed += _run_tiles(view, operands, geometry, far, sketch, rows, result)
    result.rank = round(sum(columns) / max(len(columns), 1))
    return result


def _tail_start(geometry: Geometry) -> int:
    """First row of the densely computed tail: a whole number of tiles from the start."""
    tile, len_q = geometry.structure.tile, geometry.len_q
    return max(len_q - geometry.structure.tail, 0) // tile * tile


def _even_runs(geometry: Geometry, first: int, last: int) -> list[slice]:
    """Cut rows into runs of equal tiles whose near fields are evenly (or not at all) spaced."""
    tile, band = geometry.structure.tile, geometry.structure.band
    clipped = (
        -(-(band + tile - geometry.offset) // tile) * tile
    )  # near fields that start at key 0
    whole = last - (last - first) % tile
    edges = [first, *sorted({e for e in (clipped, whole) if first < e < last}), last]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


def _run_tiles(
    view: HeadView,
    operands: Operands,
    geometry: Geometry,
    far: FarField,
    sketch: ScoreSketch | None,
    rows: slice,
    result: HeadOutput,
) -> int:
    """Compute consecutive query tiles of one size and group, all at once.

    Returns the number of visible scores and pooled columns that it took.
    """
    size = min(geometry.structure.tile, rows.stop - rows.start)
    tiles = (rows.stop - rows.start) // size
    query = operands.query[rows]
    near_start, near_stop = geometry.near(rows.start + size * np.arange(tiles))
    near_width = int((near_stop - near_start).max())
    # Every tile reads a window of one width; the columns it has no use for are masked.
    window = np.minimum(near_start, max(view.len_kv - near_width, 0))
    far_bias, biased = _far_bias(geometry, far, near_start, near_stop)
    far_width = far_bias.shape[1]
    if not far_width + near_width:
        return 0  # rows before the first key: they see nothing
    scores = scratch("scores", (len(query), far_width + near_width), query.dtype)
    landmarks = len(far.landmarks)
    np.matmul(query, far.key.T, out=scores[:, :landmarks])
    if far_width > landmarks:
        np.matmul(query, far.pool_key.T, out=scores[:, landmarks:far_width])
    by_tile = scores.reshape(tiles, size, -1)
    by_tile[:, :, biased:far_width] += far_bias[:, None, biased:]
    key_t = _windows(operands.key_t, window, near_width, axis=1)
    value = _windows(operands.value, window, near_width, axis=0)
    np.matmul(query.reshape(tiles, size, -1), key_t, out=by_tile[:, :, far_width:])
    taken = _mask_near(view, rows, by_tile[:, :, far_width:], window, near_start, near_stop)
    taken += size * int((far_bias != -np.inf).sum())
    accumulator = RowAccumulator(len(query), operands)
    if sketch is not None:
        taken += _open_heavy_pools(accumulator, operands, geometry, far, sketch, query, by_tile)
    weights = accumulator.weights(scores)
    accumulator.sums += operands.weighted_sum(weights[:, :landmarks], far.value)
    if far_width > landmarks:
        accumulator.sums += operands.weighted_sum(
            weights[:, landmarks:far_width], far.pool_value
        )
    near = operands.weighted_sum(weights.reshape(tiles, size, -1)[:, :, far_width:], value)
    accumulator.sums += near.reshape(len(query), -1)
    result.out[rows], result.lse[rows] = accumulator.finish()
    return int(taken)


def _far_bias(
    geometry: Geometry,
    far: FarField,
    near_start: NDArray[np.int64],
    near_stop: NDArray[np.int64],
) -> tuple[Float, int]:
    """Bias of every landmark and pool column for every tile; -inf where it is no far column.

    Also return the first column that any tile needs it for.
    """
    start, stop = near_start[:, None], near_stop[:, None]
    landmark_far = far.landmarks < start
    size = max(geometry.structure.pool, 1)
    first = np.arange(len(far.pool_bias)) * size
    pool_far = first + size <= start
    if not geometry.causal:
        landmark_far |= far.landmarks >= stop
        pool_far |= first >= stop
    none = far.pool_bias.dtype.type(-np.inf)
    zero = far.pool_bias.dtype.type(0)
    bias = np.hstack(
        [np.where(landmark_far, zero, none), np.where(pool_far, far.pool_bias, none)]
    )
    biased = np.flatnonzero(~landmark_far.all(axis=0))
    return bias, int(biased[0]) if len(biased) else len(far.landmarks)


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


def _open_heavy_pools(
    accumulator: RowAccumulator,
    operands: Operands,
    geometry: Geometry,
    far: FarField,
    sketch: ScoreSketch,
    query: Float,
    scores: Float,
) -> int:
    """Replace pools in which a row may have a heavy key by their keys, tile by tile."""
    size = scores.shape[1]
    landmarks = len(far.landmarks)
    pool_scores = scores[:, :, landmarks : landmarks + len(far.pool_bias)]
    heavy = sketch.heavy(query, scores, far.landmarks, len(far.pool_bias))
    heavy &= pool_scores[:, 0] != -np.inf
    taken = 0
    for tile in np.flatnonzero(heavy.any(axis=1)):
        pools = np.flatnonzero(heavy[tile])
        pool_scores[tile][:, pools] = -np.inf
        keys = (
            pools[:, None] * geometry.structure.pool + np.arange(geometry.structure.pool)
        ).ravel()
        keys = keys[keys < geometry.len_kv]
        keys = keys[~np.isin(keys, far.landmarks)]
        rows = slice(tile * size, (tile + 1) * size)
        accumulator.add(query[rows] @ operands.key[keys].T, operands.value[keys], rows=rows)
        taken += size * (len(keys) - len(pools))
    return taken
