"""Launches of the Hopper kernel: a work list per geometry, tensor maps per set of addresses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of, refuse_capture
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.work.geometry import Geometry

__all__ = ["Sm90Launch", "matrix", "refusal"]

_ADDRESSES_REMEMBERED = 128
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
        sm90.layout_reason(name, matrix(array))
        for name, array in zip(_NAMES, arrays, strict=False)
    ]
    return next((reason for reason in reasons if reason), None)


def matrix(array: ArrayView) -> sm90.DeviceMatrix:
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
        self._calls: OrderedDict[tuple[int, tuple[int, ...]], driver.Call] = OrderedDict()
        self._packed: sm90.Params | None = None
        self._lock = threading.Lock()
        self.workspace_bytes = 0
        self._table: driver.DeviceTable | None = None
        if self._plan.work.grid == 0:
            return
        refuse_capture(stream, "copies the work list to the device")
        self._kernel = kernel_of(spec, tile.threads, stream)
        self._kernel.prepare(device)
        self._table = driver.DeviceTable(self._plan.work.tobytes(), device)
        self.workspace_bytes = self._table.size_bytes

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue it; tensor maps are encoded once per set of addresses."""
        if self._table is None:
            return
        call = self._calls.get((stream, pointers))
        if call is None:
            call = driver.Call(self._kernel, self._pack(pointers), self._plan.work.grid, stream)
            with self._lock:
                self._calls[stream, pointers] = call
                if len(self._calls) > _ADDRESSES_REMEMBERED:
                    self._calls.popitem(last=False)
        call.start(device)  # nothing writes to its parameters any more

    def _pack(self, pointers: tuple[int, ...]) -> sm90.Params:
        """Parameters for a set of addresses: packed once, for others a copy is moved there."""
        if self._packed is not None:
            return sm90.move_params(self._packed, pointers)
        assert self._table is not None
        query, key, value, out, lse = (
            sm90.DeviceMatrix(pointer, matrix.shape, matrix.strides)
            for pointer, matrix in zip(pointers, map(matrix, self._arrays), strict=False)
        )
        self._packed = sm90.pack_params(
            self._plan, query, [key], [value], out, lse, self._scale, self._table.address
        )
        return self._packed
