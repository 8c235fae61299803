"""The CUDA driver, called through ctypes: the dozen functions a launch needs.

ctypes, because nothing has to be installed for it and importing it costs nothing: a cold
process with a warm kernel cache starts in milliseconds. Kernels are loaded as libraries, which
belong to no context, so one load serves every device and every stream.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

from adaattn_core.errors import AdaAttnError, BackendUnavailableError, UnsupportedError
from adaattn_cuda.jit.codegen import ENTRY

__all__ = [
    "Call",
    "DeviceFacts",
    "DeviceTable",
    "Kernel",
    "current_device",
    "device_count",
    "device_facts",
    "is_capturing",
    "load_driver",
    "read",
]

_SUCCESS = 0
_OUT_OF_MEMORY = 2
_NO_BINARY = 209
_UNSUPPORTED_PTX = 222

_ATTRIBUTE_MULTIPROCESSORS = 16
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76
_ATTRIBUTE_SMEM_OPTIN = 97
_FUNCTION_MAX_DYNAMIC_SMEM = 8
_STREAM_NON_BLOCKING = 1


@cache
def load_driver() -> ctypes.CDLL:
    """Return the initialised driver library.

    Raises
    ------
    BackendUnavailableError
        If there is no driver, or it does not start.
    """
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise BackendUnavailableError(
            got="no CUDA driver library on this machine",
            needed="an NVIDIA GPU with its driver",
            do='install the NVIDIA driver, or use backend="numpy"',
            reason="no CUDA driver",
        )
    if not hasattr(library, "cuLibraryLoadData"):
        raise BackendUnavailableError(
            got="a CUDA driver older than 12.0",
            needed="a driver of CUDA 12.0 or newer (R525)",
            do="update the NVIDIA driver",
            reason="the CUDA driver is too old",
        )
    status = library.cuInit(0)
    if status != _SUCCESS:
        raise BackendUnavailableError(
            got=f"the CUDA driver does not start (error {status})",
            needed="at least one usable NVIDIA GPU",
            do="look at nvidia-smi and CUDA_VISIBLE_DEVICES",
            reason=f"cuInit failed with error {status}",
        )
    return library


def check(status: int, what: str) -> None:
    """Raise AdaAttnError unless a driver call succeeded."""
    if status == _SUCCESS:
        return
    library = load_driver()
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    meaning = (text.value or b"unknown error").decode()
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
    count = ctypes.c_int()
    check(load_driver().cuDeviceGetCount(ctypes.byref(count)), "counting devices")
    return count.value


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
    library = load_driver()

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        status = library.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        check(status, "asking for a device attribute")
        return value.value

    label = ctypes.create_string_buffer(256)
    check(library.cuDeviceGetName(label, 256, device), "device name")
    name = label.value.decode()
    major, minor = attribute(_ATTRIBUTE_MAJOR), attribute(_ATTRIBUTE_MINOR)
    if major < 8:
        raise UnsupportedError(
            got=f"{name}, compute capability {major}.{minor}",
            needed="compute capability 8.0 (Ampere) or newer",
            do='use backend="numpy" on this machine',
            arch=f"sm_{major}{minor}",
        )
    arch = "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
    return DeviceFacts(
        name, arch, attribute(_ATTRIBUTE_MULTIPROCESSORS), attribute(_ATTRIBUTE_SMEM_OPTIN)
    )


class _Answer(threading.local):
    """Where the driver writes a device's number; one of each thread, since it is used often."""

    def __init__(self) -> None:
        self.device = ctypes.c_int()
        self.address = ctypes.byref(self.device)


_answer = _Answer()


def current_device() -> int:
    """Return the device of the calling thread's context, or -1 without one."""
    status = load_driver().cuCtxGetDevice(_answer.address)
    return _answer.device.value if status == _SUCCESS else -1


@cache
def _primary_context(device: int) -> ctypes.c_void_p:
    context = ctypes.c_void_p()
    check(
        load_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        "making a context",
    )
    return context


