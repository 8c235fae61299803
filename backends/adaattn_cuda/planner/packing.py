"""What all launches of an adaptive call are made of: addresses, sizes, work lists."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adaattn_cuda.device import driver
from adaattn_cuda.device.lanes import Step
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.planner import params as p
from adaattn_cuda.planner.layout import square_stride
from adaattn_cuda.planner.specs import attend_tile
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import Tile as NarrowTile
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import Tile, padded_dim
from adaattn_cuda.work.far_geometry import TILE

if TYPE_CHECKING:
    from adaattn_cuda.planner.launch import FarLaunch

__all__ = ["BESIDE", "DRAWN", "Packing"]

AnyTile = Tile | NarrowTile
DRAWN, BESIDE = 2, 1
"""Lanes beside the main one: exact rows, which the device takes up first, and what may wait."""


class Packing:
    """Parameter blocks of one set of addresses, and the steps so far."""

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

    @property
    def _pointers(self) -> tuple[int, ...]:
        a = self.arrays
        return tuple(x.pointer for x in (a.query, a.key, a.value, a.out, a.lse))

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


def _flat(pointer: int, rows: int, dim: int) -> sm90.DeviceMatrix:
    return sm90.DeviceMatrix(pointer, (1, 1, rows, dim), (rows * dim, rows * dim, dim))
