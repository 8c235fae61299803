"""The driver's door, with a recording library in its place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from adaattn_core.errors import AdaAttnError, UnsupportedError
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of
from adaattn_cuda.jit.spec import KernelSpec


class Library:
    """Answers as a machine with one device; `current` is the device of the thread's context."""

    def __init__(self) -> None:
        self.current, self.status, self.capability, self.capturing = 0, 0, (9, 0), False
        self.log: list[Any] = []

    def cuCtxGetDevice(self, place: Any) -> int:  # noqa: N802
        place._obj.value = max(self.current, 0)
        return 0 if self.current >= 0 else 201

    def cuDevicePrimaryCtxRetain(self, place: Any, device: int) -> int:  # noqa: N802
        place._obj.value = 1000 + device
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.log.append(("push", context.value))
        return 0

    def cuCtxPopCurrent_v2(self, place: Any) -> int:  # noqa: N802
        self.log.append("pop")
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: Any) -> int:  # noqa: N802
        c = config._obj
        value = ctypes.cast(pointers[0], ctypes.POINTER(ctypes.c_int))[0]
        grid, block = (c.grid_x, c.grid_y, c.grid_z), (c.block_x, c.block_y, c.block_z)
        self.log.append((grid, block, c.smem_bytes, c.stream, function.value, value))
        assert (c.attributes, c.attribute_count, extra) == (None, 0, None)
        return self.status

    def cuGetErrorString(self, status: int, place: Any) -> int:  # noqa: N802
        place._obj.value = b"a reason"
        return 0

    def cuDeviceGetName(self, place: Any, size: int, device: int) -> int:  # noqa: N802
        place.value = b"a card"
        return 0

    def cuDeviceGetAttribute(self, place: Any, which: int, device: int) -> int:  # noqa: N802
        answers = {75: self.capability[0], 76: self.capability[1], 16: 132, 97: 232448}
        place._obj.value = answers[which]
        return 0

    def cuStreamIsCapturing(self, stream: Any, place: Any) -> int:  # noqa: N802
        place._obj.value = int(self.capturing)
        return 0


class Kernel:
    function, threads, smem_bytes = ctypes.c_void_p(5), 384, 4096


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    fake = Library()
    monkeypatch.setattr(driver, "load_driver", lambda: fake)
    driver.device_facts.cache_clear()
    driver._primary_context.cache_clear()
    yield fake
    driver.device_facts.cache_clear()
    driver._primary_context.cache_clear()


def test_launch_configuration_is_laid_out_as_in_cuda_h() -> None:
    config = driver._LaunchConfig
    assert ctypes.sizeof(config) == 56
    assert (config.stream.offset, config.attributes.offset) == (32, 40)


def test_a_call_reads_its_parameters_at_every_start(library: Library) -> None:
    params = ctypes.c_int(7)
    call = driver.Call(Kernel(), params, 33, stream=99)  # type: ignore[arg-type]
    call.start(0)
    params.value = 8
    call.to(100).start(0)
    same = ((33, 1, 1), (384, 1, 1), 4096)
    assert library.log == [(*same, 99, 5, 7), (*same, 100, 5, 8)]


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
