"""The far field of a query group: probe rows, landmarks and pools.

For a query tile the keys split into the *near field* (computed exactly), the *landmarks* of a
row's cluster (far keys with the largest sampled mass, computed exactly) and *pools* (every
other far key, 64 to a column). What is sampled in a cluster, and what follows from it:

    mass_j  = mean over the sampled rows r of p_rj, far keys only
    landmarks = the heaviest keys: as few in every cluster of a group (multiples of 64) as
              leave a mass <= tau to other keys, on average over the clusters
    k_b, v_b  = averages of block b's other keys and values, weights mass_j + 0.1 mean mass
    bias_b    = ln n_b + beta_b,   beta_b fitted so that the sampled rows' pooled mass is right

All clusters of a group are handled at once: arrays have a leading axis of clusters. See
docs/explanation/structures for why the low rank lives in the token dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.choosing import (
    BASE_WEIGHT,
    BIAS_RANGE,
    heaviest,
    landmark_count,
    probe_draws,
)
from adaattn_reference.blocks import exact_scores, softmax_in_place
from adaattn_reference.clusters import query_clusters
from adaattn_reference.geometry import Geometry
from adaattn_reference.operands import Operands
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GroupProbe:
    """What the exactly computed rows of one query group saw of the far field.

    Attributes
    ----------
    clusters : list of ndarray of int64
        Rows of the head that make up each cluster.
    rows : ndarray of int64, shape (clusters, samples)
        Sampled rows of each cluster.
    lse : ndarray, shape (clusters, samples)
        Their exact log-sum-exp.
    mass : ndarray, shape (clusters, keys before the group's end)
        Mean softmax mass of every key that is far for the sampled row, 0 for near keys.
    built : dict of (float, str) to FarField
        Far fields of operands that nothing was rounded of, by tau and format.
    """

    clusters: list[Rows]
    rows: Rows
    lse: Float
    mass: Float
    built: dict[tuple[float, str], FarField] = field(default_factory=dict)

    @cached_property
    def rising(self) -> Float:
        """Each cluster's masses in rising order."""
        return np.sort(self.mass, axis=1)

    @cached_property
    def rest(self) -> Float:
        """Sum of the j + 1 lightest masses, mean over the clusters, rising with j."""
        return np.asarray(np.cumsum(self.rising.mean(axis=0)))

    def keys_needed(self, taus: tuple[float, ...]) -> NDArray[np.int64]:
        """Fewest heaviest keys of every cluster that leave others at most a tau on average."""
        fit = np.searchsorted(self.rest, np.array(taus, self.rest.dtype), "right")
        return np.asarray(len(self.rest) - fit, np.int64)

    def landmark_count(self, tau: float) -> int:
        """Keys needed in steps of 64, as far as there are so many."""
        return landmark_count(int(self.keys_needed((tau,))[0]), len(self.rest))

    def heaviest(self, cluster: int, count: int) -> Rows:
        """`count` heaviest keys in order of position."""
        return heaviest(self.mass[cluster], self.rising[cluster], count)

    @cached_property
    def cluster_of(self) -> NDArray[np.int64]:
        """Cluster of each row of the group, by its number in the group."""
        out = np.empty(sum(map(len, self.clusters)), np.int64)
        first = min(int(c.min()) for c in self.clusters)
        for number, members in enumerate(self.clusters):
            out[members - first] = number
        return out


@dataclass(frozen=True, eq=False)
class FarField:
    """Landmarks and pools of one query group's clusters.

    Attributes
    ----------
    landmarks : ndarray of int64, shape (clusters, count)
        Key numbers, increasing.
    pool_key, pool_value : ndarray, shape (clusters, blocks, dim)
    pool_bias : ndarray, shape (clusters, blocks)
        ln n_b + beta_b; -inf for blocks without a pooled key.
    """

    landmarks: Rows
    pool_key: Float
    pool_value: Float
    pool_bias: Float

    def columns(self) -> int:
        """Columns that stand for the far field."""
        return int(self.landmarks.shape[1] + self.pool_bias.shape[1])


def probe_head(view: HeadView, geometry: Geometry, seed: int) -> list[GroupProbe]:
    """Compute sampled rows of every cluster exactly and keep what they saw of the far field."""
    structure, groups = geometry.structure, geometry.groups()
    probes = []
    clusters = query_clusters(view, groups, structure.clusters)
    for group, parts in zip(groups, clusters, strict=True):
        size = min(map(len, parts))  # a row or two of the last cluster may not be drawn
        drawn = probe_draws(structure, group, len(parts), size, seed)
        rows = np.take_along_axis(np.stack([part[:size] for part in parts]), drawn, axis=1)
        scores = exact_scores(view, rows.ravel(), geometry.keys_of(group))
        weights, lse = softmax_in_place(scores)
        mass = far_mass(weights, rows, geometry)
        probes.append(GroupProbe(parts, rows, lse.reshape(rows.shape), mass))
    return probes


def far_mass(weights: Float, rows: Rows, geometry: Geometry) -> Float:
    """Mean mass of far keys over the rows (clusters, samples) of known weights, by cluster.

    `weights` has shape (clusters * samples, keys) and loses its near entries; the result has
    shape (clusters, keys).
    """
    for row, first, last in zip(
        weights, *map(np.ravel, geometry.near_of_rows(rows)), strict=True
    ):
        row[first:last] = 0
    mass = weights.reshape(*rows.shape, weights.shape[1]).sum(axis=1)
    return np.asarray(mass / max(rows.shape[1], 1))


def far_field(
    operands: Operands, geometry: Geometry, probe: GroupProbe, tau: float
) -> FarField:
    """Far field of a group that leaves at most `tau` of its clusters' masses to pools."""
    plan = operands.plan
    if plan.qk not in ("f32", "f64") or plan.qk != plan.pv:
        return _build(operands, geometry, probe, tau)
    if (tau, plan.qk) not in probe.built:
        probe.built[tau, plan.qk] = _build(operands, geometry, probe, tau)
    return probe.built[tau, plan.qk]


def _build(operands: Operands, geometry: Geometry, probe: GroupProbe, tau: float) -> FarField:
    """Gather the heaviest keys of each cluster; pool the others, block by block."""
    count = probe.landmark_count(tau)
    size = geometry.structure.pool
    number, keys = probe.mass.shape
    landmarks = np.stack([probe.heaviest(c, count) for c in range(number)])
    dtype = operands.key.dtype
    if not size or not keys:
        return FarField(
            landmarks,
            np.empty((number, 0, operands.key.shape[1]), dtype),
            np.empty((number, 0, operands.value.shape[1]), dtype),
            np.empty((number, 0), dtype),
        )
    blocks = -(-keys // size)
    rest = np.zeros((number, blocks * size), dtype)  # mass of the pooled keys
    rest[:, :keys] = probe.mass
    counts = np.full((number, blocks), size, dtype)
    counts[:, -1] -= blocks * size - keys
    for c, chosen in enumerate(landmarks):
        rest[c, chosen] = 0
        counts[c] -= np.bincount(chosen // size, minlength=blocks)
    block_mass = rest.reshape(number, blocks, size).sum(axis=2)
    mean = block_mass.sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    weight = rest
    weight += (BASE_WEIGHT * mean + 1e-12)[:, None]
    weight[:, keys:] = 0
    for c, chosen in enumerate(landmarks):
        weight[c, chosen] = 0
    shares = weight.reshape(number, blocks, size)
    shares /= np.maximum(shares.sum(axis=2, keepdims=True), dtype.type(1e-30))
    pool_key = _block_averages(operands.key[:keys], shares)
    pool_value = _block_averages(operands.value[:keys], shares)
    with np.errstate(divide="ignore"):
        bias = np.log(counts)
    if geometry.structure.fitted:
        bias += _fitted_bias(operands, geometry, probe, block_mass, pool_key, bias)
    return FarField(landmarks, pool_key, pool_value, bias)


def _block_averages(x: Float, shares: Float) -> Float:
    """Weighted averages of blocks of x (keys, dim), by shares (clusters, blocks, size)."""
    number, blocks, size = shares.shape
    whole = len(x) // size
    out = np.empty((number, blocks, x.shape[1]), x.dtype)
    parts = shares[:, :whole].transpose(1, 0, 2)
    by_block = x[: whole * size].reshape(whole, size, x.shape[1])
    out[:, :whole] = np.matmul(parts, by_block).transpose(1, 0, 2)
    if whole < blocks:
        tail = x[whole * size :]
        out[:, whole] = shares[:, whole, : len(tail)] @ tail
    return out


def _fitted_bias(
    operands: Operands,
    geometry: Geometry,
    probe: GroupProbe,
    block_mass: Float,
    pool_key: Float,
    log_count: Float,
) -> Float:
    """beta_b = ln(mass the sampled rows gave the block / mass that its pool predicts)."""
    scores = np.matmul(operands.query[probe.rows], pool_key.transpose(0, 2, 1))
    if operands.lse_shift is not None:
        scores += operands.lse_shift[probe.rows][..., None]
    scores += log_count[:, None]
    scores -= probe.lse[..., None]
    far = geometry.far_pools(probe.rows, pool_key.shape[1])
    with np.errstate(over="ignore"):
        predicted = np.where(far, np.exp(np.minimum(scores, 20.0)), 0).sum(axis=1)
    tiny = np.float32(1e-20)
    true = np.maximum(block_mass * probe.rows.shape[1], tiny)
    beta = np.log(true / np.maximum(predicted, tiny))
    return np.where(far.any(axis=1), np.clip(beta, *BIAS_RANGE), 0).astype(pool_key.dtype)
