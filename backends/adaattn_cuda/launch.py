"""From a described task to work on a stream, by launch plans that only lack the addresses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

from adaattn_cuda import driver, sm80
from adaattn_cuda.compile import build
from adaattn_cuda.spec import KernelSpec

__all__ = ["LaunchCache", "Sm80Launch", "kernel_of"]


class Launch(Protocol):
    """A task made ready for a device: what is left to say is where the arrays are."""

    name: str

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue it: query, key, value, out, lse, allowed, bias (0 = none)."""
        ...


_kernels: dict[KernelSpec, driver.Kernel] = {}
_kernels_lock = threading.Lock()


def kernel_of(spec: KernelSpec, threads: int) -> driver.Kernel:
    """Return a loaded kernel: from this process, the disk cache, or the compiler."""
    with _kernels_lock:
        if spec not in _kernels:
            _kernels[spec] = driver.Kernel(build(spec).cubin, spec.smem_bytes, threads)
        return _kernels[spec]


class Sm80Launch:
    """A dense task on the sm80 family."""

    def __init__(self, task: sm80.DenseTask, device: int) -> None:
        arch = driver.device_facts(device).arch
        chosen = sm80.specialisation(task, arch)
        spec = chosen.spec(arch)
        self.name = spec.name
        self._ready = sm80.launches(task, chosen.tile_m)
        self._kernel = kernel_of(spec, chosen.threads)
        self._kernel.prepare(device)
        self._lock = threading.Lock()

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        """Enqueue the launches; the driver copies the parameters before each call returns."""
        with self._lock:
            for params, blocks in self._ready:
                sm80.set_pointers(params, pointers)
                self._kernel.launch(device, blocks, stream, params)


class LaunchCache:
    """The most recently used launch plans.

    Parameters
    ----------
    limit : int
        Plans kept; one takes a few KiB of host memory.
    """

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._plans: OrderedDict[Hashable, Launch] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Launch]) -> Launch:
        """Return the plan under `key`, made first if it is not there."""
        with self._lock:
            found = self._plans.get(key)
            if found is not None:
                self._plans.move_to_end(key)
                return found
        made = make()  # may compile: not under the lock
        with self._lock:
            self._plans[key] = made
            while len(self._plans) > self._limit:
                self._plans.popitem(last=False)
        return made
