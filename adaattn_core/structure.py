"""Structures: which scores of a head are computed, and what stands for the rest.

From safest to cheapest: `Dense`, `ScoreSkip`, `LowRank`, `BlockSparse`, `Landmark`. A structure
is data; executors read it, policies choose it, `docs/math` bounds it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from adaattn_core.errors import ArgumentError, PlanError


@dataclass(frozen=True, slots=True)
class Structure:
    """Base class; `kind` is the name in tables, JSON and capabilities."""

    kind: ClassVar[str] = ""

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
    nearest to the rows and the first ones are visited first.

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
        _require(0 < self.lam < 1, f"lam={self.lam}", "a weight threshold in (0, 1)")
        _require(
            self.tile_q > 0 and self.tile_kv > 0,
            f"tiles {self.tile_q} x {self.tile_kv}",
            "positive tile sizes",
        )


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
        _require(self.rank >= 1, f"rank={self.rank}", "a rank of at least 1")


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
        Given mask: the kept key blocks of each query tile, increasing.
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
        _require(0 <= self.tau < 1, f"tau={self.tau}", "a dropped mass in [0, 1)")
        _require(
            min(self.tile_q, self.tile_kv, self.samples, self.group) > 0 and self.band >= 0,
            f"{self}",
            "positive sizes",
        )
        _require(
            self.group % self.tile_q == 0,
            f"group={self.group}, tile_q={self.tile_q}",
            "a group that is a whole number of query tiles",
        )


@dataclass(frozen=True, slots=True)
class Landmark(Structure):
    """Near field + landmark columns + pooled remainder.

    Attributes
    ----------
    tau : float
        Landmarks are the fewest far keys (in multiples of 64) that leave at most `tau` of the
        sampled mass unrepresented, on average over a group's clusters.
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
    tile : int
        Query rows that share one near field (a multiple of `pool`).
    screen_rank : int
        Rank of the score sketch that opens pools for heavy rows; 0 = no screen.
    screen_theta : float
        A pool is opened where the sketch says that one key holds more than this share of a row.
    tail : int
        Last rows of the sequence that are computed densely, rounded up to whole tiles: what a
        prompt's end retrieves, it retrieves exactly.
    """

    kind: ClassVar[str] = "landmark"
    tau: float = 0.05
    band: int = 256
    group: int = 1024
    clusters: int = 1
    samples: int = 32
    pool: int = 64
    tile: int = 64
    screen_rank: int = 16
    screen_theta: float = 0.02
    tail: int = 128

    def __post_init__(self) -> None:
        _require(0 <= self.tau < 1, f"tau={self.tau}", "an unrepresented mass in [0, 1)")
        _require(
            min(self.group, self.samples, self.tile) > 0
            and min(self.band, self.pool, self.tail) >= 0,
            f"{self}",
            "positive sizes",
        )
        step = self.pool or 1
        _require(
            self.group % self.tile == 0 and self.tile % step == 0 and self.band % step == 0,
            f"group={self.group}, tile={self.tile}, band={self.band}, pool={self.pool}",
            "group a multiple of tile; tile and band multiples of pool",
        )
        _require(
            self.clusters > 0
            and self.clusters & (self.clusters - 1) == 0
            and self.samples % self.clusters == 0,
            f"clusters={self.clusters}, samples={self.samples}",
            "clusters a power of 2, samples a multiple of it",
        )
        _require(
            self.screen_rank >= 0 and 0 < self.screen_theta < 1,
            f"screen_rank={self.screen_rank}, screen_theta={self.screen_theta}",
            "a rank of at least 0 and a share in (0, 1)",
        )


STRUCTURES: dict[str, type[Structure]] = {
    cls.kind: cls for cls in (Dense, ScoreSkip, LowRank, BlockSparse, Landmark)
}


def structure_from_json(body: dict[str, Any]) -> Structure:
    """Rebuild a structure from `Structure.to_json`.

    Raises
    ------
    PlanError
        If the kind or a field is unknown.
    """
    fields = dict(body)
    kind = fields.pop("kind", None)
    if kind not in STRUCTURES:
        raise PlanError(
            got=f"structure kind {kind!r}",
            needed=f"one of {', '.join(STRUCTURES)}",
            do="save the plan again with this version",
        )
    if fields.get("blocks") is not None:
        fields["blocks"] = tuple(tuple(int(b) for b in row) for row in fields["blocks"])
    try:
        return STRUCTURES[kind](**fields)
    except TypeError as error:
        raise PlanError(
            got=f"structure {kind} with fields {sorted(fields)}",
            needed=f"fields {[f.name for f in dataclasses.fields(STRUCTURES[kind])]}",
            do="save the plan again with this version",
        ) from error


def block_mask(blocks: Any) -> tuple[tuple[int, ...], ...]:
    """Turn a boolean (query tiles, key blocks) array into `BlockSparse.blocks`."""
    return tuple(tuple(int(j) for j in np.flatnonzero(row)) for row in np.asarray(blocks))


def _require(holds: bool, got: str, needed: str) -> None:
    if not holds:
        raise ArgumentError(
            got=got, needed=needed, do="see adaattn_core.structure for the ranges"
        )
