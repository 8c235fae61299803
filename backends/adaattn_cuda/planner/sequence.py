"""The launches of an adaptive call in order, with the addresses that they lack."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

from adaattn_cuda.device import driver
from adaattn_cuda.device.lanes import Step
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.planner import params as p
from adaattn_cuda.planner.drawing import most_landmarks, oracle_factors, theorem_factors
from adaattn_cuda.planner.layout import square_stride
from adaattn_cuda.planner.specs import (
    GATHER_KEYS,
    LIST_THREADS,
    attend_tile,
    exact_tile,
    pool_shape,
)
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import Tile as NarrowTile
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import Tile, padded_dim
from adaattn_cuda.work.far import LEVELS_MAX, TILE, probe_splits

if TYPE_CHECKING:
    from adaattn_cuda.planner.launch import FarLaunch

__all__ = ["Packer"]

AnyTile = Tile | NarrowTile
_DRAWN, _BESIDE = 2, 1
"""Lanes beside the main one: exact rows, which the device takes up first, and what may wait."""
_JUDGED_STRETCHES = 8
"""Where a tile is judged, one item takes as many landmarks as this part of the keys, about what
all of them would be worth keeping for."""


class Packer:
    """Parameter blocks of one set of addresses."""

    def __init__(self, launch: FarLaunch, arrays: p.FarArrays, kept: int, scratch: int) -> None:
        self.launch, self.arrays = launch, arrays
        self.at = {
            **launch.constants,
            **launch.kept.at(kept),
            **launch.scratch.at(scratch),
        }
        self.log2 = launch.scale * math.log2(math.e)
        self.sizes = p.sizes_of(
            launch.geometry, launch.levels, launch.judges, launch.tables.pool_rows, self.log2,
            launch.landmark_rows,
        )  # fmt: skip
        g = launch.geometry
        self.tile = attend_tile(padded_dim(g.dim_qk), padded_dim(g.dim_v))
        self.out: list[Step] = []

    def steps(self) -> list[Step]:
        """Return the launches, in order; each takes the stream to be enqueued on."""
        launch = self.launch
        zero = self._zero()
        if launch.proves:  # nothing is planned, and there is no safer plan to escalate to
            copied = self._copy(_BESIDE, zero)
            norms = self._norms(_BESIDE)
            self._attend_exact("attend_exact")
            self._prove(copied, norms)
            self._exact(0)  # and what follows: only if some head was not proved
            self._certify(second=False)
            return self.out
        self._copy(_DRAWN, zero)
        exact = self._exact(_DRAWN)
        norms = self._norms(_BESIDE, zero)
        if not launch.levels:
            self._quantise(0)
            self._attend_narrow()
            self._certify(exact, norms, second=False)
            self._escalate()
            return self.out
        self._probe_judged()
        if launch.decided is None:
            self._judge(exact)
        else:
            self._decided()
        listed, gathered = self._plan()
        # Exact heads are longer: the others fill up the end of their launch.
        last = len(self.out) - 1
        if launch.narrow:
            self._quantise(self.at["decision"], _DRAWN, last)
            last = self._attend_narrow(_DRAWN)
        dense = self._attend_exact("attend_exact", _DRAWN, last)
        self._attend("attend", None, None, listed, gathered)
        self._certify(dense, norms, second=False)
        self._escalate()
        return self.out

    def _escalate(self) -> None:
        """Run heads exactly that missed the budget, and certify them again."""
        self._list("list_again", landmarks=False)
        self._attend_exact("escalate")
        self._certify(second=True)

    def _probe_judged(self) -> None:
        """Measure the groups of the judged tiles, of every head."""
        judged = (self.at["judge_groups"], self.launch.judges)
        self._probe("probe_stats", judged, 0)
        self._probe("probe_mass", judged, 0)
        self._select(judged, 0)

    def _decided(self) -> None:
        """Take a plan that is given."""
        to, source = self.at["decision"], self.at["decided"]
        size = 4 * self.launch.geometry.heads

        def step(stream: int) -> None:
            driver.copy_on_device(to, source, size, stream)

        self.out.append(Step("decided", step))

    def _judge(self, exact: int) -> None:
        """Judge every level, and decide for every head."""
        launch = self.launch
        placed = self._work("work_judge", "judge_slots", "judge_pool_first")
        gathered = self._nest(placed)
        self._pool("judge_slots", "judge_pool_first", launch.judges * launch.levels)
        self._fit("judge_slots", "judge_pool_first", launch.judges * launch.levels)
        self._attend("judge", "judge_out", "judge_lse", gathered)
        self._decide(exact)

    def _plan(self) -> tuple[int, int]:
        """Choose landmarks and pools of the other groups; list the work of every head.

        Returns the steps that list and gather.
        """
        g, t = self.launch.geometry, self.launch.tables
        if len(t.rest_groups):
            rest = (self.at["rest_groups"], len(t.rest_groups))
            self._probe("probe_lse", rest, self.at["decision"])
            self._probe("probe_mass", rest, self.at["decision"])
            self._select(rest, self.at["decision"])
        placed = self._work("work_attend", "landmarks", "pool_first")
        listed = self._list("list", placed, landmarks=True, lane=_DRAWN)
        gathered = self._gather("landmarks", g.heads * g.groups, placed)
        self._pool("landmarks", "pool_first", g.groups)
        self._fit("landmarks", "pool_first", g.groups)
        return listed, gathered

    # -- helpers ------------------------------------------------------------------------------
    def _add(
        self, name: str, kernel: str, block: Any, grid: int, lane: int = 0, *after: int
    ) -> int:
        """Append a launch; return its position."""
        call = driver.Call(self.launch.kernels[kernel], block, grid)
        device = self.launch.device

        def step(stream: int) -> None:
            call.to(stream).start(device)

        self.out.append(Step(name, step, lane, after))
        return len(self.out) - 1

    def _zero(self) -> int:
        first, size = self.at["finished"], self.at["zero_end"] - self.at["finished"]

        def step(stream: int) -> None:
            driver.fill_words(first, 0, size // 4, stream)

        self.out.append(Step("zero", step))
        return len(self.out) - 1

    def _rows(self, matrix: sm90.DeviceMatrix) -> p.Rows:
        batch, head, row = matrix.strides
        return p.Rows(matrix.pointer, row, head, batch)

    def _set(self, block: Any, *names: str) -> None:
        for name in names:
            setattr(block, name, self.at[name])

    # -- the launches -------------------------------------------------------------------------
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

    def _lists(self, block: Any, *names: str, again: bool = False) -> None:
        """Set the work lists of a block; that of heads in 8 bits unless heads run `again`."""
        g, launch = self.launch.geometry, self.launch
        if launch.levels:
            tiles = g.tiles - launch.tail
            block.landmarks = self._work_list("landmark", self.tile, tiles, 0)
        narrow = launch.narrow
        if narrow and not again:
            tiles = narrow.room[0]
            block.narrow = self._work_list("narrow", narrow.tile, tiles, launch.blocks)
        block.exact = self._exact_list()
        self._set(block, *names)

    def _work_list(self, stem: str, tile: AnyTile, tiles: int, blocks: int) -> p.List:
        parts = (self.at[f"{stem}_{name}"] for name in ("items", "sources", "queue", "places"))
        return p.List(*parts, tile.tile_m, tile.tile_n, tiles, blocks)

    def _exact_list(self) -> p.List:
        own = self.launch
        return self._work_list("exact", own.dense, own.exact_tiles, own.blocks)

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
        return self._add("nest", "nest", block, grid, _BESIDE, placed)

    def _gather(self, slots: str, count: int, placed: int) -> int:
        g = self.launch.geometry
        block = p.Gather(
            sizes=self.sizes, key=self._rows(self.arrays.key),
            value=self._rows(self.arrays.value), slots=self.at[slots],
        )  # fmt: skip
        self._set(block, "groups", "codes", "selections", "landmark_key", "landmark_value")
        stretches = -(-g.len_kv // (GATHER_KEYS))
        return self._add("gather", "gather", block, count * stretches, _BESIDE, placed)

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

    def _attention(self, query: sm90.DeviceMatrix, tile: Tile) -> sm90.Params:
        launch, a = self.launch, self.arrays
        g, t = launch.geometry, launch.tables
        keys, values = [a.key], [a.value]
        if launch.levels:
            pools = g.heads * max(t.pool_rows, t.judge_pool_rows) + TILE
            for stem, rows in (("landmark", launch.landmark_rows), ("pool", pools)):
                keys.append(_flat(self.at[f"{stem}_key"], rows, g.dim_qk))
                values.append(_flat(self.at[f"{stem}_value"], rows, g.dim_v))
        block = sm90.pack_arrays(
            tile, launch.dtype, query, keys, values, a.out, a.lse, launch.scale
        )
        block.bias = self.at.get("pool_bias", 0)
        return block

    def _attend(
        self, name: str, partial_out: str | None, partial_lse: str | None, *after: int
    ) -> int:
        block = self._attention(self.arrays.query, self.tile)
        if partial_out is not None and partial_lse is not None:
            block.partial_out, block.partial_lse = self.at[partial_out], self.at[partial_lse]
        self._take_from(block, "landmark")
        return self._add(name, "attend", block, self.launch.blocks, 0, *after)

    def _attend_exact(self, name: str, lane: int = 0, *after: int) -> int:
        block = self._attention(self.arrays.query, self.launch.dense)
        self._take_from(block, "exact")
        return self._add(name, "attend_exact", block, self.launch.blocks, lane, *after)

    @property
    def _pointers(self) -> tuple[int, ...]:
        a = self.arrays
        return tuple(x.pointer for x in (a.query, a.key, a.value, a.out, a.lse))

    def _quantise(self, decision: int, lane: int = 0, *after: int) -> None:
        """Make codes of the heads that are exact: of all where there is no `decision`."""
        launch, at = self.launch, self.at
        assert launch.narrow is not None
        calls = launch.narrow.quantise(
            self._pointers, at["narrow_codes"], at["narrow_scales"], decision
        )
        device = launch.device

        def step(stream: int) -> None:
            for call in calls:
                call.to(stream).start(device)

        self.out.append(Step("quantise", step, lane, after))

    def _attend_narrow(self, lane: int = 0) -> int:
        launch, at = self.launch, self.at
        assert launch.narrow is not None
        block = launch.narrow.attention(self._pointers, at["narrow_codes"], at["narrow_scales"])
        self._take_from(block.attention, "narrow")
        return self._add("attend_narrow", "attend_narrow", block, launch.blocks, lane)

    def _take_from(self, block: sm90.Params, stem: str) -> None:
        """Have an attention take the items of a list: landmark heads' from a queue."""
        g = self.launch.geometry
        block.items, block.sources = self.at[f"{stem}_items"], self.at[f"{stem}_sources"]
        if stem == "landmark":
            block.queue = self.at["landmark_queue"]
        block.squares = self.at["squares"]
        block.squares_head = square_stride(g)
        block.squares_batch = g.heads_q * block.squares_head
        block.rounds = 2**31 - 1

    def _exact(self, lane: int, *after: int) -> int:
        """Compute the drawn rows exactly, split over the keys, and join the splits."""
        launch = self.launch
        g, t = launch.geometry, launch.tables
        padded = t.drawn_rows.shape[1]
        drawn = sm90.DeviceMatrix(
            self.at["drawn_query"],
            (g.batch, g.heads_q, padded, g.dim_qk),
            (g.heads_q * padded * g.dim_qk, padded * g.dim_qk, g.dim_qk),
        )
        tile = exact_tile(padded_dim(g.dim_qk), padded_dim(g.dim_v))
        block = self._attention(drawn, tile)
        block.items, block.sources = t.exact.addresses(self.at["exact"])
        block.rounds = t.exact.rounds
        block.row_stops = self.at["drawn_stops"]
        asked = launch.proves  # only rows of heads that no theorem serves
        if asked:
            block.items, block.queue = self.at["asked_items"], self.at["asked_queue"]
            block.rounds = 2**31 - 1
        block.partial_out, block.partial_lse = self.at["exact_out"], self.at["exact_lse"]
        self._add("exact", "exact", block, t.exact.grid, lane, *after)
        tiles = t.drawn_rows.size // TILE
        merged = p.Merge(
            tiles=tiles, dim_v=g.dim_v, head_tiles=padded // TILE, heads_q=g.heads_q,
            len_q=g.len_q, square_stride=square_stride(g), out=self._rows(self.arrays.out),
            lse=self._rows(self.arrays.lse),
            tail_first=(g.tiles - 1) * TILE if launch.tail else -1,
            failed=self.at["failed"] if asked else 0,
        )  # fmt: skip
        merged.partial_out, merged.partial_lse = self.at["exact_out"], self.at["exact_lse"]
        merged.exact = self.at["exact_rows"]
        self._set(merged, "first_partial", "squares")
        return self._add("merge", "merge", merged, tiles * TILE // 16, lane)

    def _decide(self, *after: int) -> int:
        launch = self.launch
        g, t = launch.geometry, launch.tables
        rows = launch.judges * TILE
        spare = round(rows * (g.drawn - launch.orders[0]) / g.drawn)
        block = p.Decide(
            sizes=self.sizes, slots=self.at["judge_slots"], exact=self.at["exact_rows"],
            exact_stride=t.drawn_rows.shape[1], finished=self.at["judged"],
            parts=self.at["judge_parts"], partial_out=self.at["judge_out"],
            partial_lse=self.at["judge_lse"], verdicts=self.at["decisions"],
            dense_tiles=t.dense_tiles, near_tiles=t.near_tiles, far_tiles=t.far_tiles,
            spare_rows=spare, chunk_heads=g.chunk_heads, judge_weights=t.judge_weights,
            narrow_entropy=launch.table.narrow_entropy if launch.narrow else 0.0,
        )  # fmt: skip
        ctypes.memmove(block.table, launch.table.record.tobytes(), len(block.table))
        self._set(
            block, "groups", "judge_tiles", "judge_groups", "selections", "stats",
            "sample_rows", "decision", "errors",
        )  # fmt: skip
        return self._add("decide", "decide", block, g.heads * launch.levels, 0, *after)

    def _prove(self, *after: int) -> None:
        """Certify heads by theorem; those it says too little of are left to drawn rows."""
        launch = self.launch
        g = launch.geometry
        value, score, lost = theorem_factors(g, launch.dtype, launch.scale)
        block = p.Prove(
            sizes=self.sizes, verdicts=self.at["certificates"], budget=launch.budget.rel,
            value_factor=value, score_factor=score, lost=lost, square_stride=square_stride(g),
            head_tiles=launch.tables.drawn_rows.shape[1] // TILE,
            items=self.at["exact_each"], first_item=self.at["first_partial"],
            asked=self.at["asked_items"], queue=self.at["asked_queue"],
        )  # fmt: skip
        self._set(block, "squares", "norms", "query_norms", "failed")
        self._add("prove", "prove", block, g.heads, 0, *after)

    def _certify(self, *after: int, second: bool) -> None:
        launch = self.launch
        g, t, budget = launch.geometry, launch.tables, launch.budget
        first = t.front_tiles * TILE
        sums, scores = oracle_factors(g, t.exact.sources["keys"].max(), launch.scale)
        block = p.Certify(
            sizes=self.sizes, out=self._rows(self.arrays.out), budget=budget.rel,
            exact=self.at["exact_rows"], verdicts=self.at["certificates"],
            sum_factor=sums, score_factor=scores, drawn=g.drawn,
            drawn_stride=t.drawn_rows.shape[1], drawn_first=first,
            square_stride=square_stride(g), order=launch.orders[second], second=int(second),
            section_heads=g.section_heads, finished=self.at["certified"],
            unproved=int(launch.proves),
        )  # fmt: skip
        if not launch.proves and not second:
            block.again = self._exact_list()
        self._set(block, "drawn_rows", "squares", "norms", "query_norms", "failed")
        name = "certify_again" if second else "certify"
        self._add(name, "certify", block, g.heads, 0, *after)


def _flat(pointer: int, rows: int, dim: int) -> sm90.DeviceMatrix:
    return sm90.DeviceMatrix(pointer, (1, 1, rows, dim), (rows * dim, rows * dim, dim))
