"""The CUDA driver, called through cuda.bindings: what loading, launching and tables need.

Kernels are loaded as libraries, which belong to no context, so one load serves every device and
every stream. cuda.bindings is imported with the first call, not with this module.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from adaattn_core.errors import AdaAttnError, BackendUnavailableError, UnsupportedError
from adaattn_cuda.jit.codegen import ENTRY
from adaattn_cuda.jit.toolchain import INSTALL_HINT

__all__ = [
    "Call",
    "DeviceFacts",
    "DeviceTable",
    "Kernel",
    "OnDevice",
    "check",
    "current_device",
    "device_count",
    "device_facts",
    "fill_words",
    "is_capturing",
    "load_driver",
    "new_stream",
    "read",
    "release_dropped",
    "release_with",
    "zero_bytes",
]

_OLDEST_DRIVER = 12000
"""CUDA 12.0: the first with kernels that belong to no context."""

_SUCCESS = 0
_OUT_OF_MEMORY = 2
_NO_BINARY = 209
_UNSUPPORTED_PTX = 222


@cache
def load_driver() -> Any:
    """Return ``cuda.bindings.driver``, its driver library loaded and initialised.

    Raises
    ------
    BackendUnavailableError
        If cuda.bindings is not installed, there is no driver, or it does not start.
    """
    try:
        bindings = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        raise BackendUnavailableError(
            got="no cuda-bindings package",
            needed="cuda.bindings, through which the CUDA driver is called",
            do=INSTALL_HINT,
            reason="cuda-bindings is not installed",
        ) from None
    try:
        status = int(bindings.cuInit(0)[0])
    except RuntimeError:  # its own error, of a class that depends on its version
        raise BackendUnavailableError(
            got="no CUDA driver library on this machine",
            needed="an NVIDIA GPU with its driver",
            do='install the NVIDIA driver, or use backend="numpy"',
            reason="no CUDA driver",
        ) from None
    if status != _SUCCESS:
        raise BackendUnavailableError(
            got=f"the CUDA driver does not start (error {status})",
            needed="at least one usable NVIDIA GPU",
            do="look at nvidia-smi and CUDA_VISIBLE_DEVICES",
            reason=f"cuInit failed with error {status}",
        )
    if bindings.cuDriverGetVersion()[1] < _OLDEST_DRIVER:
        raise BackendUnavailableError(
            got="a CUDA driver older than 12.0",
            needed="a driver of CUDA 12.0 or newer (R525)",
            do="update the NVIDIA driver",
            reason="the CUDA driver is too old",
        )
    return bindings


def check(result: tuple[Any, ...], what: str) -> Any:
    """Return what a driver call answered beside its status.

    Raises
    ------
    AdaAttnError
        If the status is not success.
    """
    status = int(result[0])
    if status == _SUCCESS:
        return result[1] if len(result) == 2 else result[1:]
    text = load_driver().cuGetErrorString(result[0])[1]
    meaning = text.decode() if text else "unknown error"
    if status == _OUT_OF_MEMORY:
        do = "free device memory, or make the batch smaller"
    elif status in (_NO_BINARY, _UNSUPPORTED_PTX):
        do = "update the NVIDIA driver, or install an NVRTC no newer than it (adaattn doctor)"
    else:
        do = "an earlier kernel's error may surface here: try CUDA_LAUNCH_BLOCKING=1"
    raise AdaAttnError(
        got=f"{what}: CUDA error {status}, {meaning}",
        needed="a successful driver call",
        do=do,
        status=status,
    )


def device_count() -> int:
    """Return the number of visible devices."""
    return int(check(load_driver().cuDeviceGetCount(), "counting devices"))


@dataclass(frozen=True)
class DeviceFacts:
    """What tuning needs to know about a device.

    Attributes
    ----------
    arch : str
        Architecture to compile for: ``sm_90a`` on Hopper, ``sm_<major><minor>`` elsewhere.
    smem_bytes : int
        Most dynamic shared memory of one block.
    """

    name: str
    arch: str
    multiprocessors: int
    smem_bytes: int


@cache
def device_facts(device: int) -> DeviceFacts:
    """Return facts about one device.

    Raises
    ------
    UnsupportedError
        If it is older than Ampere.
    """
    cuda = load_driver()

    def attribute(name: str) -> int:
        which = getattr(cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(
            check(cuda.cuDeviceGetAttribute(which, device), "asking for a device attribute")
        )

    label = check(cuda.cuDeviceGetName(256, device), "device name")
    name = label.split(b"\0", 1)[0].decode()
    major = attribute("COMPUTE_CAPABILITY_MAJOR")
    minor = attribute("COMPUTE_CAPABILITY_MINOR")
    if major < 8:
        raise UnsupportedError(
            got=f"{name}, compute capability {major}.{minor}",
            needed="compute capability 8.0 (Ampere) or newer",
            do='use backend="numpy" on this machine',
            arch=f"sm_{major}{minor}",
        )
    arch = "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
    return DeviceFacts(
        name,
        arch,
        attribute("MULTIPROCESSOR_COUNT"),
        attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
    )


def current_device() -> int:
    """Return the device of the calling thread's context, or -1 without one."""
    status, device = load_driver().cuCtxGetDevice()
    return int(device) if int(status) == _SUCCESS else -1


