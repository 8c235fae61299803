"""The manifest is light, and a machine without a GPU is told why."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest

from adaattn_core.errors import BackendUnavailableError
from adaattn_cuda import plugin
from adaattn_cuda.device import driver

LIGHT = """
import sys
import adaattn_cuda.plugin as plugin
plugin.adaattn_register_backends(lambda name, factory, probe, priority: None)
plugin.probe()
heavy = {"cupy", "torch", "cuda.core", "adaattn_cuda.backend"} & set(sys.modules)
assert not heavy, heavy
"""


def test_manifest_and_probe_import_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, timeout=60)


def test_manifest_registers_the_backend() -> None:
    register = mock.Mock()
    plugin.adaattn_register_backends(register)
    register.assert_called_once_with(
        "cuda",
        "adaattn_cuda.backend:CudaBackend",
        probe=plugin.probe,
        priority=plugin.PRIORITY,
    )


@pytest.mark.usefixtures("no_driver")
def test_probe_without_a_driver() -> None:
    assert plugin.probe() == "no CUDA driver library on this machine"
    with pytest.raises(BackendUnavailableError, match="install the NVIDIA driver"):
        driver.load_driver()


def test_probe_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "device_count", lambda: 0)
    assert plugin.probe() == "the driver sees no device"
    monkeypatch.setattr(driver, "device_count", lambda: 2)
    assert plugin.probe() is None
