"""Sampled rows of every cluster, computed exactly, and what they see of the far field.

All heads are handled at once: arrays have a leading axis of heads, then one of clusters.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.choosing import landmark_count, probe_draws
from adaattn_core.structure import Landmark
from adaattn_torch.backend.clusters import query_clusters
from adaattn_torch.backend.geometry import Geometry
from adaattn_torch.backend.operands import Operands

FEW_LANDMARKS = 512
"""Heaviest keys that are looked for at first; more only where these leave too much."""


@dataclass(eq=False)
class GroupProbe:
    """What the sampled rows of one query group saw of the far field.

    Attributes
    ----------
    clusters : list of Tensor, shape (heads, rows)
        Rows that make up each cluster.
    rows : Tensor, shape (heads, clusters, samples)
        Sampled rows.
    query : Tensor, shape (heads, clusters, samples, dim_qk)
        Their queries, scaled.
    lse : Tensor, shape (heads, clusters, samples)
        Their exact log-sum-exp.
    mass : Tensor, shape (heads, clusters, far keys)
        Mean softmax mass of every key that is far for the sampled row, 0 for near keys.
    """

    clusters: list[torch.Tensor]
    rows: torch.Tensor
    query: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor
    _known: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _left: NDArray[np.float64] | None = None
    _looked_for: int = 0

    def of_heads(self, index: torch.Tensor) -> GroupProbe:
        """Return what was seen of some heads."""
        known = {n: (m[index], k[index]) for n, (m, k) in self._known.items()}
        return GroupProbe(
            [part[index] for part in self.clusters], self.rows[index], self.query[index],
            self.lse[index], self.mass[index], known,
        )  # fmt: skip

    def heaviest(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Masses and numbers of at least `count` heaviest keys of every cluster, falling."""
        keys = self.mass.shape[2]
        most = min(keys, FEW_LANDMARKS)
        while most < min(count, keys):
            most = min(4 * most, keys)
        if most not in self._known:
            masses, numbers = torch.topk(self.mass, most, dim=2)
            self._known = {most: (masses, numbers)}
        return self._known[most]

    def left(self, count: int) -> NDArray[np.float64]:
        """Mean far mass of each head without its clusters' n + 1 heaviest keys: (heads, n)."""
        masses, _ = self.heaviest(count)
        total = self.mass.sum(dim=2).double().mean(dim=1)
        falling = total[:, None] - masses.double().mean(dim=1).cumsum(dim=1)
        return np.concatenate([total[:, None].cpu().numpy(), falling.cpu().numpy()], axis=1)

    def landmark_counts(self, taus: list[float], most: int | None = None) -> list[int]:
        """Keys needed by each head, in steps of 64, to leave its tau on average.

        Parameters
        ----------
        most : int, optional
            Beyond so many nobody looks: every key is then said to be needed.
        """
        keys, counts = self.mass.shape[2], []
        for head, tau in enumerate(taus):
            needed = self._needed(head, tau, keys if most is None else most) if keys else 0
            counts.append(landmark_count(needed, keys))
        return counts

    def _needed(self, head: int, tau: float, most: int) -> int:
        keys = self.mass.shape[2]
        while True:
            if self._left is None:
                self._left = self.left(self._looked_for)
            fits = np.flatnonzero(self._left[head] <= tau)
            known = self._left.shape[1] - 1
            if len(fits) or known >= min(keys, most):
                return int(fits[0]) if len(fits) else keys
            self._looked_for, self._left = known + 1, None

    def landmarks(self, counts: list[int], heads: torch.Tensor | None) -> torch.Tensor:
        """Numbers of the heaviest keys of some heads: (heads, clusters, most of the counts)."""
        _, numbers = self.heaviest(max(counts))
        numbers = numbers[:, :, : max(counts)]
        return numbers if heads is None else numbers[heads]


