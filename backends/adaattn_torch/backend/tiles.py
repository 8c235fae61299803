"""Landmarks of consecutive rows: every query tile is a group of its own.

Rows of a tile see the same far field, so that nothing is hidden by row and no query moves: a
tile is one attention call over its own columns

    [near keys before the tile | landmarks | pools],    pools with a bias,

and one call for all tiles takes their rows over the tile's own keys, a causal square. Both are
merged by their log-sum-exps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from adaattn_core.choosing import BASE_WEIGHT, BIAS_RANGE
from adaattn_torch.backend import kernels
from adaattn_torch.backend.far import HIDDEN
from adaattn_torch.backend.halves import merge
from adaattn_torch.backend.tiling import TiledHeads, runs

CODE_BITS, OCTAVES = 4, 40
"""Masses from 2^-40 to 1 are told apart by their exponent and so many bits of the fraction: in
steps of 6% at the most."""


@dataclass(eq=False)
class Strip:
    """What sampled rows of some tiles saw of the far field.

    Attributes
    ----------
    heads : TiledHeads
    tiles : list of int
    query : Tensor, shape (heads, tiles, samples, dim_qk)
        Scaled.
    lse : Tensor, shape (heads, tiles, samples)
    mass : Tensor, shape (heads, tiles, far keys)
        Mean softmax mass of every key that is far for the tile, 0 for the others; up to whole
        pools.
    """

    heads: TiledHeads
    tiles: list[int]
    query: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor

    @classmethod
    def probe(cls, heads: TiledHeads, tiles: list[int], seed: int) -> Strip:
        """Compute the sampled rows of some tiles."""
        tiling = heads.tiling
        pools = max(tiling.pools(tile) for tile in tiles)
        shape = (len(heads.query), len(tiles), pools * tiling.structure.pool)
        mass = heads.query.new_zeros(shape)
        queries, sums = [], []
        for number, tile in enumerate(tiles):
            rows = tiling.drawn(tile, seed)
            query, weights, lse = heads.weights(tile, rows)
            queries.append(query)
            sums.append(lse)
            far = tiling.far(tile)
            if far:
                torch.mean(weights[:, :, :far], dim=1, out=mass[:, number, :far])
                if not tiling.causal:
                    mass[:, number, tiling.start[tile] : tiling.stop[tile]] = 0
        return cls(heads, tiles, torch.stack(queries, 1), torch.stack(sums, 1), mass)

    @cached_property
    def masses(self) -> torch.Tensor:
        """Mass of the keys up to each code: (heads, tiles, codes)."""
        shape, codes = self.mass.shape[:2], (OCTAVES << CODE_BITS) + 1
        number = self._bits(self.mass)
        number = number.sub_(self._bits(self._edge(0))).clamp_(0, codes - 1)
        counted = self.mass.new_zeros((*shape, codes))
        return counted.scatter_add_(2, number.long(), self.mass).cumsum(dim=2)

    def _bits(self, mass: torch.Tensor) -> torch.Tensor:
        """Leading bits of masses, as integers that grow with them."""
        fraction = 52 if mass.dtype == torch.float64 else 23
        whole = mass.view(torch.int64 if fraction == 52 else torch.int32)
        return whole >> (fraction - CODE_BITS)

    def _edge(self, octave: int) -> torch.Tensor:
        """Least mass of the codes of an octave, counted from 2^-40."""
        return self.mass.new_tensor(2.0 ** (octave - OCTAVES))

    def landmarks(self, taus: list[float], places: list[int] | None = None) -> torch.Tensor:
        """Whether a key is a landmark where heads leave some mass: (some, tiles, keys)."""
        mass, masses = self.mass, self.masses
        if places is not None and len(places) < len(mass):
            mass, masses = mass[places], masses[places]
        allowed = masses.new_tensor(taus)[:, None, None]
        code = (masses <= allowed).sum(dim=2, keepdim=True).clamp_min(1)
        scale = 1 << CODE_BITS
        octave, part = code // scale - OCTAVES, 1 + code % scale / scale
        return mass >= torch.ldexp(part.to(mass.dtype), octave)

    def columns(self, taus: list[float], places: list[int] | None = None) -> Columns:
        """Return the columns of every tile that leave a mass of each head's tau to pools.

        Landmarks are the heaviest keys, as few as leave the mass; pools are averages of a
        block's other keys and values, weights mass_j + 0.1 mean mass, with a bias that makes
        the sampled rows' pooled mass right.

        Parameters
        ----------
        places : list of int, optional
            Of these heads; default all.
        """
        tiling, both = self.heads.tiling, self.heads.both
        size, mass, query, lse = tiling.structure.pool, self.mass, self.query, self.lse
        owners = self.heads.owners
        if places is not None and len(places) < len(owners):
            mass, query, lse = mass[places], query[places], lse[places]
            owners = [owners[place] for place in places]
        heads, tiles, keys = mass.shape
        beyond, samples = max(keys - self.heads.key.shape[1], 0), query.shape[2]
        chosen = self.landmarks(taus, places)
        landmark = chosen.unflatten(2, (-1, size))
        rest = mass.unflatten(2, (-1, size)).masked_fill(landmark, 0)
        filled = size - landmark.count_nonzero(dim=3).to(mass.dtype)
        filled[:, :, -1:] -= beyond
        left = rest.sum(dim=3)
        seen = self._far_pools(filled.shape[2])
        mean = left.sum(dim=2) / (filled * seen).sum(dim=2).clamp_min(1)
        rest += (BASE_WEIGHT * mean + 1e-12)[..., None, None]
        rest.masked_fill_(landmark, 0)
        if beyond:
            rest.flatten(2)[:, :, -beyond:] = 0
        rest /= rest.sum(dim=3, keepdim=True).clamp_min(1e-30)
        pools = both.new_empty((filled.shape[2], heads, tiles, both.shape[2]))
        for owner, mine in runs(owners):
            blocks = both[owner, :keys].unflatten(0, (-1, size))
            averages = rest[mine].flatten(0, 1).transpose(0, 1) @ blocks
            pools[:, mine] = averages.unflatten(1, (-1, tiles))
        bias = torch.where(filled > 0, filled.clamp_min(1).log(), HIDDEN)
        if tiling.structure.fitted:
            pool_key = pools[..., : query.shape[3]].permute(1, 2, 3, 0)
            scores = query @ pool_key
            scores += bias[:, :, None] - lse[..., None]
            predicted = scores.clamp_(max=20.0).exp_().sum(dim=2)
            true = (left * samples).clamp_min(1e-20)
            bias += (true / predicted.clamp_min(1e-20)).log().clamp(*BIAS_RANGE)
        if not tiling.causal:
            bias = torch.where(seen, bias, HIDDEN)
        numbers, counts = chosen.nonzero()[:, 2], chosen.count_nonzero(dim=2).tolist()
        return Columns(self, owners, numbers, counts, pools, bias)

    def _far_pools(self, blocks: int) -> torch.Tensor:
        """Whether pools lie in the far field of each tile: (tiles, blocks)."""
        tiling, size = self.heads.tiling, self.heads.tiling.structure.pool
        numbers = np.arange(blocks)
        start, stop = (
            np.array([edge[tile] for tile in self.tiles])[:, None]
            for edge in (tiling.start, tiling.stop)
        )
        seen = numbers < start // size
        if not tiling.causal:
            seen = seen | (numbers >= -(-stop // size))
        return torch.from_numpy(seen).to(self.mass.device)


@dataclass(eq=False)
class Columns:
    """Landmarks and pools of a strip's tiles.

    Attributes
    ----------
    strip : Strip
    owners : list of int
        Key/value head of every head that these are of.
    numbers : Tensor of int64
        Landmarks of all heads and tiles, one after the other.
    counts : list of list of int
        How many each head and tile has.
    pools : Tensor, shape (blocks, heads, tiles, dim_qk + dim_v)
    bias : Tensor, shape (heads, tiles, blocks)
    """

    strip: Strip
    owners: list[int]
    numbers: torch.Tensor
    counts: list[list[int]]
    pools: torch.Tensor
    bias: torch.Tensor

    @cached_property
    def _begins(self) -> list[list[int]]:
        """Where the landmarks of each head and tile begin."""
        flat = np.cumsum([0, *np.ravel(self.counts)])[:-1]
        found: list[list[int]] = flat.reshape(np.shape(self.counts)).tolist()
        return found

    @cached_property
    def _padded(self) -> tuple[torch.Tensor, int]:
        """Biases of pools, behind as many zeros as a tile may have other columns."""
        tiling = self.strip.heads.tiling
        near = max(tiling.own[tile] - tiling.start[tile] for tile in self.strip.tiles)
        zeros = near + max(max(counts) for counts in self.counts)
        return torch.nn.functional.pad(self.bias, (zeros, 0)), zeros

    def near(self, number: int) -> slice:
        """Near keys among a tile's columns."""
        tiling, tile = self.strip.heads.tiling, self.strip.tiles[number]
        return slice(tiling.start[tile], tiling.own[tile])

    def attend(
        self, head: int, number: int, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Attention of unscaled queries (rows, dim_qk) over a head's columns of a tile.

        Returns
        -------
        out : Tensor, shape (rows, dim_v)
        lse : Tensor, shape (rows,)
        count : int
            Columns; without any the log-sum-exp is -inf.
        """
        heads, dim = self.strip.heads, self.strip.heads.key.shape[2]
        both = heads.both[self.owners[head]]
        first, count = self._begins[head][number], self.counts[head][number]
        near = self.near(number)
        pools = heads.tiling.pools(self.strip.tiles[number])
        before = near.stop - near.start + count
        if not before + pools:
            out = query.new_zeros((len(query), heads.value.shape[2]))
            return out, query.new_full((len(query),), -math.inf), 0
        columns = torch.cat(
            [
                both[near],
                both.index_select(0, self.numbers[first : first + count]),
                self.pools[:pools, head, number],
            ]
        )
        padded, zeros = self._padded
        out, lse = kernels.masked(
            query[None, None], columns[None, None, :, :dim], columns[None, None, :, dim:],
            heads.scale, padded[head, number, None, None, None, zeros - before : zeros + pools],
        )  # fmt: skip
        return out[0, 0], lse[0, 0], before + pools


# -- running -----------------------------------------------------------------------------------
def attend_tiles(
    heads: TiledHeads, taus: list[float], seed: int, out: torch.Tensor, lse: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Attend every whole tile, each head with the landmarks that its tau asks for.

    Parameters
    ----------
    out : Tensor, shape (heads, len_q, dim_v)
        Written.
    lse : Tensor, shape (heads, len_q)
        Written.

    Returns
    -------
    scores, columns : list of float
        Scores computed, and mean number of landmarks and pools, by head.
    """
    tiling, tile = heads.tiling, heads.tiling.structure.tile
    if tiling.causal:
        _own_keys(heads, out, lse)
    squares = tiling.count * tile * (tile + 1) // 2 if tiling.causal else 0
    scores, found = [float(squares)] * len(heads.query), [0.0] * len(heads.query)
    for strip in tiling.strips(len(heads.query)):
        columns = Strip.probe(heads, list(strip), seed).columns(taus)
        rows = slice(strip.start * tile, strip.stop * tile)
        far, far_lse = torch.empty_like(out[:, rows]), torch.empty_like(lse[:, rows])
        for head in range(len(heads.query)):
            for number, which in enumerate(strip):
                query = heads.query[head, tiling.rows(which)]
                part, part_lse, count = columns.attend(head, number, query)
                place = slice(number * tile, (number + 1) * tile)
                far[head, place], far_lse[head, place] = part, part_lse
                scores[head] += tile * count
                near = columns.near(number)
                found[head] += (count - near.stop + near.start) / tiling.count
        if tiling.causal:
            merge(out[:, rows], lse[:, rows], far, far_lse)
        else:
            out[:, rows], lse[:, rows] = far, far_lse
    return scores, found


def _own_keys(heads: TiledHeads, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Every tile's rows over its own keys, a causal square each."""
    tiling = heads.tiling
    tile, count = tiling.structure.tile, tiling.count
    first, last = tiling.own[0], tiling.own[0] + count * tile
    for owner, places in heads.shared:
        query = heads.query[places, : count * tile].unflatten(1, (count, tile))
        key, value = (
            x[owner, first:last].unflatten(0, (count, 1, tile)).expand(-1, len(query), -1, -1)
            for x in (heads.key, heads.value)
        )
        part, part_lse = kernels.squares(query.transpose(0, 1), key, value, heads.scale)
        out[places, : count * tile].unflatten(1, (count, tile)).copy_(part.transpose(0, 1))
        lse[places, : count * tile].unflatten(1, (count, tile)).copy_(part_lse.transpose(0, 1))


def attend_rest(heads: TiledHeads, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Exact attention of the rows that are computed densely, written in place."""
    tiling, rest = heads.tiling, heads.tiling.rest
    count, keys = rest.stop - rest.start, heads.key.shape[1]
    first = rest.start + tiling.geometry.offset if tiling.causal else keys
    for owner, places in heads.shared if count else ():
        query = heads.query[None, places, rest]
        mine, mine_lse = out[places, rest], lse[places, rest]

        def over(
            some: slice, causal: bool, query: torch.Tensor = query, owner: int = owner
        ) -> tuple[torch.Tensor, torch.Tensor]:
            key, value = (
                x[None, owner, None, some].expand(-1, query.shape[1], -1, -1)
                for x in (heads.key, heads.value)
            )
            attention = kernels.squares if causal else kernels.masked
            part, part_lse = attention(query, key, value, heads.scale)
            return part[0], part_lse[0]

        if tiling.causal:
            mine[...], mine_lse[...] = over(slice(first, first + count), True)
            if first:
                merge(mine, mine_lse, *over(slice(0, first), False))
        else:
            mine[...], mine_lse[...] = over(slice(0, first), False)
