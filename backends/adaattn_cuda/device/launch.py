"""From machine code to work on a stream: loaded kernels, work lists on the device."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

from adaattn_core.errors import UnsupportedError
from adaattn_cuda.device import driver
from adaattn_cuda.jit.compile import build
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.work.records import WorkList

__all__ = [
    "BackwardLaunch",
    "DeviceWork",
    "Launch",
    "kernel_of",
    "refuse_capture",
    "start_once",
    "upload",
]


class Launch(Protocol):
    """A task made ready for a device: what is left to say is where the arrays are."""

    name: str
    workspace_bytes: int
    """Device memory that it keeps for itself, between its starts as well."""
    step_keys: int
    """Fewest keys of a step of its streaming softmax."""
    scratch_bytes: tuple[int, ...]
    """Memory that every start is given besides: of the last piece certificates read."""

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue it: query, key, value, out, lse, allowed, bias (0 = none), then scratch."""
        ...


class BackwardLaunch(Protocol):
    """A backward pass made ready for a device: what is left to say is where the arrays are."""

    name: str
    workspace_bytes: int
    """Device memory that every start is given besides the arrays."""

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue it, with the addresses that `kernels.backward_task.POINTERS` names."""
        ...


_kernels: dict[KernelSpec, driver.Kernel] = {}
_kernels_lock = threading.Lock()


def kernel_of(spec: KernelSpec, threads: int, stream: int) -> driver.Kernel:
    """Return a loaded kernel: from this process, the disk cache, or the compiler.

    Raises
    ------
    UnsupportedError
        If it would have to be loaded while `stream` records a CUDA graph.
    """
    with _kernels_lock:
        if spec not in _kernels:
            refuse_capture(stream, "loads its kernels")
            _kernels[spec] = driver.Kernel(build(spec).cubin, spec.smem_bytes, threads)
        return _kernels[spec]


def start_once(
    spec: KernelSpec, threads: int, block: Any, grid: int, device: int, stream: int
) -> None:
    """Start a kernel on a parameter block, once; a grid of no blocks starts nothing.

    Raises
    ------
    UnsupportedError
        As `kernel_of`.
    """
    if not grid:
        return
    kernel = kernel_of(spec, threads, stream)
    kernel.prepare(device)
    driver.Call(kernel, block, grid, stream).start(device)


def refuse_capture(stream: int, what: str) -> None:
    """Raise if `stream` records a CUDA graph, during which nobody may do `what`."""
    if driver.is_capturing(stream):
        raise UnsupportedError(
            got="the first run of its kind during a CUDA-graph capture",
            needed=f"one run before the capture, which {what}",
            do="run the problem once (a warm-up), then capture",
        )


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWork:
    """A work list on the device, whether the host copied it there or a kernel writes it.

    Attributes
    ----------
    items, sources : int
        Addresses of the two tables (`adaattn_cuda.work.records`).
    rounds, grid : int
        Shape of the table of items.
    max_sources : int
        Most sources of one item.
    size_bytes : int
        Device memory of both tables.
    keep : object
        Whatever owns that memory.
    """

    items: int
    sources: int
    rounds: int
    grid: int
    max_sources: int
    size_bytes: int
    keep: object = None


def upload(work: WorkList, device: int, stream: int) -> DeviceWork:
    """Copy a work list to the device; nothing is copied where there is nothing to do.

    Raises
    ------
    UnsupportedError
        If `stream` records a CUDA graph.
    """
    if work.grid == 0:
        return DeviceWork(0, 0, 0, 0, 0, 0)
    refuse_capture(stream, "copies the work list to the device")
    table = driver.DeviceTable(work.tobytes(), device)
    items, sources = work.addresses(table.address)
    return DeviceWork(
        items, sources, work.rounds, work.grid, work.max_sources, table.size_bytes, table
    )
