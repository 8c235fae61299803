"""The driver's door, with a recording library in its place."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from adaattn_core.errors import AdaAttnError, BackendUnavailableError, UnsupportedError
from adaattn_cuda import plugin
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of, start_once
from adaattn_cuda.jit.spec import KernelSpec


class Config:
    """``CUlaunchConfig``."""

    attrs: Any = ()
    numAttrs = 0  # noqa: N815


class Attribute:
    """``CUlaunchAttribute``."""

    def __init__(self) -> None:
        self.value = SimpleNamespace()


class Library:
    """Answers as a machine with one device; `current` is the device of the thread's context."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=132,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=232448,
    )
    CUlaunchConfig = Config
    CUlaunchAttribute = Attribute
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="serialization"
    )

    def __init__(self) -> None:
        self.current, self.status, self.capability, self.capturing = 0, 0, (9, 0), False
        self.log: list[Any] = []

    def cuCtxGetDevice(self) -> Any:  # noqa: N802
        return (0, self.current) if self.current >= 0 else (201, None)

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:  # noqa: N802
        return 0, 1000 + device

    def cuCtxPushCurrent(self, context: Any) -> Any:  # noqa: N802
        self.log.append(("push", context))
        return (0,)

    def cuCtxPopCurrent(self) -> Any:  # noqa: N802
        self.log.append("pop")
        return 0, 1

    def cuLaunchKernelEx(self, c: Any, function: Any, pointers: int, extra: int) -> Any:  # noqa: N802
        address = ctypes.c_void_p.from_address(pointers).value
        assert address is not None
        value = ctypes.c_int.from_address(address).value
        grid = (c.gridDimX, c.gridDimY, c.gridDimZ)
        block = (c.blockDimX, c.blockDimY, c.blockDimZ)
        self.log.append((grid, block, c.sharedMemBytes, c.hStream, function, value))
        assert extra == 0
        return (self.status,)

    def cuGetErrorString(self, status: int) -> Any:  # noqa: N802
        return 0, b"a reason"

    def cuDeviceGetName(self, size: int, device: int) -> Any:  # noqa: N802
        return 0, b"a card" + bytes(size - 6)

    def cuDeviceGetAttribute(self, which: Any, device: int) -> Any:  # noqa: N802
        major, minor = self.capability
        return 0, {"major": major, "minor": minor}.get(which, which)

    def cuStreamIsCapturing(self, stream: int) -> Any:  # noqa: N802
        return 0, int(self.capturing)


class Kernel:
    function, threads, smem_bytes = 5, 384, 4096


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    fake = Library()
    monkeypatch.setattr(driver, "load_driver", lambda: fake)
    driver.device_facts.cache_clear()
    driver._primary_context.cache_clear()
    yield fake
    driver.device_facts.cache_clear()
    driver._primary_context.cache_clear()


def test_a_call_reads_its_parameters_at_every_start(library: Library) -> None:
    params = ctypes.c_int(7)
    call = driver.Call(Kernel(), params, 33, stream=99)  # type: ignore[arg-type]
    call.start(0)
    params.value = 8
    call.to(100).start(0)
    same = ((33, 1, 1), (384, 1, 1), 4096)
    assert library.log == [(*same, 99, 5, 7), (*same, 100, 5, 8)]


def test_an_early_kernel_may_overlap_what_is_before_it(library: Library) -> None:
    for early in (False, True):
        call = driver.Call(Kernel(), ctypes.c_int(7), 1, early=early)  # type: ignore[arg-type]
        found = [(a.id, a.value.programmaticStreamSerializationAllowed)
                 for a in call._config.attrs[: call._config.numAttrs]]  # fmt: skip
        assert found == [("serialization", 1)] * early


@pytest.mark.parametrize("current", [1, -1])
def test_another_or_no_current_device_is_put_back(library: Library, current: int) -> None:
    library.current = current
    driver.Call(Kernel(), ctypes.c_int(7), 1).start(0)  # type: ignore[arg-type]
    assert [library.log[0], library.log[2]] == [("push", 1000), "pop"]
    assert len(library.log) == 3


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(2, "free device memory"), (209, "no newer than it"), (700, "earlier")],
)
def test_errors_say_what_to_do(library: Library, status: int, remedy: str) -> None:
    library.status = status
    with pytest.raises(AdaAttnError, match=remedy) as caught:
        driver.Call(Kernel(), ctypes.c_int(7), 1).start(0)  # type: ignore[arg-type]
    assert f"CUDA error {status}, a reason" in str(caught.value)


def test_devices_older_than_ampere_are_refused(library: Library) -> None:
    assert driver.device_facts(0).arch == "sm_90a"
    driver.device_facts.cache_clear()
    library.capability = (7, 5)
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5"):
        driver.device_facts(0)


def test_nothing_is_loaded_during_a_capture(library: Library) -> None:
    library.capturing = True
    with pytest.raises(UnsupportedError, match="CUDA-graph capture"):
        kernel_of(KernelSpec("never_loaded", (), 0, "sm_90a"), 128, 99)


def test_a_grid_without_blocks_starts_nothing(library: Library) -> None:
    """The driver refuses it, and nothing is compiled for it."""
    start_once(KernelSpec("never_compiled", (), 0, "sm_90a"), 128, None, 0, 0, 0)
    assert not library.log


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"cuInit": lambda flags: (100,)}, "cuInit failed with error 100"),
        ({"cuDriverGetVersion": lambda: (0, 11080)}, "too old"),
    ],
)
def test_drivers_that_do_not_serve(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], reason: str
) -> None:
    good = {"cuInit": lambda flags: (0,), "cuDriverGetVersion": lambda: (0, 13000)}
    for name, answer in (good | answers).items():
        monkeypatch.setattr(f"cuda.bindings.driver.{name}", answer)
    driver.load_driver.cache_clear()
    with pytest.raises(BackendUnavailableError) as caught:
        driver.load_driver()
    assert reason in caught.value.reason
    driver.load_driver.cache_clear()


def test_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    driver.load_driver.cache_clear()
    with pytest.raises(BackendUnavailableError, match="no cuda-bindings package"):
        driver.load_driver()
    assert plugin.probe() == "no cuda-bindings package"
    driver.load_driver.cache_clear()
