"""Tables of an adaptive call: groups, sampled rows, judged tiles, drawn rows.

Everything here depends on shapes and a seed alone, never on the data, so it is made once per
shape, copied to the device once, and a CUDA graph may hold it. The layouts are the twins of
``plan/far_field.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaattn_cuda.work.far_geometry import POOL_KEYS, TILE, FarGeometry
from adaattn_cuda.work.geometry import UNLIMITED
from adaattn_cuda.work.records import (
    ITEM,
    MASK_INTERVAL,
    NO_BIAS,
    NO_PARTIAL,
    ORIGINAL,
    SOURCE,
    WorkList,
    deal,
)

__all__ = [
    "GROUP",
    "SLOT",
    "FarTables",
    "exact_work",
    "far_tables",
]

LEVELS_MAX = 8
"""Landmark masses of a ladder: kLevelsMax."""
JUDGES_MAX = 2
"""Tiles of a head that judge the ladder: kJudgesMax."""
JUDGE_PARTS = 4
"""Items at most that share the landmarks of a judged tile: kJudgeParts."""
WIDE = -2
"""Decision of a dense head in 16 bits, where others run in 8 first: kWideLevel."""
_EXACT_BLOCKS = 0.75
"""Part of the multiprocessors that exact rows take, whole ones, while levels are judged."""
_EXACT_KEYS = 2048
"""Keys that one block sums for exact rows: the bound of their error grows with it."""
_PROBE_SPLITS, PROBE_SPLITS_MAX = 8, 32
"""Fewest and most blocks that share the keys of a group in a probe."""
_PROBE_KEYS_LEAST, _PROBES_EACH = 512, 1
"""Keys of a probing block at least; blocks of a probe that a multiprocessor is given."""
POOL_ALIGNMENT = 128
"""Slots of pools are whole key tiles, filled up with zeros: kSlotRows."""

GROUP = np.dtype([(n, "<i4") for n in ("tile_first", "tiles", "far_keys", "pool_first")])
SLOT = np.dtype([(n, "<i4") for n in ("head", "group", "level", "row_first")])


@dataclass(frozen=True, slots=True, eq=False)
class FarTables:
    """What is copied to the device, and the sums that costs are made of.

    Attributes
    ----------
    groups : ndarray of GROUP, shape (groups,)
    pool_rows : int
        Pools of a head.
    sample_rows : ndarray of int32, shape (groups, samples)
        Ascending.
    judge_tiles, judge_groups : ndarray of int32, shape (judges,)
    rest_groups : ndarray of int32
        Groups with a far field that no judged tile lies in.
    pool_first, judge_pool_first : ndarray of int32
        First pool row of every slot: (heads, groups) and (heads, judges, levels).
    judge_pool_rows : int
    drawn_rows, drawn_stops : ndarray of int32, shape (heads, rows)
        Rows that are computed exactly, and the keys that they see: those of the `front_tiles`,
        then those that certify; both ascending, the last one repeated to fill a tile.
    front_tiles : int
        Tiles of exact rows before those that certify: the judged ones, of which a causal head's
        first is its last tile; that one alone where nothing is judged.
    exact : WorkList
        Items of these rows, split over the keys.
    exact_each : ndarray of ITEM
        The same items, tile by tile.
    first_partial : ndarray of int32, shape (tiles of exact rows + 1,)
        First partial result of each tile.
    dense_tiles, near_tiles, far_tiles : float
        Key tiles of a dense head; of near fields and pools; query tiles with a far field.
    judge_weights : tuple of float
        Of the judged groups' landmarks in the mean over tiles with a far field: between the
        judged groups, and to none where no key is far, they are taken to grow linearly.
    """

    groups: NDArray[np.void]
    pool_rows: int
    sample_rows: NDArray[np.int32]
    judge_tiles: NDArray[np.int32]
    judge_groups: NDArray[np.int32]
    rest_groups: NDArray[np.int32]
    pool_first: NDArray[np.int32]
    judge_pool_first: NDArray[np.int32]
    judge_pool_rows: int
    drawn_rows: NDArray[np.int32]
    drawn_stops: NDArray[np.int32]
    front_tiles: int
    exact: WorkList
    exact_each: NDArray[np.void]
    first_partial: NDArray[np.int32]
    dense_tiles: float
    near_tiles: float
    far_tiles: float
    judge_weights: tuple[float, ...]


def far_tables(
    g: FarGeometry, levels: int, blocks: int, seed: int, *, given: bool = False
) -> FarTables:
    """Make the tables of a geometry.

    Parameters
    ----------
    g : FarGeometry
    levels : int
        Landmark masses that are judged, 0 .. LEVELS_MAX.
    blocks : int
        Multiprocessors of the device.
    seed : int
        Of the sampled and of the drawn rows, which are independent of each other.
    given : bool
        Whether a plan is given that may have landmarks, though nothing is judged.
    """
    groups = np.zeros(g.groups, GROUP)
    groups["tile_first"] = np.arange(g.groups) * g.tiles_per_group
    groups["tiles"] = np.minimum(g.tiles - groups["tile_first"], g.tiles_per_group)
    last = (groups["tile_first"] + groups["tiles"] - 1).astype(np.int64)
    groups["far_keys"] = g.near_first(last)
    pools = -(-(groups["far_keys"] // POOL_KEYS) // POOL_ALIGNMENT) * POOL_ALIGNMENT
    groups["pool_first"] = np.cumsum(pools) - pools
    pool_rows = int(pools.sum())
    judge_tiles, judge_groups = _judges(g, groups)
    listed = np.flatnonzero(groups["far_keys"]).astype(np.int32)
    judge_pools = np.repeat(pools[judge_groups], max(levels, 1))
    judge_first = (np.cumsum(judge_pools) - judge_pools)[None]
    judge_rows = int(judge_pools.sum())
    heads = np.arange(g.heads)[:, None]
    front = judge_tiles if levels else judge_tiles[: int(given and g.causal)]
    drawn = _exact_rows(g, front, seed)
    stops = g.visible(drawn.astype(np.int64)).astype(np.int32)
    exact, each, first_partial = _exact_work(g, stops, blocks, planned=bool(levels) or given)
    tile = np.arange(g.tiles, dtype=np.int64)
    first, stop = g.near_first(tile), g.near_stop(tile)
    near = -(-(stop - first) // TILE) + -(-(first // POOL_KEYS) // TILE)
    return FarTables(
        groups=groups,
        pool_rows=pool_rows,
        sample_rows=_sample_rows(g, seed),
        judge_tiles=judge_tiles,
        judge_groups=judge_groups,
        rest_groups=listed[~np.isin(listed, judge_groups)],
        pool_first=(heads * pool_rows + groups["pool_first"]).astype(np.int32),
        judge_pool_first=(heads * judge_rows + judge_first).astype(np.int32),
        judge_pool_rows=judge_rows,
        drawn_rows=drawn,
        drawn_stops=stops,
        front_tiles=len(front),
        exact=exact,
        exact_each=each,
        first_partial=first_partial,
        dense_tiles=float((-(-stop // TILE)).sum()),
        near_tiles=float(near.sum()),
        far_tiles=float((first > 0).sum()),
        judge_weights=_judge_weights(first[first > 0], groups["far_keys"][judge_groups]),
    )


def _judges(
    g: FarGeometry, groups: NDArray[np.void]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Choose the last tile, where a prompt ends, and one from a middle group."""
    last = len(groups) - 1
    middle = max(int(0.55 * len(groups)), 0)
    tiles = [g.tiles - 1]
    if middle != last and groups["far_keys"][middle]:
        tiles.append(int(groups["tile_first"][middle] + groups["tiles"][middle] // 2))
    chosen = np.array(tiles, np.int32)
    return chosen, (chosen // g.tiles_per_group).astype(np.int32)


def _judge_weights(far_keys: NDArray[np.int64], judged: NDArray[np.int32]) -> tuple[float, ...]:
    """Weights of what is known of the last and a middle group in the mean over tiles."""
    if not len(far_keys) or (judged == judged[0]).all():  # without a causal mask all are alike
        return (1.0 / len(judged),) * len(judged)
    known = np.concatenate([[0], judged[::-1]])
    hats = np.eye(len(known))[:, ::-1]
    return tuple(float(np.interp(far_keys, known, hats[j]).mean()) for j in range(len(judged)))


def _sample_rows(g: FarGeometry, seed: int) -> NDArray[np.int32]:
    """One row out of every stratum of a group, ascending; all groups alike but for chance."""
    rng = np.random.default_rng((seed, 1))
    first = np.arange(g.groups, dtype=np.int64)[:, None] * g.group
    rows = np.minimum(g.len_q - first, g.group)
    edges = rows * np.arange(g.samples + 1) // g.samples
    low, high = edges[:, :-1], np.maximum(edges[:, 1:], edges[:, :-1] + 1)
    picked = low + (rng.random(low.shape) * (high - low)).astype(np.int64)
    return np.asarray(first + np.minimum(picked, rows - 1), np.int32)


def _exact_rows(g: FarGeometry, judge_tiles: NDArray[np.int32], seed: int) -> NDArray[np.int32]:
    """Rows of the judged tiles, then independent uniform draws with replacement."""
    rng = np.random.default_rng((seed, 2))
    drawn = np.sort(rng.integers(0, g.len_q, (g.heads, g.drawn)), axis=1)
    drawn = np.pad(drawn, ((0, 0), (0, -g.drawn % TILE)), mode="edge")
    judged = np.minimum(judge_tiles[:, None] * TILE + np.arange(TILE), g.len_q - 1)
    judged = np.broadcast_to(judged.reshape(1, -1), (g.heads, judged.size))
    return np.concatenate([judged, drawn], axis=1).astype(np.int32)


def _exact_work(
    g: FarGeometry, stops: NDArray[np.int32], blocks: int, *, planned: bool
) -> tuple[WorkList, NDArray[np.void], NDArray[np.int32]]:
    """Items of the exact rows: every tile of them over stretches of keys, partial results.

    Returns them dealt to blocks, then one by one, and the first of every tile.

    Where landmarks may run some rows are an output, whose bits must not depend on how many
    heads there are: stretches of one length then.
    """
    tiles = stops.shape[1] // TILE
    last = stops.reshape(g.heads * tiles, TILE).max(axis=1)
    wanted = max(1, -(-blocks // (g.heads * tiles)))
    keys = min(max(TILE * 4, -(-g.len_kv // wanted // TILE) * TILE), _EXACT_KEYS)
    keys = _EXACT_KEYS if planned else keys
    splits = np.maximum(-(-last // keys), 1)
    first_partial = np.concatenate([[0], np.cumsum(splits)]).astype(np.int32)
    index = np.repeat(np.arange(len(last)), splits)
    split = np.arange(len(index)) - first_partial[index]
    head, tile = index // tiles, index % tiles
    items = np.zeros(len(index), ITEM)
    items["batch"], items["head"] = head // g.heads_q, head % g.heads_q
    items["row_first"] = tile * TILE
    items["rows"] = TILE
    items["first_source"] = items["partial"] = np.arange(len(index))
    items["sources"] = 1
    items["key_stop"] = g.len_kv
    items["start_offset"], items["stop_offset"] = -UNLIMITED, UNLIMITED
    items["heads"] = 1
    items["row_stops"] = index * TILE
    sources = np.zeros(len(index), SOURCE)
    sources["tensor"] = ORIGINAL
    sources["batch"] = items["batch"]
    sources["head"] = items["head"] // g.ratio
    sources["first_key"] = sources["position"] = split * keys
    sources["keys"] = np.clip(last[index] - split * keys, 1, keys)
    sources["mask"] = MASK_INTERVAL
    sources["first_bias"] = NO_BIAS
    items["tiles"] = -(-sources["keys"] // TILE)
    order = np.argsort(-items["tiles"], kind="stable")
    if planned:  # probes and what follows them run on the other multiprocessors meanwhile
        blocks = max(1, int(blocks * _EXACT_BLOCKS))
    columns = deal(items["tiles"][order] + 1.0, min(blocks, len(items)))
    dealt = np.zeros((max(len(c) for c in columns), len(columns)), ITEM)
    for block, column in enumerate(columns):
        dealt[: len(column), block] = items[order[column]]
    return WorkList(dealt, sources), items, first_partial


def probe_splits(g: FarGeometry, listed: int, blocks: int) -> tuple[int, int]:
    """Return the keys that one block probes of a group, and the blocks that share its keys.

    A few groups are split until every one of `blocks` multiprocessors has a block. More blocks
    cost more starts: 576 for 27 heads of 32k took 91 us where 144 take 60.

    Parameters
    ----------
    g : FarGeometry
    listed : int
        Groups that are probed together.
    blocks : int
        Multiprocessors of the device.
    """
    wanted = -(-_PROBES_EACH * blocks // (g.units * max(listed, 1)))
    splits = min(max(wanted, _PROBE_SPLITS), PROBE_SPLITS_MAX)
    keys = max(_PROBE_KEYS_LEAST, -(-g.len_kv // splits // TILE) * TILE)
    return keys, -(-g.len_kv // keys)


def exact_work(g: FarGeometry, tile_m: int, tile_n: int, blocks: int) -> WorkList:
    """List the items of all heads, computed exactly, dealt to as many blocks.

    Three rounds without rows end the list, of which blocks read.
    """
    tiles = -(-g.len_q // tile_m)
    index = np.tile(np.arange(tiles), g.heads)
    head = np.repeat(np.arange(g.heads), tiles)
    section = head // (g.ratio * g.section_heads)
    order = np.lexsort((head, -index, section))  # the last tile of a head is the longest
    index, head = index[order], head[order]
    row_first = index * tile_m
    seen = row_first + tile_m + g.offset if g.causal else g.len_kv
    keys = np.maximum(np.minimum(g.len_kv, seen), 1)
    items = np.zeros(len(head), ITEM)
    items["batch"], items["head"] = head // g.heads_q, head % g.heads_q
    items["row_first"], items["rows"] = row_first, np.minimum(tile_m, g.len_q - row_first)
    items["sources"] = items["heads"] = 1
    items["tiles"], items["partial"] = -(-keys // tile_n), NO_PARTIAL
    items["key_stop"], items["start_offset"] = g.len_kv, -UNLIMITED
    items["stop_offset"] = row_first + g.offset + 1 if g.causal else UNLIMITED
    sources = np.zeros(len(head), SOURCE)
    sources["tensor"], sources["batch"] = ORIGINAL, items["batch"]
    sources["head"], sources["keys"] = items["head"] // g.ratio, keys
    sources["mask"], sources["first_bias"] = MASK_INTERVAL, NO_BIAS
    items["first_source"] = np.arange(len(head))
    columns = deal(items["tiles"] + 1.0, blocks)
    dealt = np.zeros((max(len(c) for c in columns) + 3, blocks), ITEM)
    for block, column in enumerate(columns):
        dealt[: len(column), block] = items[column]
    return WorkList(dealt, sources)
