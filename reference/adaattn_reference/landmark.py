"""Near field + landmarks + pooled remainder: the token-dimension low-rank executor.

For a query tile the keys split into the *near field* (computed exactly), the group's *landmarks*
(far keys with the largest sampled mass, computed exactly) and *pools* (every other far key, 64 to a
column). What is sampled, and what follows from it:

    mass_j  = mean over the sampled rows r of p_rj, far keys only
    landmarks = the fewest keys with   sum of the other masses <= tau   (whole multiples of 64)
    k_b, v_b  = averages of block b's non-landmark keys and values, weights mass_j + 0.1 mean mass
    bias_b    = ln n_b + beta_b,   beta_b fitted so that the sampled rows' pooled mass is right

See docs/explanation/structures for why the low rank lives in the token dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import Landmark
from adaattn_reference.blocks import exact_scores, sample_rows, softmax_in_place
from adaattn_reference.dense import HeadOutput, dense_tile
from adaattn_reference.operands import Operands
from adaattn_reference.scratch import scratch
from adaattn_reference.softmax import RowAccumulator
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

LANDMARK_STEP = 64
"""Landmarks come in multiples of this: the width of a key tile."""
BASE_WEIGHT = 0.1
"""Share of the mean mass that every pooled key gets, so that unsampled keys still count."""
BIAS_RANGE = (-3.0, 6.0)
"""Fitted pool biases are clipped: a few sampled rows must not move a pool by more."""
SCREEN_KEYS = 512
"""Keys whose sketch scores are held at once."""


@dataclass(frozen=True, eq=False)
class GroupProbe:
    """What the exactly computed rows of one query group saw of the far field.

    Attributes
    ----------
    rows : ndarray of int64, shape (samples,)
        Sampled rows of the head.
    lse : ndarray, shape (samples,)
        Their exact log-sum-exp.
    mass : ndarray, shape (keys before the group's end,)
        Mean softmax mass of every key that is far for the sampled row, 0 for near keys.
    """

    rows: NDArray[np.int64]
    lse: Float
    mass: Float


@dataclass(frozen=True)
class Geometry:
    """Where near and far fields begin, for one head and one structure."""

    structure: Landmark
    offset: int
    causal: bool
    len_q: int
    len_kv: int

    @classmethod
    def of(cls, view: HeadView, structure: Landmark) -> Geometry | None:
        """Return the geometry, or None where the mask is not causal or full."""
        if not view.structural or not view.len_q or (view.start != 0).any():
            return None
        rows = np.arange(view.len_q)
        if (view.stop == view.len_kv).all():
            return cls(structure, 0, False, view.len_q, view.len_kv)
        offset = int(view.stop[-1]) - view.len_q
        if not np.array_equal(view.stop, np.maximum(rows + 1 + offset, 0)):
            return None
        return cls(structure, offset, True, view.len_q, view.len_kv)

    def groups(self) -> list[slice]:
        """Row ranges that share landmarks and pools."""
        size = self.structure.group
        return [slice(g, min(g + size, self.len_q)) for g in range(0, self.len_q, size)]

    def tiles(self, group: slice) -> list[slice]:
        """Row ranges that share a near field."""
        size = self.structure.tile
        return [
            slice(t, min(t + size, group.stop)) for t in range(group.start, group.stop, size)
        ]

    def near(self, first_row: NDArray[np.int64] | int) -> tuple[Any, Any]:
        """First and one-past-last near key of the tile that starts at `first_row`."""
        step = max(self.structure.pool, 1)
        position = np.asarray(first_row) + self.offset
        start = np.maximum((position - self.structure.band) // step * step, 0)
        stop = position + self.structure.tile
        if not self.causal:
            stop = -(-(stop + self.structure.band) // step) * step
        return start, np.clip(stop, 0, self.len_kv)

    def near_of_rows(self, rows: NDArray[np.int64]) -> tuple[Any, Any]:
        """Near range of the tile that each row belongs to."""
        return self.near(rows // self.structure.tile * self.structure.tile)

    def far_pools(self, rows: NDArray[np.int64], pools: int) -> NDArray[np.bool_]:
        """Whether each pool lies wholly in the far field of each row, shape (rows, pools)."""
        start, stop = self.near_of_rows(rows)
        first = np.arange(pools) * self.structure.pool
        far = first + self.structure.pool <= start[:, None]
        return far if self.causal else far | (first >= stop[:, None])

    def keys_of(self, group: slice) -> int:
        """Keys that the group's rows can reach."""
        return (
            self.len_kv
            if not self.causal
            else max(min(group.stop + self.offset, self.len_kv), 0)
        )


@dataclass(frozen=True, eq=False)
class FarField:
    """Landmarks and pools of one query group, ready to be scored.

    Attributes
    ----------
    landmarks : ndarray of int64
        Key numbers, increasing.
    key, value : ndarray
        Landmark rows of the operands.
    pool_key, pool_value : ndarray, shape (blocks, dim)
    pool_bias : ndarray, shape (blocks,)
        ln n_b + beta_b; -inf for blocks without a pooled key.
    """

    landmarks: NDArray[np.int64]
    key: Float
    value: Float
    pool_key: Float
    pool_value: Float
    pool_bias: Float


def probe_group(
    view: HeadView, geometry: Geometry, group: slice, rows: NDArray[np.int64]
) -> GroupProbe:
    """Compute sampled rows of a group exactly and keep what they saw of the far field."""
    weights, lse = softmax_in_place(exact_scores(view, rows, geometry.keys_of(group)))
    return GroupProbe(rows, lse, far_mass(weights, rows, geometry))


def probe_head(view: HeadView, geometry: Geometry, seed: int) -> list[GroupProbe]:
    """Probe every group of a head with the rows that `seed` draws."""
    samples = geometry.structure.samples
    return [
        probe_group(view, geometry, group, sample_rows(group, samples, seed))
        for group in geometry.groups()
    ]


def far_mass(weights: Float, rows: NDArray[np.int64], geometry: Geometry) -> Float:
    """Mean mass of far keys over some rows with known weights, shape (keys,)."""
    keys = weights.shape[1]
    start, stop = geometry.near_of_rows(rows)
    mass = np.ones(len(rows), weights.dtype) @ weights
    low, high = int(start.min(initial=keys)), int(min(stop.max(initial=0), keys))
    columns = np.arange(low, high)
    near = (columns >= start[:, None]) & (columns < stop[:, None])
    mass[low:high] -= np.where(near, weights[:, low:high], 0).sum(axis=0)
    return np.maximum(mass, 0, out=mass) / max(len(rows), 1)


def landmark_counts(
    mass: Float, taus: tuple[float, ...]
) -> tuple[NDArray[np.int64], list[int]]:
    """Keys by falling mass, and how many of them leave at most each tau (multiples of 64)."""
    order = np.argsort(-mass)
    rest = mass.sum() - np.cumsum(mass[order])
    counts = []
    for tau in taus:
        needed = int((rest > tau).sum()) + 1 if mass.size and mass.sum() > tau else 0
        counts.append(min(-(-needed // LANDMARK_STEP) * LANDMARK_STEP, len(mass)))
    return order, counts


def build_far_field(
    view: HeadView,
    operands: Operands,
    geometry: Geometry,
    probe: GroupProbe,
    count: int,
    order: NDArray[np.int64] | None = None,
) -> FarField:
    """Gather the `count` heaviest keys as landmarks and pool the others, block by block."""
    structure = geometry.structure
    if order is None:
        order = np.argsort(-probe.mass)
    landmarks = np.sort(order[:count])
    landmarks = landmarks[probe.mass[landmarks] > 0]
    key, value = operands.key[landmarks], operands.value[landmarks]
    keys = len(probe.mass)
    if not structure.pool or not keys:
        empty = np.empty((0, 1), operands.key.dtype)
        return FarField(landmarks, key, value, empty, empty, np.empty(0, operands.key.dtype))
    size = structure.pool
    blocks = -(-keys // size)
    pooled = np.zeros(blocks * size, bool)
    pooled[:keys] = True
    pooled[landmarks] = False
    counts = pooled.reshape(blocks, size).sum(axis=1)
    weight = np.zeros(blocks * size, operands.key.dtype)
    free = probe.mass.sum() - probe.mass[landmarks].sum()
    weight[:keys] = probe.mass + np.float32(
        BASE_WEIGHT * free / max(keys - len(landmarks), 1) + 1e-12
    )
    weight[~pooled] = 0
    weight = weight.reshape(blocks, 1, size)
    weight /= np.maximum(weight.sum(axis=2, keepdims=True), np.float32(1e-30))
    pool_key = _block_average(operands.key[:keys], weight, size)
    pool_value = _block_average(operands.value[:keys], weight, size)
    with np.errstate(divide="ignore"):
        bias = np.log(counts.astype(operands.key.dtype))
    bias += _fitted_bias(view, operands, geometry, probe, pooled[:keys], pool_key, bias)
    return FarField(landmarks, key, value, pool_key, pool_value, bias)


def _block_average(x: Float, weight: Float, size: int) -> Float:
    """Weighted average of the rows of each block; `weight` has shape (blocks, 1, size)."""
    blocks, whole = len(weight), len(x) // size
    out = np.empty((blocks, x.shape[1]), x.dtype)
    out[:whole] = np.matmul(weight[:whole], x[: whole * size].reshape(whole, size, -1))[:, 0]
    if whole < blocks:
        tail = x[whole * size :]
        out[whole] = weight[whole, 0, : len(tail)] @ tail
    return out


def _fitted_bias(
    view: HeadView,
    operands: Operands,
    geometry: Geometry,
    probe: GroupProbe,
    pooled: NDArray[np.bool_],
    pool_key: Float,
    log_count: Float,
) -> Float:
    """beta_b = ln(mass the sampled rows gave the block / mass that its pool predicts for them)."""
    size = geometry.structure.pool
    blocks = len(pool_key)
    scores = operands.query[probe.rows] @ pool_key.T
    if operands.lse_shift is not None:
        scores += operands.lse_shift[probe.rows, None]
    scores += log_count
    scores -= probe.lse[:, None]
    first = np.arange(blocks) * size
    far = geometry.far_pools(probe.rows, blocks)
    with np.errstate(over="ignore"):
        predicted = np.where(far, np.exp(np.minimum(scores, 20.0)), 0).sum(axis=0)
    mass = np.where(pooled, probe.mass, 0)
    true = np.add.reduceat(mass, first) * len(probe.rows) if blocks else mass
    tiny = np.float32(1e-20)
    beta = np.log(np.maximum(true, tiny) / np.maximum(predicted, tiny))
    return np.where(far.any(axis=0), np.clip(beta, *BIAS_RANGE), 0).astype(pool_key.dtype)


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
    sketch = _Sketch(operands, structure) if structure.screen_rank and structure.pool else None
    columns = []
    for number, group in enumerate(geometry.groups()):
        probe = probes[number]
        order, (count,) = landmark_counts(probe.mass, (structure.tau,))
        far = build_far_field(view, operands, geometry, probe, count, order)
        columns.append(len(far.landmarks) + len(far.pool_bias))
        last = group.stop
        if structure.exact_tail and last == view.len_q:
            last -= (last - group.start - 1) % structure.tile + 1
            tail = slice(last, view.len_q)
            result.out[tail], result.lse[tail] = dense_tile(view, operands, tail)
            result.computed += int((view.stop[tail] - view.start[tail]).sum())
        whole = last - (last - group.start) % structure.tile
        for rows in (slice(group.start, whole), slice(whole, last)):
            if rows.start < rows.stop:
                result.computed += _run_tiles(
                    view, operands, geometry, far, sketch, rows, result
                )
    result.rank = round(sum(columns) / max(len(columns), 1))
    return result


def _run_tiles(
    view: HeadView,
    operands: Operands,
    geometry: Geometry,
    far: FarField,
    sketch: _Sketch | None,
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
    far_bias = _far_bias(geometry, far, near_start, near_stop)
    far_width = far_bias.shape[1]
    scores = scratch("scores", (len(query), far_width + near_width), query.dtype)
    landmarks = len(far.landmarks)
    np.matmul(query, far.key.T, out=scores[:, :landmarks])
    if far_width > landmarks:
        np.matmul(query, far.pool_key.T, out=scores[:, landmarks:far_width])
    by_tile = scores.reshape(tiles, size, -1)
    by_tile[:, :, :far_width] += far_bias[:, None]
    key, value = (_windows(x, window, near_width) for x in (operands.key, operands.value))
    np.matmul(
        query.reshape(tiles, size, -1), key.transpose(0, 2, 1), out=by_tile[:, :, far_width:]
    )
    taken = _mask_near(view, rows, by_tile[:, :, far_width:], window, near_start)
    taken += int((far_bias != -np.inf).sum()) * size
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
    return taken


def _far_bias(
    geometry: Geometry,
    far: FarField,
    near_start: NDArray[np.int64],
    near_stop: NDArray[np.int64],
) -> Float:
    """Bias of every landmark and pool column for every tile; -inf where it is no far column."""
    start, stop = near_start[:, None], near_stop[:, None]
    landmark_far = far.landmarks < start
    size = max(geometry.structure.pool, 1)
    first = np.arange(len(far.pool_bias)) * size
    pool_far = first + size <= start
    if not geometry.causal:
        landmark_far |= far.landmarks >= stop
        pool_far |= first >= stop
    none = far.pool_bias.dtype.type(-np.inf)
    return np.hstack(
        [
            np.where(landmark_far, far.pool_bias.dtype.type(0), none),
            np.where(pool_far, far.pool_bias, none),
        ]
    )


def _windows(x: Float, first: NDArray[np.int64], width: int) -> Float:
    """Rows first[t] .. first[t] + width - 1 of x for every tile t: a view where steps are even."""
    steps = np.diff(first)
    if len(first) > 1 and (steps != steps[0]).any():
        return x[first[:, None] + np.arange(width)]
    step = int(steps[0]) if len(steps) else 0
    return np.lib.stride_tricks.as_strided(
        x[first[0] :],
        (len(first), width, x.shape[1]),
        (step * x.strides[0], *x.strides),
        writeable=False,
    )


def _mask_near(
    view: HeadView,
    rows: slice,
    scores: Float,
    window: NDArray[np.int64],
    near_start: NDArray[np.int64],
) -> int:
    """Mask the near columns (tiles, size, width) that a row may not see; count the others."""
    tiles, size, width = scores.shape
    low = near_start - window
    high = view.stop[rows].reshape(tiles, size) - window[:, None]
    alike = not low.any() and bool((high == high[0]).all())
    first = 0 if low.any() else int(high.min())
    columns = np.arange(first, width)
    hidden = columns >= (high[:1] if alike else high)[:, :, None]
    if low.any():
        hidden |= columns < low[:, None, None]
    np.copyto(scores[:, :, first:], -np.inf, where=hidden)
    return int(np.clip(high, 0, width).sum() - low.sum() * size)


def _open_heavy_pools(
    accumulator: RowAccumulator,
    operands: Operands,
    geometry: Geometry,
    far: FarField,
    sketch: _Sketch,
    query: Float,
    scores: Float,
) -> int:
    """Replace pools in which a row may have a heavy key by their keys, tile by tile."""
    tiles, size, _ = scores.shape
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


class _Sketch:
    """Rank-r sketch of the scores: principal directions of the centred keys, the mean exactly."""

    def __init__(self, operands: Operands, structure: Landmark) -> None:
        key = operands.key
        mean = key.mean(axis=0, dtype=np.float64).astype(key.dtype)
        centred = key - mean
        rank = min(structure.screen_rank, key.shape[1])
        basis = np.linalg.eigh(centred.T @ centred)[1][:, -rank:].astype(key.dtype)
        ones = np.ones((len(key), 1), key.dtype)
        self.basis, self.mean, self.size = basis, mean, structure.pool
        self.key = np.ascontiguousarray(np.hstack([centred @ basis, ones]))
        self.log_theta = math.log(structure.screen_theta)

    def heavy(
        self, query: Float, scores: Float, landmarks: NDArray[np.int64], pools: int
    ) -> NDArray[np.bool_]:
        """Whether, by the sketch, one key of a pool may hold more than theta of some row's mass.

        Parameters
        ----------
        query : ndarray, shape (tiles * size, dim_qk)
        scores : ndarray, shape (tiles, size, columns)
            Scores of the columns kept so far: they give each row's log-sum-exp.

        Returns
        -------
        ndarray of bool, shape (tiles, pools)
        """
        tiles, size, _ = scores.shape
        top = scores.max(axis=2, keepdims=True)
        lse = top[..., 0] + np.log(np.exp(scores - top).sum(axis=2))
        constant = query @ self.mean - lse.ravel() - self.log_theta
        sketch = np.hstack([query @ self.basis, constant[:, None]])
        best = np.full((tiles, pools * self.size), -np.inf, scores.dtype)
        keys = min(pools * self.size, len(self.key))
        for first in range(0, keys, SCREEN_KEYS):
            last = min(first + SCREEN_KEYS, keys)
            values = scratch("screen", (len(query), last - first), query.dtype)
            np.matmul(sketch, self.key[first:last].T, out=values)
            best[:, first:last] = values.reshape(tiles, size, -1).max(axis=1)
        best[:, landmarks] = -np.inf
        return np.asarray(best.reshape(tiles, pools, self.size).max(axis=2) > 0)