@cache
def _primary_context(device: int) -> Any:
    return check(load_driver().cuDevicePrimaryCtxRetain(device), "making a context")


class OnDevice:
    """Make a device's primary context current for a while; nothing to do if it already is."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._pushed = False

    def __enter__(self) -> None:
        if current_device() != self._device:
            check(
                load_driver().cuCtxPushCurrent(_primary_context(self._device)),
                "entering a device",
            )
            self._pushed = True

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            load_driver().cuCtxPopCurrent()


def is_capturing(stream: int) -> bool:
    """Whether a stream is recording a CUDA graph."""
    return int(check(load_driver().cuStreamIsCapturing(stream), "asking a stream")) != 0


def read(address: int, size_bytes: int, device: int) -> bytes:
    """Return bytes from device memory, after everything that the device was asked to do.

    Raises
    ------
    AdaAttnError
        If a stream is recording a CUDA graph, in which nothing may be waited for.
    """
    cuda, found = load_driver(), ctypes.create_string_buffer(size_bytes)
    with OnDevice(device):
        check(cuda.cuCtxSynchronize(), "waiting for the figures of a certificate")
        check(
            cuda.cuMemcpyDtoH(ctypes.addressof(found), address, size_bytes),
            "reading the figures of a certificate",
        )
    return found.raw


class Kernel:
    """A loaded kernel, launchable on every device it was compiled for.

    Parameters
    ----------
    cubin : bytes
    smem_bytes : int
        Dynamic shared memory of every launch.
    threads : int
        Threads of a block.
    """

    def __init__(self, cubin: bytes, smem_bytes: int, threads: int) -> None:
        cuda = load_driver()
        self._cubin = cubin  # the driver reads it lazily: it must stay
        self.smem_bytes = smem_bytes
        self.threads = threads
        self._ready: set[int] = set()
        self._lock = threading.Lock()
        module = check(
            cuda.cuLibraryLoadData(cubin, [], [], 0, [], [], 0),
            "loading a kernel",
        )
        self._kernel = check(
            cuda.cuLibraryGetKernel(module, ENTRY.encode()), "finding the kernel's entry"
        )
        self.function = cuda.CUfunction(int(self._kernel))  # launches take the one as the other

    def prepare(self, device: int) -> None:
        """Raise the shared-memory limit on one device; once is enough."""
        if device in self._ready:
            return
        cuda = load_driver()
        limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._lock:
            check(
                cuda.cuKernelSetAttribute(limit, self.smem_bytes, self._kernel, device),
                f"reserving {self.smem_bytes} bytes of shared memory",
            )
            self._ready.add(device)


class Call:
    """A kernel with its grid and its parameters, ready to be started again and again.

    The parameters, a ctypes structure or buffer, are read at every start, so what is written
    into them in between counts; the driver copies them before a start returns. An `early`
    kernel may be started while what is before it on the stream still runs: it waits for that
    itself (``griddepcontrol.wait``, from compute capability 9.0 on).
    """

    def __init__(
        self, kernel: Kernel, params: Any, grid: int, stream: int = 0, early: bool = False
    ) -> None:
        cuda = load_driver()
        self._launch = cuda.cuLaunchKernelEx
        # The driver takes the address of a list of addresses of parameters: both are kept.
        self._params = params
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._config = cuda.CUlaunchConfig()
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = grid, 1, 1
        self._config.blockDimX = kernel.threads
        self._config.blockDimY = self._config.blockDimZ = 1
        self._config.sharedMemBytes = kernel.smem_bytes
        self._config.hStream = stream
        if early:
            attribute = cuda.CUlaunchAttribute()
            names = cuda.CUlaunchAttributeID
            attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self._config.attrs, self._config.numAttrs = [attribute], 1
        self._arguments = (
            self._config, kernel.function, ctypes.addressof(self._pointers), 0
        )  # fmt: skip

    def to(self, stream: int) -> Call:
        """Choose the stream of the starts that follow."""
        self._config.hStream = stream
        return self

    def start(self, device: int) -> None:
        """Enqueue it."""
        if current_device() == device:
            result = self._launch(*self._arguments)
        else:
            with OnDevice(device):
                result = self._launch(*self._arguments)
        if int(result[0]) != _SUCCESS:
            check(result, "launching a kernel")


def new_stream(device: int, priority: int = 0) -> Any:
    """Return a new stream that waits for no other; below 0 its work goes before others'."""
    cuda = load_driver()
    with OnDevice(device):
        flag = int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return check(cuda.cuStreamCreateWithPriority(flag, priority), "making a stream")


