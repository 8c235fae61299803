"""Structures that look at the data before they run: chosen key blocks, landmarks and pools.

By a plan that the host holds, on any GPU: sampled rows are computed exactly on the device, the
host reads what they saw and chooses, and the device gathers, pools and attends. Budgets on
Hopper are planned without the host instead (`adaattn_cuda.adaptive`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adaattn_core.choosing import Fields, block_groups, choose_blocks, probe_draws
from adaattn_core.errors import UnsupportedError
from adaattn_core.problem import HeadIndex
from adaattn_core.structure import BlockSparse, Landmark
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import start_once, upload
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.kernels import smxx_probe as kernels
from adaattn_cuda.kernels.listed import Kept
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.planner.specs import attend_tile
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import padded_dim
from adaattn_cuda.work.choosing import Far, choose_far, fields_of, row_intervals
from adaattn_cuda.work.fields import FarHead, far_list
from adaattn_cuda.work.runs import visible_scores

__all__ = ["FarRun", "chosen_blocks", "landmarks_refusal", "run_landmarks"]

_MASS_BYTES_MOST = 1 << 28
"""Sampled masses that are on the device at once; heads beyond that come later."""
_ROWS = 128
"""Landmarks and pools of a group are filled up with zeros to a multiple of this: key tiles."""


def _refuse_recording(stream: int) -> None:
    if driver.is_capturing(stream):
        raise UnsupportedError(
            got="chosen blocks or landmarks during a CUDA-graph capture",
            needed="nothing that the host has to read: dense heads, or given blocks",
            do="capture with a sampled budget instead, which the device plans by itself",
        )


# --- key blocks ------------------------------------------------------------------------------
def chosen_blocks(
    task: Task,
    structures: Mapping[HeadIndex, BlockSparse],
    seed: int,
    allocate: kernels.Allocate,
    stream: int,
) -> tuple[dict[HeadIndex, BlockSparse], set[HeadIndex]]:
    """Choose the key blocks of heads whose plans say how, not which.

    Returns
    -------
    given : dict of (sequence, head) to BlockSparse
        The same structures with `blocks`.
    odd : set of (sequence, head)
        Heads whose sampled rows saw NaN or Inf: nothing can be chosen.
    """
    if structures:
        _refuse_recording(stream)
    given: dict[HeadIndex, BlockSparse] = {}
    odd: set[HeadIndex] = set()
    for part in _parts(structures, task, lambda structure: structure.group):
        groups = {
            i: block_groups(structures[i], task.sequences[i[0]].len_q, seed) for i in part
        }
        asked = [
            kernels.Asked(task.sequences[i[0]], i[1], task.sequences[i[0]].len_kv, rows)
            for i in part
            for _, rows in groups[i]
        ]
        if not asked:
            given |= {i: replace(structures[i], blocks=()) for i in part}
            continue
        found = kernels.ask(task, asked, allocate, stream)
        number = 0
        for index in part:
            own = slice(number, number + len(groups[index]))
            number = own.stop
            span = task.sequences[index[0]]
            if np.isnan(found.lse[own]).any():
                odd.add(index)
                continue
            parts, seen = [g for g, _ in groups[index]], row_intervals(task.geometry, span)
            masses = list(found.mass[own])
            blocks = choose_blocks(structures[index], parts, masses, *seen, span.len_kv)
            given[index] = replace(structures[index], blocks=blocks)
    return given, odd


def _parts(
    structures: Mapping[HeadIndex, Any], task: Task, group: Any
) -> list[list[HeadIndex]]:
    """Cut heads into lists whose sampled masses have room."""
    parts: list[list[HeadIndex]] = []
    room = 0
    for index, structure in structures.items():
        groups = -(-task.query.shape[2] // group(structure))
        size = 4 * groups * (task.key.shape[2] + 64)
        if not parts or size > room:
            parts.append([])
            room = _MASS_BYTES_MOST
        parts[-1].append(index)
        room -= size
    return parts


# --- landmarks -------------------------------------------------------------------------------
def landmarks_refusal(structure: Landmark, fields: Fields | None) -> str | None:
    """Why a landmark structure is not run here, or None."""
    if fields is None:
        return "the landmark structure under a window"
    if structure.clusters != 1:
        return f"landmarks of {structure.clusters} clusters of queries"
    if structure.screen_rank and structure.pool:
        return f"landmarks with a screen of rank {structure.screen_rank}"
    return None


@dataclass(eq=False)
class FarRun:
    """Landmark heads that were started, and what to say of them.

    Attributes
    ----------
    name : str
        Of the attention kernel.
    step_keys, workspace_bytes : int
    """

    scratch_bytes: ClassVar[tuple[int, ...]] = ()
    name: str
    step_keys: int
    workspace_bytes: int
    _task: Task
    _heads: dict[HeadIndex, FarHead]

    def heads(self) -> tuple[HeadIndex, ...]:
        """Return what ran."""
        return tuple(self._heads)

    def kept(self, index: HeadIndex) -> Kept:
        """Return what the plan left of a head."""
        head, geometry = self._heads[index], self._task.geometry
        visible = visible_scores(geometry, head.span)
        share = head.computed(geometry) / visible if visible else 1.0
        return Kept(share, head.rank(), head.is_complete(geometry))


def run_landmarks(
    task: Task,
    structures: Mapping[HeadIndex, Landmark],
    seed: int,
    allocate: kernels.Allocate,
    stream: int,
) -> tuple[list[FarRun], set[HeadIndex]]:
    """Run landmark heads; also return those whose sampled rows saw NaN or Inf: left out.

    Raises
    ------
    UnsupportedError
        If a structure or the mask is not one for landmarks, or `stream` records a CUDA graph.
    """
    every: dict[HeadIndex, Fields] = {}
    for index, structure in structures.items():
        fields = fields_of(structure, task.geometry, task.sequences[index[0]])
        reason = landmarks_refusal(structure, fields)
        if task.allowed is not None or task.bias is not None:
            reason = "the landmark structure under a boolean or additive mask"
        if task.rule:
            reason = "the landmark structure under a softcap or sinks"
        if reason is not None or fields is None:
            raise UnsupportedError(
                got=str(reason),
                needed="clusters=1 and screen_rank=0, a causal or full mask (key lengths and"
                " ragged batches included), no softcap and no sinks",
                do='use block_sparse or dense for this head, or backend="numpy"',
                structure="landmark",
            )
        every[index] = fields
    if every:
        _refuse_recording(stream)
    runs: list[FarRun] = []
    odd: set[HeadIndex] = set()
    for part in _parts(structures, task, lambda structure: structure.group):
        # Pools of one size are made together, and as one kind of mask has them.
        kinds = {i: (structures[i].pool, structures[i].fitted, every[i].causal) for i in part}
        for kind in sorted(set(kinds.values())):
            own = {i: every[i] for i in part if kinds[i] == kind}
            run, lost = _run_part(task, own, seed, allocate, stream)
            odd |= lost
            if run is not None:
                runs.append(run)
    return runs, odd


def _run_part(
    task: Task,
    fields: Mapping[HeadIndex, Fields],
    seed: int,
    allocate: kernels.Allocate,
    stream: int,
) -> tuple[FarRun | None, set[HeadIndex]]:
    asked, owner = [], []
    for index, own in fields.items():
        for group in own.groups():
            size = group.stop - group.start
            rows = group.start + probe_draws(own.structure, group, 1, size, seed)[0]
            near = own.near_of_rows(rows)
            span = task.sequences[index[0]]
            asked.append(kernels.Asked(span, index[1], own.keys_of(group), rows, *near))
            owner.append(index)
    odd: set[HeadIndex] = set()
    fars: list[Far] = []
    masses = kernels.ask(task, asked, allocate, stream) if asked else None
    for number, (one, index) in enumerate(zip(asked, owner, strict=True)):
        assert masses is not None
        mass = masses.mass[number, : one.keys]
        if np.isnan(masses.lse[number]).any():
            odd.add(index)
            mass = np.zeros_like(mass)
        fars.append(choose_far(fields[index].structure, mass))
    keep: list[Any] = []  # until everything is enqueued; then the caller's library has it back
    landmark_first = _places([len(far.landmarks) for far in fars])
    pool_first = _places([len(far.filled) for far in fars])
    heads: dict[HeadIndex, FarHead] = {}
    done = 0
    for index, own in fields.items():
        part = slice(done, done + len(own.groups()))
        done = part.stop
        if index not in odd:
            heads[index] = FarHead(
                task.sequences[index[0]], index[1], own, tuple(fars[part]),
                tuple(landmark_first[part]), tuple(pool_first[part]),
            )  # fmt: skip
    if not heads:
        return None, odd
    size = task.key.item_bytes
    further: list[tuple[int, int, int]] = []
    for room in (landmark_first[-1], pool_first[-1]):
        # One tile more: a copy of a tile that begins on a buffer's last row ends within it.
        arrays = [allocate((room + _ROWS) * dim * size) for dim in _dims(task)]
        keep.append(arrays)
        further.append((room + _ROWS, arrays[0][1], arrays[1][1]))
    if masses is not None:
        keep.append(_gather(task, asked, fars, landmark_first, further[0], stream))
        bias = _pool(
            task, asked, fars, pool_first, further[1], masses, fields, allocate, stream
        )
        keep.append(bias)
        bias_at = bias[0][1]
    else:
        bias_at = 0
    name, step, attended = _attend(
        task, list(heads.values()), further, bias_at, allocate, stream
    )
    keep.append(attended)
    table_bytes = sum(rows for rows, *_ in further) * sum(_dims(task)) * size
    return FarRun(name, step, table_bytes, task, heads), odd


def _dims(task: Task) -> tuple[int, int]:
    return task.key.shape[3], task.value.shape[3]


def _places(counts: list[int]) -> list[int]:
    """First row of each group's, and behind them how many rows there are."""
    padded = [-(-count // _ROWS) * _ROWS for count in counts]
    return [0, *np.cumsum(padded, dtype=np.int64).tolist()]


def _gather(
    task: Task,
    asked: list[kernels.Asked],
    fars: list[Far],
    first: list[int],
    to: tuple[int, int, int],
    stream: int,
) -> Any:
    places = np.zeros(first[-1], kernels.PLACE)
    places["row"] = -1
    ratio = task.query.shape[1] // task.key.shape[1]
    for one, far, at in zip(asked, fars, first[:-1], strict=True):
        own = places[at : at + len(far.landmarks)]
        own["batch"], own["head"] = one.span.batch, one.head // ratio
        own["row"] = one.span.kv_start + far.landmarks
    if not len(places):
        return None
    table = driver.DeviceTable(places.tobytes(), task.query.device)
    kernels.gather(task, table.address, len(places), to[1], to[2], stream)
    return table


def _pool(
    task: Task,
    asked: list[kernels.Asked],
    fars: list[Far],
    first: list[int],
    to: tuple[int, int, int],
    masses: kernels.Masses,
    fields: Mapping[HeadIndex, Fields],
    allocate: kernels.Allocate,
    stream: int,
) -> tuple[Any, ...]:
    rows, to_key, to_value = to
    # What a tile multiplies by 0 behind the last pool must be finite.
    size = task.key.item_bytes
    for address, dim in zip((to_key, to_value), _dims(task), strict=True):
        driver.zero_bytes(address, rows * dim * size, stream)
    bias = allocate(4 * rows)
    driver.zero_bytes(bias[1], 4 * rows, stream)
    count, stride = masses.mass.shape
    pools = np.array([len(far.filled) for far in fars], np.int32)
    if not pools.max(initial=0):
        return (bias,)
    taken = np.zeros((count, stride), np.uint8)
    for number, far in enumerate(fars):
        taken[number, far.landmarks] = 1
    base = np.array([far.base for far in fars], np.float32)
    parts: tuple[NDArray[Any], ...] = (base, np.array(first[:-1], np.int32), pools, taken)
    table = driver.DeviceTable(b"".join(x.tobytes() for x in parts), task.query.device)
    at = table.address + np.cumsum([0, *(x.nbytes for x in parts)])
    any_fields = next(iter(fields.values()))
    block = kernels.Pool(
        probes=masses.at["probes"], samples=masses.at["samples"], lse=masses.at["lse"],
        mass=masses.at["mass"], base=int(at[0]), first=int(at[1]), pools=int(at[2]),
        taken=int(at[3]), pool_key=to_key, pool_value=to_value, pool_bias=bias[1],
        rows=masses.lse.shape[1], key_stride=stride, pool_keys=any_fields.structure.pool,
        pools_most=int(pools.max()), causal=int(any_fields.causal),
        fitted=int(any_fields.structure.fitted),
    )  # fmt: skip
    kernels.pool(task, block, count, stream)
    return bias, table


def _attend(
    task: Task,
    heads: list[FarHead],
    further: list[tuple[int, int, int]],
    bias: int,
    allocate: kernels.Allocate,
    stream: int,
) -> tuple[str, int, Any]:
    """Start the attention over near fields, landmarks and pools."""
    device = task.query.device
    facts = driver.device_facts(device)
    causal = all(head.fields.causal for head in heads)
    arrays = (task.query, task.key, task.value, task.out, task.lse)
    pointers = tuple(array.pointer for array in arrays)
    if sm90.refusal(task, facts.arch) is None and causal:
        tile = attend_tile(*(padded_dim(dim) for dim in _dims(task)))
        work = far_list(task.geometry, heads, tile.tile_m, tile.tile_n, facts.multiprocessors)
        listed = upload(work, device, stream)
        strides = -(-task.query.shape[2] // 16) + tile.tile_m // 16
        squares = allocate(4 * task.query.shape[0] * task.query.shape[1] * strides)
        query, key, value, out, lse = map(sm90.DeviceMatrix.of, arrays)
        keys, values = zip((key, value), *_matrices(task, further), strict=True)
        packed = sm90.pack_params(
            tile, task.query.dtype, query, keys, values, out, lse, task.scale, listed
        )
        packed.bias, packed.squares = bias, squares[1]
        packed.squares_head, packed.squares_batch = strides, strides * task.query.shape[1]
        start_once(
            tile.spec(task.query.dtype), tile.threads, packed, listed.grid, device, stream
        )
        return tile.spec(task.query.dtype).name, tile.tile_n, (listed, squares)
    chosen = sm80.specialisation(task, facts.arch, listed=True)
    spec = chosen.spec(facts.arch)
    work = far_list(task.geometry, heads, chosen.tile_m, chosen.tile_n, None)
    listed = upload(work, device, stream)
    params = sm80.listed_params(task, listed.items, listed.sources)
    params.bias_of_keys = bias
    for place, (_, key_at, value_at) in zip(params.further, further, strict=True):
        place.key, place.value = key_at, value_at
    sm80.place(params, (*pointers, 0, 0))
    start_once(spec, chosen.threads, params, listed.grid, device, stream)
    return spec.name, chosen.tile_n, listed


def _matrices(
    task: Task, further: list[tuple[int, int, int]]
) -> list[tuple[sm90.DeviceMatrix, sm90.DeviceMatrix]]:
    found = []
    for rows, *addresses in further:
        key, value = (
            sm90.DeviceMatrix(address, (1, 1, rows, dim), (rows * dim, rows * dim, dim))
            for address, dim in zip(addresses, _dims(task), strict=True)
        )
        found.append((key, value))
    return found
