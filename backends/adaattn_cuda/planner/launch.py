"""One adaptive call: what is made once, and its launches as one graph.

Nothing here waits for the device: the host enqueues the same launches whatever the data are,
and every kernel finds on the device whether there is something to do.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from adaattn_core.policies.table import DecisionTable
from adaattn_cuda.device import driver
from adaattn_cuda.device.graph import Graph
from adaattn_cuda.device.lanes import Step, start_in_lanes
from adaattn_cuda.device.launch import kernel_of, refuse_capture
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.planner.drawing import certifying_orders
from adaattn_cuda.planner.layout import kept_layout, scratch_layout
from adaattn_cuda.planner.narrow import Narrow
from adaattn_cuda.planner.params import FarArrays
from adaattn_cuda.planner.sequence import Packer
from adaattn_cuda.planner.specs import dense_tile, kernel_specs
from adaattn_cuda.recent import Recent
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import padded_dim
from adaattn_cuda.work.far import exact_work, far_tables
from adaattn_cuda.work.far_geometry import TILE, FarGeometry

__all__ = ["FarArrays", "FarLaunch"]

_LANDMARK_SHARE = 0.16
"""Room for landmarks over the keys, on average over groups and heads."""
_LANDMARK_ROWS_LEAST, _LANDMARK_BYTES_MOST = 2048, 6 << 30
"""Rows of a group that there is room for in any case; bytes of the buffer at most."""
_ADDRESSES_REMEMBERED = 16


_RECORDED: set[FarLaunch] = set()
"""Launches that callers have recorded in CUDA graphs of their own."""


class FarLaunch:
    """An adaptive call of one geometry, table, budget and seed.

    Parameters
    ----------
    g : FarGeometry
    dtype : {"bf16", "f16"}
    scale : float
    table : DecisionTable
        Candidate k is level k: landmarks that differ in tau alone.
    budget : ErrorBudget-like
        ``rel``, ``rows`` and ``confidence`` are used.
    seed : int
    device, stream : int
    decided : tuple of int, optional
        Candidate of every head, -1 for dense, where nothing is to be judged.
    narrow : Task, optional
        The whole problem as the 8-bit kernel takes it, where heads that would run exactly run
        so first.

    Raises
    ------
    UnsupportedError
        If `stream` records a CUDA graph: tables must be copied first.

    Notes
    -----
    The tables live as long as this object.
    """

    def __init__(
        self,
        g: FarGeometry,
        dtype: str,
        scale: float,
        table: DecisionTable,
        budget: Any,
        seed: int,
        device: int,
        stream: int,
        decided: tuple[int, ...] | None = None,
        narrow: Task | None = None,
    ) -> None:
        refuse_capture(stream, "copies its tables to the device")
        self.geometry, self.dtype, self.scale, self.device = g, dtype, scale, device
        self.table, self.decided = table, decided
        self.taus = [c.plan.structure.tau for c in table.candidates]  # type: ignore[attr-defined]
        self.levels = len(self.taus)
        facts = driver.device_facts(device)
        self.blocks = facts.multiprocessors
        self.judging = bool(self.levels) and decided is None
        self.tables = far_tables(
            g, self.levels if self.judging else 0, self.blocks, seed, given=decided is not None
        )
        self.tail = 1 if self.levels and g.causal else 0
        self.judges = len(self.tables.judge_tiles)
        rows = max(_LANDMARK_ROWS_LEAST, int(_LANDMARK_SHARE * g.len_kv)) // TILE * TILE
        most = _LANDMARK_BYTES_MOST // (2 * (g.dim_qk + g.dim_v))
        self.landmark_rows = min(g.heads * g.groups * min(rows, g.len_kv), most)
        self.narrow = Narrow(narrow, stream) if narrow else None
        self.proves = not self.levels and narrow is None
        orders = certifying_orders(g.drawn, budget, retried=not self.proves)
        assert orders is not None  # `refusal` sees to it
        self.orders = orders
        self.budget = budget
        self.kept = kept_layout(g)
        self.dense = dense_tile(padded_dim(g.dim_qk), padded_dim(g.dim_v))
        self.exact_tiles = -(-g.len_q // self.dense.tile_m)
        self.scratch = scratch_layout(
            g, self.tables, self.levels, self.landmark_rows, self.exact_tiles, self.blocks,
            self.narrow.room if self.narrow else None,
        )  # fmt: skip
        self.constants = self._upload()
        self.kernels = self._load(stream)
        self._ready: Recent[_Replay] = Recent(_ADDRESSES_REMEMBERED)

    # -- what is made once --------------------------------------------------------------------
    def _upload(self) -> dict[str, int]:
        t = self.tables
        parts: dict[str, bytes] = {
            "groups": t.groups.tobytes(),
            "sample_rows": t.sample_rows.tobytes(),
            "judge_tiles": t.judge_tiles.tobytes(),
            "judge_groups": t.judge_groups.tobytes(),
            "rest_groups": t.rest_groups.tobytes(),
            "pool_first": t.pool_first.tobytes(),
            "judge_pool_first": t.judge_pool_first.tobytes(),
            "drawn_rows": t.drawn_rows.tobytes(),
            "drawn_stops": t.drawn_stops.tobytes(),
            "exact": t.exact.tobytes(),
            "first_partial": t.first_partial.tobytes(),
        }
        if self.decided is not None:
            parts["decided"] = np.array(self.decided, np.int32).tobytes()
        if not self.levels:
            dense = self.narrow.tile if self.narrow else self.dense
            listed = exact_work(self.geometry, dense.tile_m, dense.tile_n, self.blocks)
            parts |= {
                "exact_each": t.exact_each.tobytes(),
                "narrow_items" if self.narrow else "exact_items": listed.items.tobytes(),
                "narrow_sources" if self.narrow else "exact_sources": listed.sources.tobytes(),
            }
        data, addresses = bytearray(), {}
        for name, body in parts.items():
            addresses[name] = len(data)
            data += body + bytes(-len(body) % 256 or 256)
        self._table = driver.DeviceTable(bytes(data), self.device)
        self.workspace_bytes = self._table.size_bytes
        self.workspace_bytes += self.narrow.size_bytes if self.narrow else 0
        return {name: self._table.address + offset for name, offset in addresses.items()}

    def _load(self, stream: int) -> dict[str, driver.Kernel]:
        g = self.geometry
        kernels = {}
        narrow = self.narrow.formats if self.narrow else None
        for name, (spec, threads) in kernel_specs(g, self.dtype, self.levels, narrow).items():
            kernels[name] = kernel_of(spec, threads, stream)
            kernels[name].prepare(self.device)
        return kernels

    # -- a call -------------------------------------------------------------------------------
    def start(self, arrays: FarArrays, kept: int, scratch: int, stream: int) -> None:
        """Enqueue everything; `kept` and `scratch` are addresses of the two allocations.

        From the second start with the same addresses on, one graph is replayed. Under a
        recording of the caller's this object, and so its tables, stays for good: nobody says
        when the caller's graph has run for the last time.
        """
        if self._replay(arrays, kept, scratch).start(stream):
            _RECORDED.add(self)

    def steps(self, arrays: FarArrays, kept: int, scratch: int) -> list[Step]:
        """Return the named launches for a set of addresses, packed once."""
        return self._replay(arrays, kept, scratch).steps

    def _replay(self, arrays: FarArrays, kept: int, scratch: int) -> _Replay:
        key = (
            arrays.query.pointer, arrays.key.pointer, arrays.value.pointer,
            arrays.out.pointer, arrays.lse.pointer, kept, scratch,
        )  # fmt: skip
        found = self._ready.get(key)
        if found is None:
            found = _Replay(Packer(self, arrays, kept, scratch).steps(), self.device)
            self._ready.put(key, found)
        return found


class _Replay:
    """The launches of one set of addresses; one graph from their second start on.

    One by one they run in their order; in the graph, lanes of them side by side.
    A caller that records a graph itself gets the launches, one by one.
    """

    def __init__(self, steps: list[Step], device: int) -> None:
        self.steps, self._device = steps, device
        self._started = False
        self._graph: Graph | None = None
        self._lock = threading.Lock()  # a launch carries its stream: one thread at a time

    def start(self, stream: int) -> bool:
        """Enqueue everything; return whether a recording of the caller's took it."""
        with self._lock:
            capturing = driver.is_capturing(stream)
            if capturing or not self._started:
                self._enqueue(stream)
                self._started |= not capturing
                return capturing
            if self._graph is None:
                self._graph = Graph(self._record, self._device)
            self._graph.start(stream)
            return False

    def _enqueue(self, stream: int) -> None:
        for step in self.steps:
            step.start(stream)

    def _record(self, stream: int) -> object:
        return start_in_lanes(self.steps, self._device, stream)
