"""From a described task to work on a stream, by launch plans that only lack the addresses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from adaattn_core.errors import UnsupportedError
from adaattn_cuda.device import driver
from adaattn_cuda.jit.compile import build
from adaattn_cuda.jit.spec import KernelSpec

__all__ = ["Launch", "LaunchCache", "kernel_of", "refuse_capture"]


class Launch(Protocol):
    """A task made ready for a device: what is left to say is where the arrays are."""

    name: str
    workspace_bytes: int
    """Device memory that it keeps for itself, between its starts as well."""

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue it: query, key, value, out, lse, allowed, bias (0 = none)."""
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


def refuse_capture(stream: int, what: str) -> None:
    """Raise if `stream` records a CUDA graph, during which nobody may do `what`."""
    if driver.is_capturing(stream):
        raise UnsupportedError(
            got="the first run of its kind during a CUDA-graph capture",
            needed=f"one run before the capture, which {what}",
            do="run the problem once (a warm-up), then capture",
        )


_Plan = TypeVar("_Plan")


class LaunchCache(Generic[_Plan]):
    """The most recently used launch plans.

    Parameters
    ----------
    limit : int
        Plans kept; one takes a few KiB of host memory.
    """

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._plans: OrderedDict[Hashable, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> _Plan | None:
        """Return the plan under `key`, or None."""
        with self._lock:
            found = self._plans.get(key)
            if found is not None:
                self._plans.move_to_end(key)
            return found

    def put(self, key: Hashable, plan: _Plan) -> None:
        """Keep a plan; the least recently used one is forgotten."""
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > self._limit:
                self._plans.popitem(last=False)
