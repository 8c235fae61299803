"""Structures: which scores of a head are computed, and what stands for the rest.

From safest to cheapest: `Dense`, `ScoreSkip`, `LowRank`, `BlockSparse`, `Landmark`. A structure
is data; executors read it, policies choose it, `docs/math` bounds it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from adaattn_core.checks import real, shown, whole
from adaattn_core.errors import AdaAttnError, ArgumentError, PlanError

POOL_MAX = 1 << 16
"""Most keys that one pooled column may stand for."""


@dataclass(frozen=True, slots=True)
class Structure:
    """Base class; `kind` is the name in tables, JSON and capabilities."""

    kind: ClassVar[str] = ""

    def _sizes(self, least: int, *names: str) -> None:
        """Check fields that are whole numbers, and keep them as ints."""
        for name in names:
            object.__setattr__(self, name, whole(name, getattr(self, name), least))

    def _share(self, name: str, *, zero: bool = False) -> None:
        """Check a field in (0, 1), or in [0, 1)."""
        value = real(name, getattr(self, name))
        _require(0 < value < 1 or (zero and value == 0), f"{name}={value}", "a share below 1")
        object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_json` inverts it."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": self.kind} | body


@dataclass(frozen=True, slots=True)
class Dense(Structure):
    """Every visible score."""

    kind: ClassVar[str] = "dense"


@dataclass(frozen=True, slots=True)
class ScoreSkip(Structure):
    """Every visible score, but softmax and P·V only for key tiles that can still matter.

    A tile is skipped for a query tile when every row's scores in it lie at least ``ln(1/lam)``
    below that row's log-sum-exp over the keys kept before. The dropped mass is at most ``lam``
    per skipped key, and no key of a larger weight is lost (docs/math, corollary 4.2). The tiles
    nearest to the rows and the first ones are visited first. Over pages a backend may look at
    the mean weight of a tile's keys instead: the same bound (theorem 11).

    Attributes
    ----------
    lam : float
        Weight threshold in (0, 1).
    tile_q, tile_kv : int
        Size of the tiles that are kept or skipped whole; ``tile_kv=1`` skips single keys, which
        pays where gathering columns is cheap.
    """

    kind: ClassVar[str] = "score_skip"
    lam: float = 1e-5
    tile_q: int = 64
    tile_kv: int = 64

    def __post_init__(self) -> None:
        self._share("lam")
        self._sizes(1, "tile_q", "tile_kv")


@dataclass(frozen=True, slots=True)
class LowRank(Structure):
    """Scores from the best rank-r factorisation of Q·Kᵀ in the feature dimension.

    Attributes
    ----------
    rank : int
        1 .. dim_qk; the residual norms enter the certificate (docs/math, theorem 6).
    """

    kind: ClassVar[str] = "low_rank"
    rank: int = 1

    def __post_init__(self) -> None:
        self._sizes(1, "rank")


@dataclass(frozen=True, slots=True)
class BlockSparse(Structure):
    """Whole key blocks kept or dropped per query tile.

    Attributes
    ----------
    tau : float
        Chosen blocks: the fewest whose dropped sampled mass stays below `tau`. Ignored where
        `blocks` is given.
    band : int
        Keys before (and, without a causal mask, after) the query tile that are always kept.
    tile_q, tile_kv : int
        Block size.
    samples : int
        Exactly computed query rows per group that vote for blocks.
    group : int
        Query rows that share one choice.
    blocks : tuple of tuple of int, optional
        Given mask: the kept key blocks of each query tile, increasing; counted from the first
        query and key of a sequence. Choosing and `band` play no part then.

    Notes
    -----
    A structure says what is computed, a `Mask` what may be seen: keys of blocks that are left
    out count as an error, which a sampled certificate measures and no theorem bounds.
    """

    kind: ClassVar[str] = "block_sparse"
    tau: float = 0.05
    band: int = 256
    tile_q: int = 128
    tile_kv: int = 64
    samples: int = 32
    group: int = 1024
    blocks: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        self._share("tau", zero=True)
        self._sizes(1, "tile_q", "tile_kv", "samples", "group")
        self._sizes(0, "band")
        if self.blocks is not None:
            object.__setattr__(self, "blocks", _checked_blocks(self.blocks))
        _require(
            self.group % self.tile_q == 0,
            f"group={self.group}, tile_q={self.tile_q}",
            "a group that is a whole number of query tiles",
        )

    @classmethod
    def from_mask(cls, blocks: Any, *, tile_q: int = 128, tile_kv: int = 64) -> BlockSparse:
        """Keep the key blocks that a boolean array says.

        Parameters
        ----------
        blocks : array_like of bool, shape (query tiles, key blocks)
            True = kept. For arrays per head see `Plan.block_sparse`.
        tile_q, tile_kv : int
            Queries per tile and keys per block.

        Raises
        ------
        ArgumentError
            If the array is not boolean or not two-dimensional, or a size is not positive.

        Examples
        --------
        >>> BlockSparse.from_mask([[True, False], [True, True]]).blocks
        ((0,), (0, 1))
        """
        return cls(tile_q=tile_q, tile_kv=tile_kv, group=tile_q, blocks=block_mask(blocks))

    def check_fits(self, len_q: int, len_kv: int) -> None:
        """Raise PlanError unless given blocks speak of every query tile, and of keys that are.

        Parameters
        ----------
        len_q, len_kv : int
            Rows and keys of the sequence, padding included.
        """
        if self.blocks is None:
            return
        tiles, blocks = -(-len_q // self.tile_q), -(-len_kv // self.tile_kv)
        last = max((row[-1] for row in self.blocks if row), default=-1)
        if len(self.blocks) != tiles or last >= blocks:
            raise PlanError(
                got=f"blocks of {len(self.blocks)} query tiles, the last key block {last}",
                needed=f"{tiles} query tiles of {self.tile_q} rows, key blocks below {blocks}",
                do="make the blocks from a (query tiles, key blocks) array of this problem",
            )


@dataclass(frozen=True, slots=True)
class Landmark(Structure):
    """Near field + landmark columns + pooled remainder.

    Attributes
    ----------
    tau : float
        Landmarks are the fewest far keys (in multiples of 64, or to the nearest step of a
        histogram of masses) that leave at most `tau` of the sampled mass unrepresented, on
        average over a group's clusters.
    band : int
        Keys before the query tile that are computed exactly (a multiple of `pool`).
    group : int
        Query rows that are probed together (a multiple of `tile`).
    clusters : int
        Clusters of like queries that a group's rows are split into (a power of 2; fewer where
        the group is short), each with landmarks and pools of its own.
    samples : int
        Exactly computed query rows per group that choose landmarks and pools (a multiple of
        `clusters`).
    pool : int
        Keys per pooled column; 0 drops the remainder.
    fitted : bool
        Whether a pool's bias is fitted, so that the sampled rows give it the mass that its keys
        have; else it is the logarithm of how many keys it stands for.
    tile : int
        Query rows that share one near field (a multiple of `pool`).
    screen_rank : int
        Rank of the score sketch that opens pools for heavy rows; 0 = no screen.
    screen_theta : float
        A pool is opened where the sketch says that one key holds more than this share of a row.
    tail : int
        Last rows of the sequence that are computed densely, rounded up to whole tiles where a
        backend needs that: what a prompt's end retrieves, it retrieves exactly.
    """

    kind: ClassVar[str] = "landmark"
    tau: float = 0.05
    band: int = 256
    group: int = 1024
    clusters: int = 1
    samples: int = 32
    pool: int = 64
    fitted: bool = True
    tile: int = 64
    screen_rank: int = 16
    screen_theta: float = 0.02
    tail: int = 128

    def __post_init__(self) -> None:
        self._share("tau", zero=True)
        self._share("screen_theta")
        self._sizes(1, "group", "clusters", "samples", "tile")
        self._sizes(0, "band", "pool", "screen_rank", "tail")
        _require(isinstance(self.fitted, bool), f"fitted={shown(self.fitted)}", "True or False")
        _require(self.pool <= POOL_MAX, f"pool={self.pool}", f"at most {POOL_MAX} keys a pool")
        step = self.pool or 1
        _require(
            self.group % self.tile == 0 and self.tile % step == 0 and self.band % step == 0,
            f"group={self.group}, tile={self.tile}, band={self.band}, pool={self.pool}",
            "group a multiple of tile; tile and band multiples of pool",
        )
        _require(
            self.clusters & (self.clusters - 1) == 0 and self.samples % self.clusters == 0,
            f"clusters={self.clusters}, samples={self.samples}",
            "clusters a power of 2, samples a multiple of it",
        )


STRUCTURES: dict[str, type[Structure]] = {
    cls.kind: cls for cls in (Dense, ScoreSkip, LowRank, BlockSparse, Landmark)
}


def structure_from_json(body: Any, *, partial: bool = False) -> Structure:
    """Rebuild a structure from `Structure.to_json`.

    Parameters
    ----------
    body : dict
    partial : bool
        Whether fields may be missing and then keep their defaults. A saved plan has them all.

    Raises
    ------
    PlanError
        If the kind is unknown, a field is unknown or missing, or a value is out of range.
    """
    fields = dict(body) if isinstance(body, Mapping) else {}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in STRUCTURES:
        raise PlanError(
            got=f"structure kind {shown(kind)}",
            needed=f"one of {', '.join(STRUCTURES)}",
            do="save the plan again with this version",
        )
    names = [f.name for f in dataclasses.fields(STRUCTURES[kind])]
    if not (set(fields) <= set(names) if partial else set(fields) == set(names)):
        raise PlanError(
            got=f"structure {kind} with fields {shown(sorted(map(str, fields)))}",
            needed=f"fields {names}",
            do="save the plan again with this version",
        )
    try:
        return STRUCTURES[kind](**fields)
    except AdaAttnError as error:
        raise PlanError(
            got=f"{kind} structure with {error.got}",
            needed=error.needed,
            do="correct the plan, or save it again",
        ) from error


def block_mask(blocks: Any) -> tuple[tuple[int, ...], ...]:
    """Turn a boolean (query tiles, key blocks) array into `BlockSparse.blocks`.

    Raises
    ------
    ArgumentError
        If the array is not boolean or has another number of axes.
    """
    array = np.asarray(blocks)
    if array.ndim != 2 or array.dtype != bool:
        raise ArgumentError(
            got=f"an array of {array.dtype} with shape {array.shape}",
            needed="a boolean array of shape (query tiles, key blocks)",
            do="compare it (array != 0) if its numbers stand for kept blocks",
        )
    return tuple(tuple(int(j) for j in np.flatnonzero(row)) for row in array)


def _checked_blocks(blocks: Any) -> tuple[tuple[int, ...], ...]:
    """Key blocks of every query tile as tuples of ints, which must increase."""
    if not isinstance(blocks, tuple | list) or not all(
        isinstance(row, tuple | list) for row in blocks
    ):
        raise ArgumentError(
            got=f"blocks of type {type(blocks).__name__}",
            needed="a tuple with one tuple of key block numbers for each query tile",
            do="use adaattn_core.structure.block_mask to make it from a boolean array",
        )
    rows = tuple(tuple(whole("block", number) for number in row) for row in blocks)
    for tile, row in enumerate(rows):
        _require(
            all(a < b for a, b in itertools.pairwise(row)),
            f"blocks {row[:8]}{'...' if len(row) > 8 else ''} of query tile {tile}",
            "block numbers that increase: each block once",
        )
    return rows


def _require(holds: bool, got: str, needed: str) -> None:
    if not holds:
        raise ArgumentError(
            got=got, needed=needed, do="see adaattn_core.structure for the ranges"
        )