class Prober:
    """Probes groups of some heads one by one, each once.

    Attributes
    ----------
    operands : Operands
        Of these heads.
    heads : list of int
        Their numbers in the sequence.
    key, value : Tensor, shape (heads, len_kv, dim)
        Each query head's own.
    groups : list of slice
    """

    def __init__(
        self, operands: Operands, heads: list[int], geometry: Geometry, seed: int
    ) -> None:
        self.operands, self.heads = operands, heads
        self.geometry, self.seed = geometry, seed
        self.groups = geometry.groups()
        self.key, self.value = (
            x.repeat_interleave(operands.group_size, dim=0)
            for x in (operands.key, operands.value)
        )
        self._clusters = query_clusters(
            operands.query, self.key, self.groups, geometry.structure.clusters
        )
        self._probes: dict[int, GroupProbe] = {}

    def restricted(self, places: list[int]) -> Prober:
        """Return a prober of some of its heads, which knows what this one has found."""
        if places == list(range(len(self.heads))):
            return self
        index = torch.tensor(places, device=self.key.device)
        other = copy(self)
        other.operands, other.heads = (
            self.operands.heads(places),
            [self.heads[n] for n in places],
        )
        other.key, other.value = other.operands.key, other.operands.value
        other._clusters = [[part[index] for part in parts] for parts in self._clusters]
        other._probes = {n: probe.of_heads(index) for n, probe in self._probes.items()}
        for name in ("key_blocks", "value_blocks"):
            other.__dict__.pop(name, None)
        return other

    def under(self, structure: Landmark) -> Prober:
        """Return a prober for a structure that cuts the same fields and draws the same rows."""
        other = copy(self)
        other.geometry = replace(self.geometry, structure=structure)
        return other

    @cached_property
    def key_blocks(self) -> torch.Tensor:
        """Keys by pools, zeros behind the last: (heads, blocks, pool, dim_qk)."""
        return _blocks(self.key, self.geometry.structure.pool)

    @cached_property
    def value_blocks(self) -> torch.Tensor:
        """Values by pools: (heads, blocks, pool, dim_v)."""
        return _blocks(self.value, self.geometry.structure.pool)

    def __getitem__(self, number: int) -> GroupProbe:
        if number not in self._probes:
            self._probes[number] = self._probe(number)
        return self._probes[number]

    def _probe(self, number: int) -> GroupProbe:
        group, parts = self.groups[number], self._clusters[number]
        structure = self.geometry.structure
        size = min(part.shape[1] for part in parts)  # a row or two may not be drawn
        drawn = probe_draws(structure, group, len(parts), size, self.seed)
        picks = torch.from_numpy(drawn).to(self.key.device)
        rows = torch.stack([part[:, pick] for part, pick in zip(parts, picks, strict=True)], 1)
        far, every = self.geometry.far_keys(group), rows.flatten(1)
        query = scaled_rows(self.operands, every)
        weights, lse = exact_weights(
            query, self.key, every, self.geometry, self.geometry.keys_of(group)
        )
        hide_near(weights, every, self.geometry)
        mass = weights[:, :, :far].unflatten(1, rows.shape[1:]).mean(dim=2)
        shape = rows.shape[1:]
        return GroupProbe(parts, rows, query.unflatten(1, shape), lse.view(rows.shape), mass)


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    pad = -x.shape[1] % size
    return torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, size))


def row_edges(edges: NDArray[np.int64], rows: torch.Tensor) -> torch.Tensor:
    """Entries of a per-row array for some rows."""
    return torch.from_numpy(edges).to(rows.device)[rows]


def scaled_rows(operands: Operands, rows: torch.Tensor) -> torch.Tensor:
    """Return queries of some rows (heads, rows) times the score scale."""
    index = rows[..., None].expand(-1, -1, operands.query.shape[2])
    return operands.query.gather(1, index) * operands.scale


def exact_weights(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, geometry: Geometry, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights (heads, rows, keys) and log-sum-exps (heads, rows) of scaled queries."""
    scores = torch.bmm(query, key[:, :keys].transpose(1, 2))
    if geometry.causal and rows.numel():
        stop = (rows + 1 + geometry.offset).clamp(max=geometry.len_kv)
        low = max(int(stop.min()), 0)
        if low < keys:
            columns = torch.arange(low, keys, device=rows.device)
            scores[:, :, low:].masked_fill_(columns >= stop[..., None], -torch.inf)
    if not keys:
        return scores, scores.new_full(rows.shape, -torch.inf)
    top = scores.amax(dim=2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=2, keepdim=True)
    lse = (total.log() + top)[..., 0]
    weights /= total.clamp_min(torch.finfo(total.dtype).tiny)
    return weights, lse


def hide_near(weights: torch.Tensor, rows: torch.Tensor, geometry: Geometry) -> None:
    """Set weights of near keys to 0 in place."""
    start, stop = (row_edges(edge, rows)[..., None] for edge in geometry.near_edges)
    keys = weights.shape[2]
    if not rows.numel() or not keys:
        return
    low, high = int(start.min()), min(int(stop.max()), keys)
    columns = torch.arange(low, high, device=rows.device)
    near = (columns >= start) & (columns < stop)
    weights[:, :, low:high].masked_fill_(near, 0)
