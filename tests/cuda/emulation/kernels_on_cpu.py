"""Whatever a kernel spec names, compiled for the CPU, and a host that plays the device."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from units import library

from adaattn_cuda import sampled
from adaattn_cuda.device import driver, launch
from adaattn_cuda.device.launch import DeviceWork
from adaattn_cuda.jit.spec import KernelSpec, cpp
from adaattn_cuda.kernels import listed, sm80_attn_fwd

_UNIT = """\
#include "cuda_words.h"
#include "{header}"

using Traits = adaattn::{stem}::Traits<{arguments}>;
using Params = adaattn::{stem}::{params};
static_assert(Traits::kSmemBytes == {smem_bytes}, "host and kernel disagree on smem");

namespace {{
Params held;
}}

extern "C" int params_bytes() {{ return sizeof(Params); }}
extern "C" void run(const Params* params, int blocks) {{
    held = *params;
    words::grid = static_cast<unsigned>(blocks);
    for (int block = 0; block < blocks; ++block) {{
        adaattn::ptx::emulation::run_block(block, Traits::kThreads, Traits::kSmemBytes,
                                           [] {{ adaattn::{stem}::run<Traits>(held); }});
    }}
}}
"""


class Kernels:
    """Kernels by spec, one library each, kept in a folder."""

    def __init__(self, cxx: str, folder: Path) -> None:
        self._cxx, self._folder = cxx, folder

    def library(self, spec: KernelSpec) -> ctypes.CDLL:
        """Compile one specialisation, once."""
        unit = _UNIT.format(
            header=spec.header, stem=spec.stem, params=spec.params or "Params",
            arguments=", ".join(cpp(t) for t in spec.traits), smem_bytes=spec.smem_bytes,
        )  # fmt: skip
        return library(self._cxx, self._folder, unit)

    def run(self, spec: KernelSpec, threads: int, block: Any, grid: int, *_: Any) -> None:
        """Run a launch to its end."""
        library = self.library(spec)
        assert library.params_bytes() == ctypes.sizeof(block), spec.name
        if grid:
            library.run(ctypes.byref(block), grid)


class _Table:
    def __init__(self, data: bytes, device: int) -> None:
        self._memory = np.frombuffer(bytearray(data or b"\0" * 16), np.uint8)
        self.address = self._memory.ctypes.data
        self.size_bytes = len(data)


class _Call:
    """Stands in for `driver.Call`: a start runs the launch to its end."""

    def __init__(self, kernel: _Kernel, params: Any, grid: int, stream: int = 0) -> None:
        self._run = lambda: kernel.found.run(kernel.spec, 0, params, grid)

    def to(self, stream: int) -> _Call:
        return self

    def start(self, device: int) -> None:
        self._run()


class _Kernel:
    def __init__(self, found: Kernels, spec: KernelSpec) -> None:
        self.found, self.spec = found, spec

    def prepare(self, device: int) -> None:
        pass


def play_device(monkeypatch: pytest.MonkeyPatch, found: Kernels, arch: str) -> None:
    """Let the sm80 family, what samples and what draws rows work on host memory."""

    def upload(work: Any, device: int, stream: int) -> DeviceWork:
        if not work.grid:
            return DeviceWork(0, 0, 0, 0, 0, 0)
        table = _Table(work.tobytes(), device)
        items, sources = work.addresses(table.address)
        size = table.size_bytes
        return DeviceWork(items, sources, work.rounds, work.grid, work.max_sources, size, table)

    def zero(address: int, size_bytes: int, stream: int) -> None:
        ctypes.memset(address, 0, size_bytes)

    facts = driver.DeviceFacts("a card", arch, 4, 166912)
    monkeypatch.setattr(driver, "DeviceTable", _Table)
    monkeypatch.setattr(driver, "Call", _Call)
    monkeypatch.setattr(driver, "read", lambda at, size, device: ctypes.string_at(at, size))
    monkeypatch.setattr(driver, "zero_bytes", zero)
    monkeypatch.setattr(driver, "device_facts", lambda device: facts)
    monkeypatch.setattr(driver, "is_capturing", lambda stream: False)
    for module in (sampled, listed):
        monkeypatch.setattr(module, "upload", upload)
    for module in (launch, listed, sm80_attn_fwd):
        monkeypatch.setattr(
            module, "kernel_of", lambda spec, threads, stream: _Kernel(found, spec)
        )


def allocate(size_bytes: int) -> tuple[Any, int]:
    """Host memory full of NaN, whatever it is read as, on 16 bytes."""
    room = np.full(size_bytes + 32, 0xFF, np.uint8)
    return room, room.ctypes.data + -room.ctypes.data % 16
