"""The machine here: what it is, what it can do at most, and what it used."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from adaattn_core.errors import ArgumentError, BackendUnavailableError

MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
REPEATS = 5


@cache
def torch_module() -> Any:
    """Return torch, or None where it is not installed: NumPy's backend is measured without."""
    return importlib.import_module("torch") if importlib.util.find_spec("torch") else None


def checked_device(name: str) -> str:
    """Return ``cpu`` or ``cuda``; ``auto`` takes a GPU if torch sees one.

    Raises
    ------
    ArgumentError
        If the name is another one.
    BackendUnavailableError
        If a GPU is asked for and there is none.
    """
    torch = torch_module()
    has_gpu = torch is not None and torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name not in MATMUL_SIZE:
        raise ArgumentError(
            got=f"--device {name}", needed="auto, cpu or cuda", do="leave it out to find out"
        )
    if name == "cuda" and not has_gpu:
        raise BackendUnavailableError(
            got="--device cuda" + ("" if torch else ", without torch"),
            needed="a GPU that torch sees: its arrays are made there",
            do="measure the CPU with --device cpu, or see `adaattn doctor`",
            reason="no device",
        )
    return name


def describe(device: str) -> dict[str, Any]:
    """Name and versions, for the head of every report."""
    torch = torch_module()
    facts: dict[str, Any] = {
        "device": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": None if torch is None else torch.__version__,
    }
    if device == "cuda":
        facts |= {
            "device": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine reaches on the two plainest jobs, measured in this process.

    Attributes
    ----------
    matmul : float
        Floating point operations a second of one large product in the format of the inputs.
    copy : float
        Bytes a second read and written by one large copy.
    """

    matmul: float
    copy: float


def measure_rates(device: str, dtype: str) -> Rates:
    """Measure both; the best of a few tries, since nothing makes them faster than they are."""
    size, count = MATMUL_SIZE[device], COPY_BYTES[device]
    if device == "cuda":
        torch = torch_module()
        a = torch.randn(size, size, device="cuda").to(getattr(torch, dtype))
        source = torch.empty(count, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        product, copy = lambda: a @ a, lambda: target.copy_(source)
        wait = torch.cuda.synchronize
    else:
        rng = np.random.default_rng(0)
        b = rng.standard_normal((size, size)).astype(np.float32)  # narrower ones are emulated
        origin = np.zeros(count, np.uint8)
        sink = np.empty_like(origin)
        product, copy = lambda: b @ b, lambda: np.copyto(sink, origin)

        def wait() -> None:
            pass

    return Rates(2.0 * size**3 / _best(product, wait), 2.0 * count / _best(copy, wait))


def _best(call: Any, wait: Any) -> float:
    call()
    wait()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return min(times)


# --- memory -----------------------------------------------------------------------------------
class PeakMemory:
    """Bytes that a call needed beyond what was there before; a context manager.

    On a GPU of torch's allocator, which this library's outputs and workspaces come from where
    torch is installed; on Linux of the process (VmHWM, reset before); elsewhere unknown.

    Attributes
    ----------
    bytes : int or None
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch = torch_module()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            self._before = _resident("VmRSS") if _forget_peak() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch = torch_module()
            torch.cuda.synchronize()
            peak: int | None = torch.cuda.max_memory_allocated()
        else:
            peak = _resident("VmHWM")
        if peak is not None and self._before is not None:
            self.bytes = max(peak - self._before, 0)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else None


# --- utilisation ------------------------------------------------------------------------------
class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Utilization:
    """Samples how busy the GPU is, by NVML, while a `with` block runs.

    NVML's figure is the share of its last sampling period (up to a sixth of a second) in which
    some kernel ran: it shows a device that waits for its host, not how well kernels use it.
    Samples before `LEAD_SECONDS` still speak of what ran before, and are left out. Power is the
    energy counter's difference over the block, since NVML's own power is a mean over a second.

    Attributes
    ----------
    percent, watts : float or None
        Means over the block; None without NVML, or where the block was too short.
    """

    SECONDS = 0.35
    """How long a block should be."""
    LEAD_SECONDS = 0.18
    PERIOD_SECONDS = 0.02

    def __init__(self, device: str) -> None:
        self.percent: float | None = None
        self.watts: float | None = None
        none: tuple[Any, Any] = (None, None)
        self._library, self._handle = _nvml() if device == "cuda" else none
        self._stop = threading.Event()
        self._samples: list[int] = []

    def __enter__(self) -> Utilization:
        if self._library is not None:
            self._energy, self._started = self._millijoules(), time.perf_counter()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._library is None:
            return
        seconds, energy = time.perf_counter() - self._started, self._millijoules()
        self._stop.set()
        self._thread.join()
        if self._samples:
            self.percent = sum(self._samples) / len(self._samples)
        if self._energy is not None and energy is not None and seconds > self.LEAD_SECONDS:
            self.watts = (energy - self._energy) / 1e3 / seconds

    def _watch(self) -> None:
        found = _Utilization()
        if self._stop.wait(self.LEAD_SECONDS):
            return
        while not self._stop.wait(self.PERIOD_SECONDS):
            failed = self._library.nvmlDeviceGetUtilizationRates(
                self._handle, ctypes.byref(found)
            )
            if not failed:
                self._samples.append(found.gpu)

    def _millijoules(self) -> int | None:
        """Energy since the driver was loaded."""
        found = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(
            self._handle, ctypes.byref(found)
        )
        return None if failed else found.value


def _driver() -> str | None:
    """Version of the GPU's driver, where NVML says it."""
    library, _ = _nvml()
    text = ctypes.create_string_buffer(80)
    if library is None or library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))):
        return None
    return text.value.decode()


@cache
def _nvml() -> tuple[Any, Any]:
    """Return the library and the device that torch uses, or two Nones."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, None
    handle = ctypes.c_void_p()
    torch = torch_module()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # By UUID: NVML counts devices that CUDA_VISIBLE_DEVICES hides.
    name = f"GPU-{properties.uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None, None
    return library, handle
