"""Launches of the Hopper kernel: a work list per geometry, tensor maps per set of addresses."""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

from adaattn_core.errors import UnsupportedError
from adaattn_core.problem import AttentionProblem
from adaattn_cuda import driver, sm90
from adaattn_cuda.arrays import ArrayView
from adaattn_cuda.launch import kernel_of
from adaattn_cuda.sm90_work import Geometry

__all__ = ["Sm90Launch", "refusal"]

_ADDRESSES_REMEMBERED = 64
_NAMES = ("query", "key", "value", "out")


def refusal(problem: AttentionProblem, arrays: Sequence[ArrayView]) -> str | None:
    """Why the Hopper kernel does not take a problem, or None if it does.

    Parameters
    ----------
    problem : AttentionProblem
    arrays : sequence of ArrayView
        query, key, value, out (and whatever follows).
    """
    reasons = [sm90.supports(problem)]
    if problem.len_kv == 0:
        reasons.append("no key at all: an array without memory has no tensor map")
    reasons += [
        sm90.layout_reason(name, _matrix(array))
        for name, array in zip(_NAMES, arrays, strict=False)
    ]
    return next((reason for reason in reasons if reason), None)


def _matrix(array: ArrayView) -> sm90.DeviceMatrix:
    """Describe a (batch, heads, len, dim) array, or a (batch, heads, len) one as dim 1."""
    shape, (batch, head, row) = (*array.shape, 1)[:4], array.strides[:3]
    return sm90.DeviceMatrix(array.pointer, cast("Any", shape), (batch, head, row))


class Sm90Launch:
    """A dense problem on the Hopper kernel; its work list lives on the device with this object.

    Raises
    ------
    UnsupportedError
        If it is made while the stream records a graph: the work list must be copied first.
    """

    def __init__(
        self, problem: AttentionProblem, arrays: Sequence[ArrayView], stream: int
    ) -> None:
        device = arrays[0].device
        facts = driver.device_facts(device)
        self._plan = sm90.plan_launch(
            Geometry.of(problem), problem.dtype, facts.multiprocessors
        )
        tile = self._plan.tile
        spec = tile.spec(problem.dtype)
        self.name = spec.name
        self._arrays, self._scale = tuple(arrays[:5]), problem.scale
        self._calls: OrderedDict[tuple[int, ...], driver.Call] = OrderedDict()
        self._lock = threading.Lock()
        self._table: driver.DeviceTable | None = None
        if self._plan.grid == 0:
            return
        if driver.is_capturing(stream):
            raise UnsupportedError(
                got="the first run of this geometry during a CUDA-graph capture",
                needed="one run before the capture, which copies the work list to the device",
                do="run the problem once (a warm-up), then capture",
            )
        self._kernel = kernel_of(spec, tile.threads)
        self._kernel.prepare(device)
        self._table = driver.DeviceTable(self._plan.records.tobytes(), device)

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue it; tensor maps are encoded once per set of addresses."""
        if self._table is None:
            return
        call = self._calls.get(pointers)
        if call is None:
            call = self._kernel.call(device, self._plan.grid, self._pack(pointers))
            with self._lock:
                self._calls[pointers] = call
                if len(self._calls) > _ADDRESSES_REMEMBERED:
                    self._calls.popitem(last=False)
        call.start(device, stream)  # nothing writes to its parameters any more

    def _pack(self, pointers: tuple[int, ...]) -> Any:
        assert self._table is not None
        query, key, value, out, lse = (
            sm90.DeviceMatrix(pointer, matrix.shape, matrix.strides)
            for pointer, matrix in zip(pointers, map(_matrix, self._arrays), strict=False)
        )
        packed = sm90.pack_params(
            self._plan, query, [key], [value], out, lse, self._scale, self._table.address
        )
        return ctypes.create_string_buffer(packed, len(packed))
