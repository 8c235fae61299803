"""Heads that attend to runs of their keys: which kernel takes them, and on which work list."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from adaattn_core.errors import UnsupportedError
from adaattn_core.problem import HeadIndex, SequenceSpan
from adaattn_core.structure import BlockSparse
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import Launch, kernel_of, upload
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.kernels.task import BlockHeads, Task
from adaattn_cuda.tuning.sm80_attn_fwd import Specialisation
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import listed, padded_dim
from adaattn_cuda.work.geometry import Geometry
from adaattn_cuda.work.records import WorkList
from adaattn_cuda.work.runs import (
    Runs,
    block_runs,
    computed_scores,
    is_complete,
    run_list,
    tile_keys,
    visible_scores,
)

__all__ = ["Kept", "ListedLaunch", "RunHeads", "launch"]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a head's plan left of it.

    Attributes
    ----------
    share : float
        Of the scores that its interval mask shows.
    rank : int
        Columns that stand for keys of the far field.
    complete : bool
        Whether nothing was left out.
    """

    share: float
    rank: int = 0
    complete: bool = False


class RunHeads:
    """Runs of every head of a task, for one height of the kernel's tile.

    Heads with the same blocks and lengths share theirs.
    """

    def __init__(self, task: Task, blocks: BlockHeads, tile_m: int) -> None:
        self.geometry = task.geometry
        self._spans = task.sequences
        self._made: dict[tuple[int, int, int], Runs] = {}
        self._kept: dict[int, Kept] = {}
        self._of: dict[HeadIndex, Runs] = {}
        for index, structure in blocks.of.items():
            span = task.sequences[index[0]]
            key = id(structure), span.len_q, span.len_kv
            if key not in self._made:
                self._made[key] = _runs(structure, self.geometry, span, tile_m)
            self._of[index] = self._made[key]

    def keys(self, tile_n: int) -> int:
        """Count the keys that tiles of `tile_n` multiply, over all heads."""
        return sum(tile_keys(runs, tile_n) for runs in self._of.values())

    def work(self, tile_n: int, blocks: int | None) -> WorkList:
        """List the work of all heads; see `run_list`."""
        every = ((self._spans[s], h, runs) for (s, h), runs in self._of.items())
        return run_list(self.geometry, every, tile_n, blocks)

    def kept(self, index: HeadIndex) -> Kept:
        """Return what is left of a head; counted when first asked for."""
        runs, span = self._of[index], self._spans[index[0]]
        found = self._kept.get(id(runs))
        if found is None:
            visible = visible_scores(self.geometry, span)
            share = computed_scores(runs, self.geometry, span) / visible if visible else 1.0
            found = Kept(share, complete=is_complete(runs, self.geometry, span))
            self._kept[id(runs)] = found
        return found


def _runs(structure: BlockSparse, geometry: Geometry, span: SequenceSpan, tile_m: int) -> Runs:
    assert structure.blocks is not None
    return block_runs(structure.blocks, structure, geometry, span, tile_m)


class Sm80Listed:
    """A work list on the sm80 family.

    Parameters
    ----------
    task : Task
    heads : RunHeads
        For tiles of as many rows as the specialisation has.
    chosen : Specialisation
    stream : int
        Where it will be started first.

    Raises
    ------
    UnsupportedError
        If the stream records a graph: kernel and work list must be on the device first.
    """

    scratch_bytes: tuple[int, ...] = ()

    def __init__(
        self, task: Task, heads: RunHeads, chosen: Specialisation, stream: int
    ) -> None:
        device = task.query.device
        spec = chosen.spec(driver.device_facts(device).arch)
        self.name, self.step_keys = spec.name, chosen.tile_n
        kernel = kernel_of(spec, chosen.threads, stream)
        kernel.prepare(device)
        self._work = upload(heads.work(chosen.tile_n, None), device, stream)
        self.workspace_bytes = self._work.size_bytes
        self._params = sm80.listed_params(task, self._work.items, self._work.sources)
        self._call = driver.Call(kernel, self._params, max(self._work.grid, 1))
        self._lock = threading.Lock()

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue it; the driver copies the parameters before the call returns."""
        if not self._work.grid:
            return
        with self._lock:
            sm80.place(self._params, pointers)
            self._call.to(stream).start(device)


class ListedLaunch:
    """Heads with given blocks, ready for arrays at any address."""

    scratch_bytes: tuple[int, ...] = ()

    def __init__(self, launch: Launch, heads: RunHeads) -> None:
        self._launch, self._heads = launch, heads
        self.name, self.step_keys = launch.name, launch.step_keys
        self.workspace_bytes = launch.workspace_bytes
        self.start = launch.start

    def kept(self, index: HeadIndex) -> Kept:
        """Return what the plan left of a head."""
        return self._heads.kept(index)


def launch(task: Task, blocks: BlockHeads, stream: int) -> ListedLaunch:
    """Choose kernel and tile, deal the work, copy it to the device.

    Raises
    ------
    UnsupportedError
        Under a softcap or sinks, in 8-bit formats, or while `stream` records a graph.
    """
    if task.rule:
        raise UnsupportedError(
            got="block_sparse under a softcap or sinks",
            needed="neither: only dense heads know score rules on the GPU",
            do='plan dense, or use backend="numpy"',
        )
    device = task.query.device
    facts = driver.device_facts(device)
    if sm90.refusal(task, facts.arch) is None:
        tiles = listed(padded_dim(task.query.shape[3]), padded_dim(task.value.shape[3]))
        heads = RunHeads(task, blocks, tiles[0][1].tile_m)
        tile = min(tiles, key=lambda rated: heads.keys(rated[1].tile_n) / rated[0])[1]
        work = upload(heads.work(tile.tile_n, facts.multiprocessors), device, stream)
        arrays = (task.query, task.key, task.value, task.out, task.lse)
        return ListedLaunch(sm90.Sm90Launch(tile, arrays, task.scale, work, stream), heads)
    chosen = sm80.specialisation(task, facts.arch, listed=True)
    heads = RunHeads(task, blocks, chosen.tile_m)
    return ListedLaunch(Sm80Listed(task, heads, chosen, stream), heads)
