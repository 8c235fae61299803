"""Launches that measure heads and choose their far fields."""

from __future__ import annotations

from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.planner import params as p
from adaattn_cuda.planner.drawing import most_landmarks
from adaattn_cuda.planner.packing import BESIDE, Packing
from adaattn_cuda.planner.specs import (
    GATHER_KEYS,
    LIST_THREADS,
    pool_shape,
)
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import padded_dim
from adaattn_cuda.work.far import LEVELS_MAX, probe_splits
from adaattn_cuda.work.far_geometry import TILE

__all__ = ["Measuring"]

_JUDGED_STRETCHES = 8
"""Where a tile is judged, one item takes as many landmarks as this part of the keys, about what
all of them would be worth keeping for."""


class Measuring(Packing):
    """Drawn rows, norms, probes, selections, work lists, landmarks and pools."""

    def _copy(self, lane: int, *after: int) -> int:
        """Copy the drawn rows side by side, and measure them."""
        g, t = self.launch.geometry, self.launch.tables
        rows = t.drawn_rows.shape[1]
        blocks = max(1, g.heads * rows // 32)
        block = p.Prepare(sizes=self.sizes, query=self._rows(self.arrays.query))
        block.drawn, block.copy_blocks = rows, blocks
        self._set(block, "drawn_rows", "drawn_query", "norms", "query_norms")
        return self._add("copy", "prepare", block, blocks, lane, *after)

    def _norms(self, lane: int, *after: int) -> int:
        """Find the largest norms of keys and values; of queries where nothing is planned."""
        g = self.launch.geometry
        stretch = 256
        stretches = -(-g.len_kv // stretch)
        queries = self.launch.proves  # theorems speak about all rows
        if queries:
            stretches = max(stretches, -(-g.len_q // stretch))
        block = p.Prepare(sizes=self.sizes, stretches=stretches, stretch_rows=stretch)
        block.query, block.queries = self._rows(self.arrays.query), int(queries)
        block.arrays[0] = self._rows(self.arrays.value)
        block.arrays[1] = self._rows(self.arrays.key)
        self._set(block, "norms", "query_norms")
        grid = (2 * g.batch * g.heads_kv + (g.heads if queries else 0)) * stretches
        return self._add("norms", "prepare", block, grid, lane, *after)

    def _probe(self, kernel: str, listed: tuple[int, int], decision: int) -> None:
        g = self.launch.geometry
        block = sm90.aligned(p.Probe)
        block.sizes, block.query = self.sizes, self._rows(self.arrays.query)
        keys, splits = probe_splits(g, listed[1], self.launch.blocks)
        block.sizes.split_keys, block.sizes.splits = keys, splits
        block.group_list, block.listed = listed
        block.decision = decision
        sm90.encode_map(block.key_map, self.arrays.key, TILE, self.launch.dtype)
        self._set(
            block, "groups", "sample_rows", "partial", "partial_weighted", "lse_log2", "stats",
            "finished", "codes",
        )  # fmt: skip
        self._add(kernel, kernel, block, g.units * listed[1] * splits)

    def _select(self, listed: tuple[int, int], decision: int) -> None:
        g = self.launch.geometry
        block = p.Select(
            sizes=self.sizes, group_list=listed[0], listed=listed[1], decision=decision,
            tile_stride=g.tiles_per_group,
        )  # fmt: skip
        block.tau[:] = (*self.launch.taus, *([0.0] * (LEVELS_MAX - self.launch.levels)))
        self._set(block, "groups", "codes", "selections", "tile_counts")
        self._add("select", "select", block, g.heads * listed[1])

    def _work(self, kernel: str, slots: str, pool_first: str) -> int:
        g = self.launch.geometry
        block = p.Work(
            sizes=self.sizes, slots=self.at[slots], pool_first=self.at[pool_first],
            tile_stride=g.tiles_per_group, section_heads=g.section_heads,
            most_landmarks=most_landmarks(self.launch.table, self.launch.tables),
            judge_weights=self.launch.tables.judge_weights,
            parts=self.at.get("judge_parts", 0),
            part_tiles=-(-g.len_kv // (_JUDGED_STRETCHES * self.tile.tile_n)),
        )  # fmt: skip
        self._lists(
            block, "groups", "judge_tiles", "judge_groups", "selections", "decision", "kept"
        )
        block.tile_counts = self.at.get("tile_counts", 0)
        return self._add(kernel, kernel, block, 1)

    def _list(self, name: str, *after: int, landmarks: bool, lane: int = 0) -> int:
        """List the items of the heads that were ranked; of exact ones alone or of both."""
        launch, g = self.launch, self.launch.geometry
        threads = -(-g.heads * g.tiles // LIST_THREADS) * LIST_THREADS if landmarks else 0
        block = p.ListItems(
            sizes=self.sizes, tile_stride=g.tiles_per_group,
            tail=launch.tail, landmark_threads=threads,
        )  # fmt: skip
        self._lists(block, "groups", "pool_first", "kept", again=not landmarks)
        block.slots = self.at["landmarks"]
        block.tile_counts = self.at.get("tile_counts", 0)
        block.exact_threads = g.heads * block.exact.tiles
        threads += block.exact_threads + g.heads * block.narrow.tiles
        grid = -(-threads // LIST_THREADS)
        return self._add(name, "list", block, grid, lane, *after)

    def _nest(self, placed: int) -> int:
        """Copy the landmarks of the judged tiles, once for all levels."""
        g = self.launch.geometry
        block = p.Nest(
            sizes=self.sizes, key=self._rows(self.arrays.key),
            value=self._rows(self.arrays.value), slots=self.at["judge_slots"],
            tile_stride=g.tiles_per_group,
        )  # fmt: skip
        self._set(
            block, "groups", "judge_tiles", "codes", "selections", "tile_counts",
            "landmark_key", "landmark_value",
        )  # fmt: skip
        grid = g.heads * self.launch.judges * -(-g.len_kv // GATHER_KEYS)
        return self._add("nest", "nest", block, grid, BESIDE, placed)

    def _gather(self, slots: str, count: int, placed: int) -> int:
        g = self.launch.geometry
        block = p.Gather(
            sizes=self.sizes, key=self._rows(self.arrays.key),
            value=self._rows(self.arrays.value), slots=self.at[slots],
        )  # fmt: skip
        self._set(block, "groups", "codes", "selections", "landmark_key", "landmark_value")
        stretches = -(-g.len_kv // (GATHER_KEYS))
        return self._add("gather", "gather", block, count * stretches, BESIDE, placed)

    def _pool(self, slots: str, pool_first: str, slots_per_head: int) -> None:
        g = self.launch.geometry
        blocks = pool_shape(max(padded_dim(g.dim_qk), padded_dim(g.dim_v)))
        stretches = -(-(g.len_kv // 64) // blocks)
        block = p.Pool(
            sizes=self.sizes, key=self._rows(self.arrays.key),
            value=self._rows(self.arrays.value), slots=self.at[slots],
            pool_first=self.at[pool_first], slots_per_head=slots_per_head,
        )  # fmt: skip
        self._set(block, "groups", "codes", "selections", "pool_key", "pool_value", "pool_mass")
        self._add("pool", "pool", block, g.batch * g.heads_kv * stretches)

    def _fit(self, slots: str, pool_first: str, slots_per_head: int) -> None:
        g = self.launch.geometry
        splits = -(-(g.len_kv // 64) // 128)
        block = p.Fit(
            sizes=self.sizes, query=self._rows(self.arrays.query), slots=self.at[slots],
            pool_first=self.at[pool_first], chunk_heads=g.chunk_heads, splits=splits,
        )  # fmt: skip
        self._set(
            block,
            "groups",
            "sample_rows",
            "lse_log2",
            "pool_key",
            "pool_value",
            "pool_mass",
            "pool_bias",
        )
        self._add("fit", "fit", block, g.heads * slots_per_head * splits)
