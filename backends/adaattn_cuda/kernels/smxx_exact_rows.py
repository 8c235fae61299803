"""Host side of ``smxx_exact_rows``: errors of drawn rows, for sampled certificates."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import HeadIndex
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import start_once
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels.sm80_attn_fwd import BIAS_TYPES
from adaattn_cuda.kernels.smxx_probe import Allocate
from adaattn_cuda.kernels.task import Task

__all__ = ["Params", "oracle_upper", "row_figures", "shipped"]

ROW = np.dtype(
    [
        (name, "<i4")
        for name in (
            "batch", "head", "row", "q_start", "kv_start", "key_stop", "start_offset",
            "stop_offset",
        )
    ]
)  # fmt: skip
"""``Row`` of smxx_exact_rows.cuh."""
THREADS = 128
_AXES = ("batch", "head", "row")


class Params(ctypes.Structure):
    """The twin of ``Params``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "key", "value", "out", "allowed", "bias", "sinks")
        ),
        *(
            (f"{x}_{axis}", ctypes.c_int64)
            for x in ("query", "key", "value", "out")
            for axis in _AXES
        ),
        *(
            (f"{x}_{axis}", ctypes.c_int64)
            for x in ("allowed", "bias")
            for axis in (*_AXES, "key")
        ),
        *((name, ctypes.c_void_p) for name in ("rows", "figures")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("bias_type", "dim_qk", "dim_v", "group_size")),
    )


def spec(dtype: str, arch: str) -> KernelSpec:
    return KernelSpec("smxx_exact_rows", (f"adaattn::Format::{dtype}",), 0, arch)


def shipped(arch: str) -> list[KernelSpec]:
    """Specialisations to compile ahead."""
    return [spec(dtype, arch) for dtype in ("f32", "bf16", "f16")]


def row_figures(
    task: Task, rows: Mapping[HeadIndex, NDArray[np.int64]], allocate: Allocate, stream: int
) -> dict[HeadIndex, NDArray[np.float64]]:
    """Return ``|out - exact|`` and ``|exact|`` of drawn rows, shape (rows, 2) each; waits.

    Parameters
    ----------
    task : Task
        `out` is what is judged.
    rows : mapping of (sequence, head) to ndarray of int64
        Row numbers within the sequence.
    allocate : Allocate
    stream : int
    """
    table = np.zeros(sum(map(len, rows.values())), ROW)
    first = 0
    for (sequence, head), own in rows.items():
        span = task.sequences[sequence]
        start, stop = task.geometry.offsets(span)
        part = table[first : first + len(own)]
        part["batch"], part["head"], part["row"] = span.batch, head, own
        part["q_start"], part["kv_start"] = span.q_start, span.kv_start
        part["key_stop"], part["start_offset"], part["stop_offset"] = span.len_kv, start, stop
        first += len(own)
    device = task.query.device
    if not len(table):
        return {index: np.zeros((0, 2)) for index in rows}
    held = driver.DeviceTable(table.tobytes(), device)
    figures, at = allocate(16 * len(table))
    block = Params(
        rows=held.address, figures=at, scale=task.scale, softcap=task.softcap,
        bias_type=0 if task.bias is None else BIAS_TYPES[task.bias.dtype],
        dim_qk=task.query.shape[3], dim_v=task.value.shape[3],
        group_size=task.query.shape[1] // task.key.shape[1],
        sinks=0 if task.sinks is None else task.sinks.pointer,
    )  # fmt: skip
    for name in ("query", "key", "value", "out", "allowed", "bias"):
        array = getattr(task, name)
        if array is not None:
            setattr(block, name, array.pointer)
            for axis, step in zip((*_AXES, "key"), array.strides, strict=False):
                if axis != "key" or name in ("allowed", "bias"):
                    setattr(block, f"{name}_{axis}", step)
    chosen = spec(task.query.dtype, driver.device_facts(device).arch)
    start_once(chosen, THREADS, block, len(table), device, stream)
    read = np.frombuffer(driver.read(at, 16 * len(table), device), np.float64).reshape(-1, 2)
    del figures
    found, first = {}, 0
    for index, own in rows.items():
        found[index] = read[first : first + len(own)]
        first += len(own)
    return found


def oracle_upper(dim_qk: int, keys: int, score_max: float, value_norm: float) -> float:
    """Bound the error of an exact row in f64.

    A score of size S errs by (dim_qk + 16) units of S: products, sums, scale, softcap, mask and
    the reference that is taken off. A weight errs by twice as much and by its exponential, the
    sums of numerator and denominator by a unit a key besides.

    Parameters
    ----------
    dim_qk, keys : int
        Length of a key; most keys of a row.
    score_max : float
        Largest ``scale |q| |k|``, with the largest mask entry and sink.
    value_norm : float
        Largest norm of a value.
    """
    unit = 2.0**-52
    relative = 4 * (dim_qk + 16) * unit * score_max + 4 * (keys + 64) * unit
    return 2 * value_norm * relative
