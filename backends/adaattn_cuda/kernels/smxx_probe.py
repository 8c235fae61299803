"""Host side of ``smxx_probe``, ``smxx_pool`` and ``smxx_gather``: what is sampled for a plan.

They run on any GPU, on the host's behalf: it reads the sampled masses, chooses, and has the
rest made. Arrays come from the caller's library and go back to it with the objects here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import SequenceSpan
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import start_once
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels.sm80_attn_fwd import BIAS_TYPES
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.work.geometry import Geometry

__all__ = [
    "Allocate",
    "Asked",
    "Gather",
    "Masses",
    "Pool",
    "Probe",
    "ask",
    "gather",
    "pool",
    "probe_tables",
    "shipped",
]

Allocate = Callable[[int], tuple[Any, int]]
"""From a number of bytes to an array that owns them, and its address."""

PROBE = np.dtype(
    [
        (name, "<i4")
        for name in (
            "batch", "head", "q_start", "kv_start", "keys", "key_stop", "start_offset",
            "stop_offset",
        )
    ]
)  # fmt: skip
"""``Probe`` of smxx_probe.cuh."""
SAMPLE = np.dtype([(n, "<i4") for n in ("row", "near_start", "near_stop", "padding")])
"""``Sample``."""
PLACE = np.dtype([(n, "<i4") for n in ("batch", "head", "row", "padding")])
"""``Place`` of smxx_gather.cuh."""

PROBE_THREADS = POOL_THREADS = 128
GATHER_THREADS, GATHER_ROWS = 256, 8
_SPLIT_KEYS = 2048
_AXES = ("batch", "head", "row")
_i32, _i64, _f32, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _strides(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((f"{name}_{axis}", _i64) for name in names for axis in _AXES)


class Probe(ctypes.Structure):
    """``smxx_probe::Params``."""

    _fields_ = (
        *((name, _ptr) for name in ("query", "key", "allowed", "bias")),
        *_strides("query", "key"),
        *((f"{x}_{axis}", _i64) for x in ("allowed", "bias") for axis in (*_AXES, "key")),
        *((name, _ptr) for name in ("probes", "samples", "partial", "lse", "mass")),
        *(
            (name, _i32)
            for name in (
                "bias_type", "dim", "group_size", "rows", "splits", "split_keys", "key_stride",
            )
        ),
        ("scale", _f32),
    )  # fmt: skip


class Pool(ctypes.Structure):
    """``smxx_pool::Params``."""

    _fields_ = (
        *((name, _ptr) for name in ("query", "key", "value")),
        *_strides("query", "key", "value"),
        *(
            (name, _ptr)
            for name in (
                "probes", "samples", "lse", "mass", "taken", "base", "first", "pools",
                "pool_key", "pool_value", "pool_bias",
            )
        ),
        *(
            (name, _i32)
            for name in (
                "dim_qk", "dim_v", "group_size", "rows", "key_stride", "pool_keys",
                "pools_most", "causal", "fitted",
            )
        ),
        ("scale", _f32),
    )  # fmt: skip


class Gather(ctypes.Structure):
    """``smxx_gather::Params``."""

    _fields_ = (
        *((name, _ptr) for name in ("key", "value")),
        *_strides("key", "value"),
        *((name, _ptr) for name in ("places", "to_key", "to_value")),
        *((name, _i32) for name in ("dim_qk", "dim_v", "count")),
    )


def probe_spec(dtype: str, step: int, arch: str) -> KernelSpec:
    return KernelSpec("smxx_probe", (f"adaattn::Format::{dtype}", step), 0, arch, folder="plan")


def pool_spec(dtype: str, arch: str) -> KernelSpec:
    return KernelSpec("smxx_pool", (f"adaattn::Format::{dtype}",), 0, arch, folder="plan")


def gather_spec(item_bytes: int, arch: str) -> KernelSpec:
    return KernelSpec("smxx_gather", (item_bytes,), 0, arch, folder="plan")


def shipped(arch: str) -> list[KernelSpec]:
    """Specialisations to compile ahead."""
    dtypes = ("f32", "bf16", "f16")
    found = [probe_spec(dtype, step, arch) for dtype in dtypes for step in (0, 1)]
    found += [pool_spec(dtype, arch) for dtype in dtypes]
    return found + [gather_spec(size, arch) for size in (2, 4)]


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A group of rows of a head, of which some are computed exactly.

    Attributes
    ----------
    span : SequenceSpan
    head : int
    keys : int
        That the group can reach, from the sequence's first.
    rows : ndarray of int64
        Sampled rows, counted from the sequence's first.
    near_start, near_stop : ndarray of int64 or None
        Near field of each, whose keys do not count; None: all count.
    """

    span: SequenceSpan
    head: int
    keys: int
    rows: NDArray[np.int64]
    near_start: NDArray[np.int64] | None = None
    near_stop: NDArray[np.int64] | None = None


