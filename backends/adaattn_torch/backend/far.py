"""Landmarks and pools of the clusters of a query group.

    landmarks = the heaviest keys by sampled mass: as few as leave a mass <= tau to other keys
    k_b, v_b  = averages of block b's other keys and values, weights mass_j + 0.1 mean mass
    bias_b    = ln n_b + beta_b,   beta_b fitted so that the sampled rows' pooled mass is right

as in the reference backend; docs/explanation/structures says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adaattn_core.choosing import BASE_WEIGHT, BIAS_RANGE
from adaattn_torch.backend.probing import GroupProbe, Prober, row_edges

HIDDEN = -1e30
"""Bias of a column that a row does not see: finite, and nothing beside any score."""


@dataclass(eq=False)
class FarField:
    """Columns that stand for the far field of some heads' clusters.

    Attributes
    ----------
    counts : list of int
        Landmarks of each head.
    landmarks : Tensor, shape (heads, clusters, most of the counts)
        Key numbers, heaviest first; a head's own are its first ones.
    pool_key, pool_value : Tensor, shape (heads, clusters, blocks, dim)
    pool_bias : Tensor, shape (heads, clusters, blocks)
        `HIDDEN` for blocks without a pooled key.
    """

    counts: list[int]
    landmarks: torch.Tensor
    pool_key: torch.Tensor
    pool_value: torch.Tensor
    pool_bias: torch.Tensor

    def part(self, heads: list[int], clusters: list[int]) -> FarField:
        """Return the columns of some clusters of heads that have as many landmarks."""
        count = self.counts[heads[0]]
        arrays = [self.landmarks[:, :, :count], self.pool_key, self.pool_value, self.pool_bias]
        if len(heads) < len(self.counts):
            arrays = [x[heads] for x in arrays]
        if len(clusters) < self.pool_bias.shape[1]:
            arrays = [x[:, clusters] for x in arrays]
        return FarField([count] * len(heads), *arrays)

    @property
    def spare(self) -> torch.Tensor | None:
        """Whether a head has no landmark in that place: (heads, 1, most); None if all have."""
        if len(set(self.counts)) <= 1:
            return None
        device = self.landmarks.device
        own = torch.tensor(self.counts, device=device)[:, None]
        return (torch.arange(self.landmarks.shape[2], device=device) >= own)[:, None]


def far_field(
    prober: Prober, number: int, counts: list[int], heads: torch.Tensor | None = None
) -> FarField:
    """Far field of a group with as many landmarks a cluster as each head is given.

    Parameters
    ----------
    heads : Tensor of int64, optional
        Of these of the prober's heads; default all.
    """
    probe = prober[number]

    def pick(x: torch.Tensor) -> torch.Tensor:
        return x if heads is None else x[heads]

    landmarks = probe.landmarks(counts, heads)
    shape = landmarks.shape[:2]
    dim, dim_v = prober.key.shape[2], prober.value.shape[2]
    keys = probe.mass.shape[2]
    size, none = prober.geometry.structure.pool, prober.value.new_zeros
    if not size or not keys:
        empty = none((*shape, 0, dim)), none((*shape, 0, dim_v)), none((*shape, 0))
        return FarField(counts, landmarks, *empty)
    blocks = -(-keys // size)
    rest = torch.nn.functional.pad(pick(probe.mass), (0, blocks * size - keys))
    if heads is None and blocks * size == keys:
        rest = rest.clone()
    found = FarField(counts, landmarks, rest, rest, rest)
    spare = found.spare
    filled = prober.value.new_full((*shape, blocks), size)
    filled[:, :, -1] -= blocks * size - keys
    if landmarks.shape[2]:
        taken = torch.zeros_like(rest, dtype=torch.bool)
        own = torch.ones_like(landmarks, dtype=torch.bool)
        own = own if spare is None else own & ~spare
        taken.scatter_(2, landmarks, own)
        rest.masked_fill_(taken, 0)
        filled -= taken.unflatten(2, (blocks, size)).sum(dim=3)
    block_mass = rest.unflatten(2, (blocks, size)).sum(dim=3)
    mean = block_mass.sum(dim=2) / filled.sum(dim=2).clamp_min(1)
    rest += (BASE_WEIGHT * mean + 1e-12)[..., None]
    rest[:, :, keys:] = 0
    if landmarks.shape[2]:
        rest.masked_fill_(taken, 0)
    shares = rest.unflatten(2, (blocks, size))
    shares /= shares.sum(dim=3, keepdim=True).clamp_min(1e-30)
    by_block = shares.transpose(1, 2)
    pool_key, pool_value = (
        torch.matmul(by_block, pick(x)[:, :blocks]).transpose(1, 2)
        for x in (prober.key_blocks, prober.value_blocks)
    )
    bias = torch.where(filled > 0, filled.clamp_min(1).log(), HIDDEN)
    if prober.geometry.structure.fitted:
        bias = bias + _fitted(prober, probe, pick, block_mass, pool_key, bias)
    return FarField(counts, landmarks, pool_key, pool_value, bias)


def _fitted(
    prober: Prober,
    probe: GroupProbe,
    pick: Callable[[torch.Tensor], torch.Tensor],
    block_mass: torch.Tensor,
    pool_key: torch.Tensor,
    log_count: torch.Tensor,
) -> torch.Tensor:
    """beta_b = ln(mass the sampled rows gave the block / mass that its pool predicts)."""
    rows, query = pick(probe.rows), pick(probe.query)
    scores = torch.matmul(query, pool_key.transpose(2, 3))
    scores += log_count[:, :, None]
    scores -= pick(probe.lse)[..., None]
    far = far_pools(prober, rows, pool_key.shape[2])
    predicted = torch.where(far, scores.clamp(max=20.0).exp(), 0.0).sum(dim=2)
    true = (block_mass * rows.shape[2]).clamp_min(1e-20)
    beta = (true / predicted.clamp_min(1e-20)).log().clamp(*BIAS_RANGE)
    return torch.where(far.any(dim=2), beta, 0.0)


def far_pools(prober: Prober, rows: torch.Tensor, pools: int) -> torch.Tensor:
    """Whether each pool lies wholly in the far field of each row: (*rows, pools)."""
    start, stop = (row_edges(edge, rows)[..., None] for edge in prober.geometry.near_edges)
    size = prober.geometry.step
    numbers = torch.arange(pools, device=rows.device)
    far = numbers < start // size
    if not prober.geometry.causal:
        far = far | (numbers >= -(-stop // size))
    return far


def columns_bias(
    far: FarField, prober: Prober, rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return what is added to scores of rows (heads, clusters, rows) with far columns."""
    size = prober.geometry.step
    blocks = torch.arange(far.pool_bias.shape[2], device=rows.device)
    blocks = blocks.expand(far.pool_bias.shape)
    last = torch.cat([far.landmarks, blocks * size + size - 1], dim=2)
    of_landmarks = torch.zeros_like(far.landmarks, dtype=dtype)
    spare = far.spare
    if spare is not None:
        of_landmarks.masked_fill_(spare, HIDDEN)
    bias = torch.cat([of_landmarks, far.pool_bias.to(dtype)], dim=2)
    start, stop = (row_edges(edge, rows)[..., None] for edge in prober.geometry.near_edges)
    sees = last[:, :, None] < start
    if not prober.geometry.causal:
        first = torch.cat([far.landmarks, blocks * size], dim=2)
        sees = sees | (first[:, :, None] >= stop)
    hidden = torch.full((), HIDDEN, dtype=dtype, device=rows.device)
    return torch.where(sees, bias[:, :, None], hidden)
