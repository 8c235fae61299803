"""Launches that attend, decide and certify."""

from __future__ import annotations

import ctypes

from adaattn_cuda.device.lanes import Step
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.planner import params as p
from adaattn_cuda.planner.drawing import oracle_factors, theorem_factors
from adaattn_cuda.planner.layout import square_stride
from adaattn_cuda.planner.packing import Packing
from adaattn_cuda.planner.specs import (
    exact_tile,
)
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import padded_dim
from adaattn_cuda.work.far_geometry import TILE

__all__ = ["Computing"]


class Computing(Packing):
    """Attention of every kind of head, exact rows, decisions and certificates."""

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
