"""The far field of a query group: probe rows, landmarks and pools.

For a query tile the keys split into the *near field* (computed exactly), the group's
*landmarks* (far keys with the largest sampled mass, computed exactly) and *pools* (every other
far key, 64 to a column). What is sampled, and what follows from it:

    mass_j  = mean over the sampled rows r of p_rj, far keys only
    landmarks = the fewest keys with   sum of the other masses <= tau   (whole multiples of 64)
    k_b, v_b  = averages of block b's other keys and values, weights mass_j + 0.1 mean mass
    bias_b    = ln n_b + beta_b,   beta_b fitted so that the sampled rows' pooled mass is right

See docs/explanation/structures for why the low rank lives in the token dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.structure import Landmark
from adaattn_reference.blocks import exact_scores, sample_rows, softmax_in_place
from adaattn_reference.operands import Operands
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

LANDMARK_STEP = 64
"""Landmarks come in multiples of this: the width of a key tile."""
BASE_WEIGHT = 0.1
"""Share of the mean mass that every pooled key gets, so that unsampled keys still count."""
BIAS_RANGE = (-3.0, 6.0)
"""Fitted pool biases are clipped: a few sampled rows must not move a pool by more."""


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

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Keys by falling mass."""
        return np.argsort(-self.mass)

    def landmark_counts(self, taus: tuple[float, ...]) -> list[int]:
        """Fewest heaviest keys, in multiples of 64, that leave at most each tau to others."""
        mass = self.mass
        rest = mass.sum() - np.cumsum(mass[self.order])
        counts = []
        for tau in taus:
            needed = int((rest > tau).sum()) + 1 if mass.size and mass.sum() > tau else 0
            counts.append(min(-(-needed // LANDMARK_STEP) * LANDMARK_STEP, len(mass)))
        return counts


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
        first = int(np.argmax(view.stop > 0))
        offset = int(view.stop[first]) - 1 - first
        if not np.array_equal(view.stop, np.clip(rows + 1 + offset, 0, view.len_kv)):
            return None
        return cls(structure, offset, True, view.len_q, view.len_kv)

    def groups(self) -> list[slice]:
        """Row ranges that share landmarks and pools."""
        size = self.structure.group
        return [slice(g, min(g + size, self.len_q)) for g in range(0, self.len_q, size)]

    def near(self, first_row: NDArray[np.int64] | int) -> tuple[Any, Any]:
        """First and one-past-last near key of the tile that starts at `first_row`."""
        step = max(self.structure.pool, 1)
        position = np.asarray(first_row) + self.offset
        start = (position - self.structure.band) // step * step
        start = np.clip(start, 0, self.len_kv // step * step)
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
        return np.asarray(far if self.causal else far | (first >= stop[:, None]))

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


def build_far_field(
    view: HeadView,
    operands: Operands,
    geometry: Geometry,
    probe: GroupProbe,
    count: int,
) -> FarField:
    """Gather the `count` heaviest keys as landmarks and pool the others, block by block."""
    structure = geometry.structure
    landmarks = np.sort(probe.order[:count])
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
    shares = weight.reshape(blocks, 1, size)
    shares /= np.maximum(shares.sum(axis=2, keepdims=True), np.float32(1e-30))
    pool_key = _block_average(operands.key[:keys], shares, size)
    pool_value = _block_average(operands.value[:keys], shares, size)
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
    """beta_b = ln(mass the sampled rows gave the block / mass that its pool predicts)."""
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
