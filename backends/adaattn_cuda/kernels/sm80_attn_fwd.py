"""Host side of ``sm80_attn_fwd``: parameters, work list and grid of one launch.

All but `Sm80Launch` touches no device: a launch is described completely and can be looked at in
a test.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence

from adaattn_core.errors import UnsupportedError
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.tuning import sm80_attn_fwd as tuning
from adaattn_cuda.work.geometry import UNLIMITED, extent
from adaattn_cuda.work.records import TENSORS

__all__ = [
    "ListedParams",
    "Params",
    "RuledParams",
    "Sm80Launch",
    "Unit",
    "launches",
    "listed_params",
    "place",
    "specialisation",
    "units",
]

BIAS_TYPES = {"f32": 1, "f16": 2, "bf16": 3}
INPUT_FORMATS = ("f32", "f16", "bf16")
OPERAND_FORMATS = ("f32", "tf32", "f16", "bf16")


MAX_UNITS = 128
"""Units in one launch: kMaxUnits in work/units.cuh."""


class Unit(ctypes.Structure):
    """The twin of ``Unit`` in work/units.cuh: a sequence, or one head of one."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in ("batch", "head", "q_start", "len_q", "kv_start", "len_kv")
    )


_POINTERS = ("query", "key", "value", "out", "lse", "allowed", "bias")
_AXES = ("batch", "head", "row")
_STRIDES = (
    *(f"{x}_{axis}" for x in ("query", "key", "value", "out") for axis in _AXES),
    "lse_batch",
    "lse_head",
    *(f"{x}_{axis}" for x in ("allowed", "bias") for axis in (*_AXES, "key")),
)  # fmt: skip


class UnitList(ctypes.Structure):
    """The twin of ``UnitList`` in work/units.cuh."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "batch", "len_q", "len_kv", "left", "right", "bottom_right", "group_size",
                "tiles", "heads_per_unit", "unit_count",
            )
        ),
        ("units", Unit * MAX_UNITS),
    )  # fmt: skip


class Params(ctypes.Structure):
    """The twin of ``Params`` in sm80_params.cuh; of ``RuledParams`` below."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int32) for name in ("dim_qk", "dim_v", "bias_type")),
        ("score_scale", ctypes.c_float),
        ("work", UnitList),
    )


class Further(ctypes.Structure):
    """The twin of ``FurtherRows``."""

    _fields_ = (("key", ctypes.c_void_p), ("value", ctypes.c_void_p))