class OnDevice:
    """Make a device's primary context current for a while; nothing to do if it already is."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._pushed = False

    def __enter__(self) -> None:
        if current_device() != self._device:
            check(
                load_driver().cuCtxPushCurrent_v2(_primary_context(self._device)),
                "entering a device",
            )
            self._pushed = True

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            load_driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def is_capturing(stream: int) -> bool:
    """Whether a stream is recording a CUDA graph."""
    state = ctypes.c_int()
    check(
        load_driver().cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(state)),
        "asking a stream",
    )
    return state.value != 0


def read(address: int, size_bytes: int, device: int) -> bytes:
    """Return bytes from device memory, after everything that the device was asked to do.

    Raises
    ------
    AdaAttnError
        If a stream is recording a CUDA graph, in which nothing may be waited for.
    """
    library, found = load_driver(), ctypes.create_string_buffer(size_bytes)
    with OnDevice(device):
        check(library.cuCtxSynchronize(), "waiting for the figures of a certificate")
        check(
            library.cuMemcpyDtoH_v2(
                found, ctypes.c_uint64(address), ctypes.c_size_t(size_bytes)
            ),
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
        self._library = load_driver()
        self._cubin = cubin  # the driver reads it lazily: it must stay
        self.smem_bytes = smem_bytes
        self.threads = threads
        self._ready: set[int] = set()
        self._lock = threading.Lock()
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        none = ctypes.c_void_p()
        check(
            self._library.cuLibraryLoadData(
                ctypes.byref(module), cubin, none, none, 0, none, none, 0
            ),
            "loading a kernel",
        )
        check(
            self._library.cuLibraryGetKernel(
                ctypes.byref(self.function), module, ENTRY.encode()
            ),
            "finding the kernel's entry",
        )

    def prepare(self, device: int) -> None:
        """Raise the shared-memory limit on one device; once is enough."""
        if device in self._ready:
            return
        with self._lock:
            check(
                self._library.cuKernelSetAttribute(
                    _FUNCTION_MAX_DYNAMIC_SMEM, self.smem_bytes, self.function, device
                ),
                f"reserving {self.smem_bytes} bytes of shared memory",
            )
            self._ready.add(device)

    def launch(self, device: int, grid: int, stream: int, params: Any) -> None:
        """Start ``grid`` blocks on a stream; ``params`` is a ctypes structure or buffer.

        The driver copies the parameters before it returns.
        """
        self.prepare(device)
        Call(self, params, grid, stream).start(device)


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("smem_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class Call:
    """A kernel with its grid and its parameters, ready to be started again and again.

    The parameters are read at every start, so what is written into them in between counts.
    """

    def __init__(self, kernel: Kernel, params: Any, grid: int, stream: int = 0) -> None:
        self._launch = load_driver().cuLaunchKernelEx
        self._params = params  # kept: the array below holds its address
        self._config = _LaunchConfig(
            grid, 1, 1, kernel.threads, 1, 1, kernel.smem_bytes, stream
        )  # fmt: skip
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._arguments = (ctypes.byref(self._config), kernel.function, pointers, None)

    def to(self, stream: int) -> Call:
        """Choose the stream of the starts that follow."""
        self._config.stream = stream
        return self

    def start(self, device: int) -> None:
        """Enqueue it."""
        if current_device() == device:
            status = self._launch(*self._arguments)
        else:
            with OnDevice(device):
                status = self._launch(*self._arguments)
        if status != _SUCCESS:
            check(status, "launching a kernel")


@cache
def _copy_stream(device: int) -> ctypes.c_void_p:
    """Return a stream of our own, which waits for no other."""
    stream = ctypes.c_void_p()
    with OnDevice(device):
        check(
            load_driver().cuStreamCreate(ctypes.byref(stream), _STREAM_NON_BLOCKING),
            "making a stream",
        )
    return stream


def _free(library: ctypes.CDLL, device: int, address: int) -> None:
    with OnDevice(device):
        # cuMemFree waits for the device, so no kernel can still be reading the memory.
        library.cuMemFree_v2(ctypes.c_uint64(address))


class DeviceTable:
    """Bytes on the device, ready for every stream, freed with this object.

    They are copied on a stream of their own, and only that copy is waited for: nothing that the
    caller has queued is.
    """

    def __init__(self, data: bytes, device: int) -> None:
        library = load_driver()
        self.size_bytes = len(data)
        stream, address = _copy_stream(device), ctypes.c_uint64()
        size = ctypes.c_size_t(len(data))
        with OnDevice(device):
            check(
                library.cuMemAllocAsync(ctypes.byref(address), size, stream),
                "allocating a work list",
            )
            self.address = address.value
            release = weakref.finalize(self, _free, library, device, address.value)
            release.atexit = False  # the driver frees everything when the process ends
            check(
                library.cuMemcpyHtoDAsync_v2(address, data, size, stream),
                "copying a work list",
            )
            check(library.cuStreamSynchronize(stream), "copying a work list")


def fill_words(address: int, value: int, count: int, stream: int) -> None:
    """Set `count` 32-bit words on the device to `value`, in the order of the stream."""
    check(
        load_driver().cuMemsetD32Async(
            ctypes.c_uint64(address), ctypes.c_uint(value & 0xFFFFFFFF), ctypes.c_size_t(count),
            ctypes.c_void_p(stream),
        ),
        "filling memory",
    )  # fmt: skip