@cache
def _copy_stream(device: int) -> Any:
    """Return the stream of our own that tables are copied on."""
    return new_stream(device)


# What nobody holds any more, to be given back by `release_dropped`. Python may drop an object
# at any moment, and while the caller records a CUDA graph nothing may wait or free.
_DROPPED: deque[tuple[int, Callable[..., Any], Any]] = deque()


def release_with(owner: object, device: int, release: Callable[..., Any], what: Any) -> None:
    """Have `release(what)` called some time after `owner` is gone and its work is done.

    Whoever starts work holds `owner` until it is enqueued. A CUDA graph that a caller records
    holds nothing: its work is not known here.
    """
    at = weakref.finalize(owner, _DROPPED.append, (device, release, what))
    at.atexit = False  # the driver frees everything when the process ends


def release_dropped() -> None:
    """Give back what was dropped so far; not while the caller records a CUDA graph.

    Any thread may call it: each gives back what it took, after its own wait.

    Raises
    ------
    AdaAttnError
        If a device cannot be waited for; what was taken is kept for the next time.
    """
    taken: list[tuple[int, Callable[..., Any], Any]] = []
    with suppress(IndexError):  # empty, or another thread took the rest
        while True:
            taken.append(_DROPPED.popleft())
    try:
        # cuMemFree does not wait for memory of cuMemAllocAsync: a kernel may still read it.
        # What is dropped from here on may have work behind this wait, and is left for the next.
        for device in {device for device, _, _ in taken}:
            with OnDevice(device):
                check(load_driver().cuCtxSynchronize(), "waiting before memory is freed")
    except AdaAttnError:
        _DROPPED.extend(taken)
        raise
    for device, release, what in taken:
        with OnDevice(device):
            release(what)  # its status is not looked at: nobody could do anything about it


class DeviceTable:
    """Bytes on the device, ready for every stream, freed some time after this object.

    Not to be made while the caller records a CUDA graph. They are copied on a stream of their
    own. That copy is waited for, and what the caller has queued only where older tables are
    given back: a wait for the whole device, which breaks a recording of any other thread.
    """

    def __init__(self, data: bytes, device: int) -> None:
        cuda = load_driver()
        release_dropped()
        self.size_bytes = len(data)
        stream = _copy_stream(device)
        with OnDevice(device):
            address = check(cuda.cuMemAllocAsync(len(data), stream), "allocating a work list")
            self.address = int(address)
            release_with(self, device, cuda.cuMemFree, self.address)
            check(
                cuda.cuMemcpyHtoDAsync(address, data, len(data), stream),
                "copying a work list",
            )
            check(cuda.cuStreamSynchronize(stream), "copying a work list")


def copy_on_device(to: int, source: int, size_bytes: int, stream: int) -> None:
    """Copy memory of the device, in the order of the stream."""
    check(load_driver().cuMemcpyDtoDAsync(to, source, size_bytes, stream), "copying memory")


def fill_words(address: int, value: int, count: int, stream: int) -> None:
    """Set `count` 32-bit words on the device to `value`, in the order of the stream."""
    check(
        load_driver().cuMemsetD32Async(address, value & 0xFFFFFFFF, count, stream),
        "filling memory",
    )


def zero_bytes(address: int, size_bytes: int, stream: int) -> None:
    """Set bytes on the device to 0, in the order of the stream."""
    if size_bytes:
        check(load_driver().cuMemsetD8Async(address, 0, size_bytes, stream), "zeroing memory")
