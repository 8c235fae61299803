"""Skips with a reason where NVRTC, g++ or a GPU is missing; no test uses the user's cache."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaattn_core.errors import BackendUnavailableError
from adaattn_cuda import plugin
from adaattn_cuda.device import driver
from adaattn_cuda.jit.toolchain import nvrtc_version

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
from far_on_cpu import far_library
from kernels_on_cpu import Kernels
from sm80_on_cpu import Emulator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {"nvrtc": _no_nvrtc(), "gpu": plugin.probe()}
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def _no_nvrtc() -> str | None:
    try:
        nvrtc_version()
    except BackendUnavailableError as error:
        return error.got
    return None


@pytest.fixture(scope="session")
def shared_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the kernels of all GPU tests of a run, of every worker of it.

    A run compiles some hundred kernels; ``ADAATTN_TEST_CACHE_DIR`` keeps them between runs.
    """
    kept = os.environ.get("ADAATTN_TEST_CACHE_DIR")
    if kept:
        return Path(kept)
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "gpu-kernels"


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest,
    shared_kernels: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No test reads or writes the user's cache; those without a GPU have one each."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    folder = shared_kernels if on_gpu else tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ADAATTN_CACHE_DIR", str(folder))
    for name in ("ADAATTN_NO_JIT", "ADAATTN_KEEP", "ADAATTN_QUIET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def cxx() -> str:
    """Path of a C++ compiler."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++ on this machine: kernels cannot be emulated")
    return found


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that no driver library is installed."""

    def fail(flags: int) -> None:
        raise RuntimeError("no libcuda.so.1")

    driver.load_driver.cache_clear()
    monkeypatch.setattr("cuda.bindings.driver.cuInit", fail)
    yield
    driver.load_driver.cache_clear()


@pytest.fixture(scope="session")
def emulator(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The sm80 kernel on a CPU; a specialisation is compiled once for all tests."""
    return Emulator(cxx, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def kernels(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Any kernel of every GPU's on a CPU; a specialisation is compiled once for all tests."""
    return Kernels(cxx, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def far_unit(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The planning kernels on a CPU, compiled once for all tests."""
    return far_library(cxx, tmp_path_factory.mktemp("far"))
