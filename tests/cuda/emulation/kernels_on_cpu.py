"""Whatever a kernel spec names, compiled for the CPU, and a host that plays the device."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import adaattn_kernels_cu as kernels
from adaattn_cuda import sampled
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import DeviceWork
from adaattn_cuda.jit.spec import KernelSpec, cpp
from adaattn_cuda.kernels import smxx_exact_rows, smxx_probe

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
        stem = self._folder / hashlib.sha256(unit.encode()).hexdigest()[:16]
        built = stem.with_suffix(".so")
        if not built.exists():
            stem.with_suffix(".cpp").write_text(unit)
            emulation = Path(__file__).parent
            paths = ["-I", str(emulation), "-I", str(kernels.root())]
            warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-variable"]
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", *warnings]
            source = str(stem.with_suffix(".cpp"))
            command = [self._cxx, *flags, *paths, source, "-o", str(built)]
            subprocess.run(command, check=True, timeout=120)
        return ctypes.CDLL(str(built))

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


def play_device(monkeypatch: pytest.MonkeyPatch, found: Kernels, arch: str) -> None:
    """Let `adaattn_cuda.sampled` work on host memory."""

    def upload(work: Any, device: int, stream: int) -> DeviceWork:
        table = _Table(work.tobytes(), device)
        items, sources = work.addresses(table.address)
        size = table.size_bytes
        return DeviceWork(items, sources, work.rounds, work.grid, work.max_sources, size, table)

    def zero(address: int, size_bytes: int, stream: int) -> None:
        ctypes.memset(address, 0, size_bytes)

    facts = SimpleNamespace(arch=arch, multiprocessors=4)
    monkeypatch.setattr(driver, "DeviceTable", _Table)
    monkeypatch.setattr(driver, "read", lambda at, size, device: ctypes.string_at(at, size))
    monkeypatch.setattr(driver, "zero_bytes", zero)
    monkeypatch.setattr(driver, "device_facts", lambda device: facts)
    monkeypatch.setattr(sampled, "refuse_capture", lambda stream, what: None)
    monkeypatch.setattr(sampled, "upload", upload)
    monkeypatch.setattr(sampled, "_launch", found.run)
    monkeypatch.setattr(smxx_probe, "_start", found.run)
    monkeypatch.setattr(smxx_exact_rows, "_start", found.run)


def allocate(size_bytes: int) -> tuple[Any, int]:
    """Host memory full of NaN, whatever it is read as, on 16 bytes."""
    room = np.full(size_bytes + 32, 0xFF, np.uint8)
    return room, room.ctypes.data + -room.ctypes.data % 16