class ListedParams(Params):
    """The twin of ``ListedParams``: for kernels whose items and sources are in tables."""

    _fields_ = (
        ("items", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("further", Further * (len(TENSORS) - 1)),
        ("bias_of_keys", ctypes.c_void_p),
        ("inverse_scale", ctypes.c_float),
    )


class RuledParams(Params):
    """The twin of ``RuledParams``: for kernels with a score rule."""

    _fields_ = (("sinks", ctypes.c_void_p), ("softcap_rate", ctypes.c_float))


def is_vectorised(task: Task) -> bool:
    """Whether every row begins on 16 bytes and holds whole 16-byte chunks (8 bytes for out)."""
    for array in (task.query, task.key, task.value, task.out):
        chunk = 16 // array.item_bytes
        steps = (s for n, s in zip(array.shape[:3], array.strides[:3], strict=True) if n > 1)
        if array.pointer % 16 or array.shape[3] % chunk or any(s % chunk for s in steps):
            return False
    return True


def specialisation(task: Task, arch: str, *, listed: bool = False) -> tuning.Specialisation:
    """Which specialisation computes the task; `listed` where its items come in tables.

    Raises
    ------
    UnsupportedError
        If a head dimension exceeds 256, a length 2^29, or a format is not one of the family's.
    """
    dim_qk, dim_v = task.query.shape[3], task.value.shape[3]
    if max(dim_qk, dim_v) > tuning.DIM_LIMIT:
        raise UnsupportedError(
            got=f"dim_qk={dim_qk}, dim_v={dim_v}",
            needed=f"head dimensions of at most {tuning.DIM_LIMIT} on the GPU",
            do='use backend="numpy" for this problem',
        )
    if max(task.query.shape[2], task.key.shape[2]) > UNLIMITED:
        raise UnsupportedError(
            got=f"len_q={task.query.shape[2]}, len_kv={task.key.shape[2]}",
            needed=f"lengths of at most {UNLIMITED}",
            do="split the queries, or the keys and merge by lse",
        )
    if {task.qk, task.pv} - set(OPERAND_FORMATS):
        raise UnsupportedError(
            got=f"operand formats qk={task.qk}, pv={task.pv}",
            needed=f"formats out of {', '.join(OPERAND_FORMATS)} on this GPU path",
            do="plan with these formats (Capabilities lists them)",
        )
    return tuning.specialise(
        arch,
        task.query.dtype,
        task.qk,
        task.pv,
        dim_qk,
        dim_v,
        array_mask=task.allowed is not None or task.bias is not None,
        vectorised=is_vectorised(task),
        rule=task.rule,
        listed=listed,
    )


def units(task: Task) -> list[tuple[int, ...]]:
    """Units of work, longest first; sequences without rows are left out.

    Returns
    -------
    list of tuple
        Fields of `Unit` in order; empty for a uniform task, which needs no list.
    """
    if task.is_uniform:
        return []
    chosen = (
        [(s.index, 0) for s in task.sequences]
        if task.heads is None
        else sorted(set(task.heads))
    )
    found: list[tuple[int, ...]] = []
    for index, head in chosen:
        s = task.sequences[index]
        if s.len_q > 0:
            found.append((s.batch, head, s.q_start, s.len_q, s.kv_start, s.len_kv))
    found.sort(key=lambda unit: -unit[3])
    return found


def launches(task: Task, tile_m: int) -> list[tuple[Params, int]]:
    """Parameters and number of blocks of every launch that the task takes.

    One launch, but for lists of more than 128 units; none where there is nothing to do. The
    addresses are still missing (see `place`).
    """
    batch, heads_q, len_q, _ = task.query.shape
    if task.is_uniform:
        tiles = -(-len_q // tile_m)
        blocks = batch * heads_q * tiles
        return [(_pack(task, tiles, []), blocks)] if blocks else []
    every = units(task)
    heads_per_unit = heads_q if task.heads is None else 1
    found = []
    for first in range(0, len(every), MAX_UNITS):
        chunk = every[first : first + MAX_UNITS]
        tiles = -(-chunk[0][3] // tile_m)  # the longest comes first
        found.append((_pack(task, tiles, chunk), len(chunk) * heads_per_unit * tiles))
    return found


def listed_params(task: Task, items: int, sources: int) -> ListedParams:
    """Pack parameters of a launch whose work is in tables at these addresses."""
    params = ListedParams()
    _fill(params, task, 0, [])
    params.items, params.sources = items, sources
    params.inverse_scale = 1.0 / task.scale
    return params


def _pack(task: Task, tiles: int, chunk: list[tuple[int, ...]]) -> Params:
    params = RuledParams() if task.rule else Params()
    _fill(params, task, tiles, chunk)
    return params


def _fill(params: Params, task: Task, tiles: int, chunk: list[tuple[int, ...]]) -> None:
    work = params.work
    work.batch, heads_q, work.len_q, params.dim_qk = task.query.shape
    work.len_kv, params.dim_v = task.value.shape[2:]
    work.left, work.right = extent(task.left), extent(task.right)
    work.bottom_right = int(task.bottom_right)
    work.group_size = heads_q // task.key.shape[1]
    work.tiles = tiles
    work.heads_per_unit = heads_q if task.heads is None else 1
    work.unit_count = len(chunk)
    for i, unit in enumerate(chunk):
        work.units[i] = Unit(*unit)
    for name in ("query", "key", "value", "out"):
        array: ArrayView = getattr(task, name)
        for axis, stride in zip(("batch", "head", "row"), array.strides, strict=False):
            setattr(params, f"{name}_{axis}", stride)
    params.lse_batch, params.lse_head = task.lse.strides[:2]
    for name in ("allowed", "bias"):
        mask: ArrayView | None = getattr(task, name)
        if mask is not None:
            for axis, stride in zip(("batch", "head", "row", "key"), mask.strides, strict=True):
                setattr(params, f"{name}_{axis}", stride)
    params.bias_type = 0 if task.bias is None else BIAS_TYPES[task.bias.dtype]
    array_mask = task.allowed is not None or task.bias is not None
    params.score_scale = task.factor * (1.0 if array_mask else math.log2(math.e))
    if isinstance(params, RuledParams):
        params.softcap_rate = task.softcap_rate


def place(params: Params, pointers: Sequence[int]) -> None:
    """Write the addresses of query, key, value, out, lse, allowed, bias (0 = none), and sinks.

    All but the last are the structure's first fields.
    """
    count = len(_POINTERS)
    (ctypes.c_uint64 * count).from_buffer(params)[:] = list(pointers[:count])
    if pointers[count:]:
        params.sinks = pointers[count]


class Sm80Launch:
    """A task on the sm80 family: whatever no other kernel takes, or an error that says why.

    Parameters
    ----------
    task : Task
    stream : int
        Where it will be started first.
    chosen : Specialisation, optional
        Overrules the choice, for measurements.

    Raises
    ------
    UnsupportedError
        As `specialisation` does, or while the stream records a graph.
    """

    workspace_bytes = 0

    scratch_bytes: tuple[int, ...] = ()

    def __init__(
        self, task: Task, stream: int, chosen: tuning.Specialisation | None = None
    ) -> None:
        device = task.query.device
        arch = driver.device_facts(device).arch
        chosen = chosen or specialisation(task, arch)
        spec = chosen.spec(arch)
        self.name = spec.name
        self.step_keys = chosen.tile_n
        self._kernel = kernel_of(spec, chosen.threads, stream)
        self._kernel.prepare(device)
        self._ready = [
            (driver.Call(self._kernel, params, blocks), params)
            for params, blocks in launches(task, chosen.tile_m)
        ]
        self._lock = threading.Lock()

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue the launches; the driver copies the parameters before each call returns."""
        with self._lock:
            for call, params in self._ready:
                place(params, pointers)
                call.to(stream).start(device)