def probe_tables(
    asked: Sequence[Asked], geometry: Geometry
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Return probes, and their samples (probes, rows), filled up with rows that are none."""
    most = max((len(one.rows) for one in asked), default=0)
    probes = np.zeros(len(asked), PROBE)
    samples = np.zeros((len(asked), most), SAMPLE)
    samples["row"] = -1
    for number, one in enumerate(asked):
        start, stop = geometry.offsets(one.span)
        probes[number] = (
            one.span.batch, one.head, one.span.q_start, one.span.kv_start, one.keys,
            one.span.len_kv, start, stop,
        )  # fmt: skip
        own = samples[number, : len(one.rows)]
        own["row"] = one.rows
        if one.near_start is not None:
            own["near_start"], own["near_stop"] = one.near_start, one.near_stop
    return probes, samples


@dataclass(frozen=True, slots=True, eq=False)
class Masses:
    """What the sampled rows saw, on the device and on the host.

    Attributes
    ----------
    mass : ndarray of float32, shape (probes, keys)
    lse : ndarray of float32, shape (probes, rows)
        In log2 units.
    at : dict of str to int
        Addresses of the tables.
    keep : list
        What owns the memory.
    """

    mass: NDArray[np.float32]
    lse: NDArray[np.float32]
    at: dict[str, int]
    keep: list[Any]


def ask(task: Task, asked: Sequence[Asked], allocate: Allocate, stream: int) -> Masses:
    """Compute the sampled rows and wait for the masses of the keys.

    Raises
    ------
    UnsupportedError
        If `stream` records a CUDA graph.
    """
    device, query = task.query.device, task.query
    probes, samples = probe_tables(asked, task.geometry)
    count, rows = samples.shape
    stride = max(-(-max((one.keys for one in asked), default=1) // 64) * 64, 64)
    splits = -(-stride // _SPLIT_KEYS)
    table = driver.DeviceTable(probes.tobytes() + samples.tobytes(), device)
    partial, partial_at = allocate(8 * count * splits * rows)
    lse, lse_at = allocate(4 * count * rows)
    mass, mass_at = allocate(4 * count * stride)
    block = Probe(
        query=query.pointer, key=task.key.pointer, probes=table.address,
        samples=table.address + probes.nbytes, partial=partial_at, lse=lse_at, mass=mass_at,
        bias_type=0 if task.bias is None else BIAS_TYPES[task.bias.dtype],
        dim=query.shape[3], group_size=query.shape[1] // task.key.shape[1], rows=rows,
        splits=splits, split_keys=_SPLIT_KEYS, key_stride=stride, scale=task.scale,
    )  # fmt: skip
    _set_strides(block, query=query, key=task.key)
    for name, array in (("allowed", task.allowed), ("bias", task.bias)):
        if array is not None:
            setattr(block, name, array.pointer)
            for axis, step in zip((*_AXES, "key"), array.strides, strict=True):
                setattr(block, f"{name}_{axis}", step)
    arch = driver.device_facts(device).arch
    for step in (0, 1):
        spec = probe_spec(query.dtype, step, arch)
        start_once(spec, PROBE_THREADS, block, count * splits, device, stream)
    found = np.frombuffer(driver.read(mass_at, 4 * count * stride, device), np.float32)
    sums = np.frombuffer(driver.read(lse_at, 4 * count * rows, device), np.float32)
    at = {
        "probes": table.address, "samples": table.address + probes.nbytes, "lse": lse_at,
        "mass": mass_at,
    }  # fmt: skip
    return Masses(
        found.reshape(count, stride), sums.reshape(count, rows), at, [table, partial, lse, mass]
    )


def pool(task: Task, block: Pool, count: int, stream: int) -> None:
    """Make the pools of `count` probes; the arrays' fields are set here."""
    device = task.query.device
    block.query, block.key, block.value = (
        x.pointer for x in (task.query, task.key, task.value)
    )
    block.dim_qk, block.dim_v = task.query.shape[3], task.value.shape[3]
    block.group_size = task.query.shape[1] // task.key.shape[1]
    block.scale = task.scale
    _set_strides(block, query=task.query, key=task.key, value=task.value)
    spec = pool_spec(task.query.dtype, driver.device_facts(device).arch)
    start_once(spec, POOL_THREADS, block, count * block.pools_most, device, stream)


def gather(
    task: Task, places: int, count: int, to_key: int, to_value: int, stream: int
) -> None:
    """Copy `count` rows of keys and values side by side."""
    device = task.query.device
    block = Gather(
        key=task.key.pointer, value=task.value.pointer, places=places, to_key=to_key,
        to_value=to_value, dim_qk=task.key.shape[3], dim_v=task.value.shape[3], count=count,
    )  # fmt: skip
    _set_strides(block, key=task.key, value=task.value)
    spec = gather_spec(task.key.item_bytes, driver.device_facts(device).arch)
    start_once(spec, GATHER_THREADS, block, -(-count // GATHER_ROWS), device, stream)


def _set_strides(block: Any, **arrays: ArrayView) -> None:
    for name, array in arrays.items():
        for axis, step in zip(_AXES, array.strides, strict=False):
            setattr(block, f"{name}_{axis}", step)
