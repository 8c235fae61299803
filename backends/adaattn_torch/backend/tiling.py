"""Where a sequence's tiles lie, and its heads with the keys that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.structure import Landmark
from adaattn_torch.backend.geometry import Geometry
from adaattn_torch.backend.operands import Operands

STRIP_KEYS = 1 << 20
"""Sampled masses that are handled at once, of all heads and some consecutive tiles."""


@dataclass(frozen=True)
class Tiling:
    """Where a sequence's tiles lie, and where their near fields begin and end.

    Attributes
    ----------
    geometry : Geometry
    count : int
        Whole tiles.
    start, stop : list of int
        First and one-past-last near key of every tile.
    own : list of int
        First of the keys that a tile's rows share with them as a causal square, the others are
        columns; `stop` where the mask is full.
    """

    geometry: Geometry
    count: int
    start: list[int]
    stop: list[int]
    own: list[int]

    @classmethod
    def of(cls, geometry: Geometry | None) -> Tiling | None:
        """Return the tiling, or None where a structure or mask wants something else."""
        if geometry is None or not takes(geometry.structure):
            return None
        if geometry.causal and not 0 <= geometry.offset <= geometry.len_kv - geometry.len_q:
            return None
        tile = geometry.structure.tile
        count = geometry.len_q // tile
        if not count:
            return None
        first = np.arange(count) * tile
        start, stop = (edge[first].tolist() for edge in geometry.near_edges)
        own = (first + geometry.offset).tolist() if geometry.causal else stop
        return cls(geometry, count, start, stop, own)

    @property
    def structure(self) -> Landmark:
        """The structure, of any mass."""
        return self.geometry.structure

    @property
    def causal(self) -> bool:
        """Whether the mask is causal; else it is full."""
        return self.geometry.causal

    @property
    def rest(self) -> slice:
        """Rows that are computed densely: the tail, and what is left of whole tiles."""
        tail = self.geometry.len_q - self.structure.tail
        return slice(max(min(self.count * self.structure.tile, tail), 0), self.geometry.len_q)

    @property
    def holds_all(self) -> bool:
        """Whether every near field holds all keys that its rows see."""
        if any(self.start):
            return False
        return self.causal or min(self.stop) >= self.geometry.len_kv

    def rows(self, tile: int) -> slice:
        """Rows of a tile."""
        size = self.structure.tile
        return slice(tile * size, (tile + 1) * size)

    def reach(self, tile: int) -> int:
        """Keys that a tile's rows can reach."""
        return self.stop[tile] if self.causal else self.geometry.len_kv

    def far(self, tile: int) -> int:
        """Keys up to the last one that is far for a tile."""
        return self.start[tile] if self.causal else self.geometry.len_kv

    def pools(self, tile: int) -> int:
        """Pools among a tile's columns; those of its near field are hidden by their bias."""
        return -(-self.far(tile) // self.structure.pool)

    def strips(self, heads: int) -> list[range]:
        """Consecutive tiles that are handled at once."""
        found, first = [], 0
        while first < self.count:
            last = first + 1
            while (
                last < self.count and heads * (last + 1 - first) * self.far(last) <= STRIP_KEYS
            ):
                last += 1
            found.append(range(first, last))
            first = last
        return found

    def drawn(self, tile: int, seed: int) -> NDArray[np.int64]:
        """Rows of a tile that choose its columns: one of each of equal stretches."""
        structure = self.structure
        count = min(structure.samples, structure.tile)
        edges = np.arange(count + 1) * structure.tile // count
        rng = np.random.default_rng((seed, 1, tile))
        return tile * structure.tile + rng.integers(edges[:-1], edges[1:])


def takes(structure: Landmark) -> bool:
    """Whether a structure's tiles are groups of their own, with pools and without a screen."""
    whole = structure.group == structure.tile and structure.clusters == 1
    return whole and structure.pool > 0 and not structure.screen_rank


@dataclass(eq=False)
class TiledHeads:
    """Some query heads of a sequence, in order, with the keys that they share.

    Attributes
    ----------
    operands : Operands
        Of all heads of the sequence: what is made of the keys is made once.
    query : Tensor, shape (heads, len_q, dim_qk)
    owners : list of int
        Key/value head of every query head.
    tiling : Tiling
    """

    operands: Operands
    query: torch.Tensor
    owners: list[int]
    tiling: Tiling

    @property
    def key(self) -> torch.Tensor:
        """Keys of all key/value heads: (heads_kv, len_kv, dim_qk)."""
        return self.operands.key

    @property
    def value(self) -> torch.Tensor:
        """Values of all key/value heads: (heads_kv, len_kv, dim_v)."""
        return self.operands.value

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.operands.scale

    @classmethod
    def of(cls, operands: Operands, heads: list[int], tiling: Tiling) -> TiledHeads:
        """Return some heads of a sequence."""
        every = len(heads) == len(operands.query)
        query = operands.query if every else operands.query[heads]
        owners = [head // operands.group_size for head in heads]
        return cls(operands, query, owners, tiling)

    def some(self, places: list[int]) -> TiledHeads:
        """Return some of them; what was made of their keys is shared."""
        owners = [self.owners[place] for place in places]
        return replace(self, query=self.query[places], owners=owners)

    @cached_property
    def shared(self) -> list[tuple[int, slice]]:
        """Key/value heads, and the places of the query heads that share each."""
        return runs(self.owners)

    @cached_property
    def both(self) -> torch.Tensor:
        """Keys and values side by side, whole pools of them: one gather serves both."""
        pad = -self.key.shape[1] % self.tiling.structure.pool
        joined = self.operands.side_by_side
        return torch.nn.functional.pad(joined, (0, 0, 0, pad)) if pad else joined

    def weights(
        self, tile: int, rows: NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Softmax weights of some rows of a tile.

        Returns
        -------
        query : Tensor, shape (heads, rows, dim_qk)
            Scaled.
        weights : Tensor, shape (heads, rows, keys that the tile reaches)
        lse : Tensor, shape (heads, rows)
        """
        index = torch.from_numpy(rows).to(self.query.device)
        query = self.query.index_select(1, index) * self.scale
        reach, own = self.tiling.reach(tile), self.tiling.own[tile]
        scores = query.new_empty((*query.shape[:2], reach))
        for owner, places in self.shared:
            torch.mm(
                query[places].flatten(0, 1), self.key[owner, :reach].T,
                out=scores[places].flatten(0, 1),
            )  # fmt: skip
        if self.tiling.causal:
            last = index[:, None] + self.tiling.geometry.offset
            hidden = torch.arange(own, reach, device=index.device) > last
            scores[:, :, own:].masked_fill_(hidden, -math.inf)
        weights = torch.softmax(scores, dim=2)  # its exponential is faster than `exp_`
        # The largest weight is 1 / total: of the scores relative to the largest one.
        return query, weights, scores.amax(dim=2) - weights.amax(dim=2).log()

    def values(self, weights: torch.Tensor, keys: slice) -> torch.Tensor:
        """Sum values of some keys by weights (heads, rows, keys)."""
        parts = [
            (weights[places].flatten(0, 1) @ self.value[owner, keys]).unflatten(
                0, (-1, weights.shape[1])
            )
            for owner, places in self.shared
        ]
        return torch.cat(parts)


def runs(owners: list[int]) -> list[tuple[int, slice]]:
    """Equal neighbours, and their places."""
    found, first = [], 0
    for last in range(1, len(owners) + 1):
        if last == len(owners) or owners[last] != owners[first]:
            found.append((owners[first], slice(first, last)))
            first = last
    return found
