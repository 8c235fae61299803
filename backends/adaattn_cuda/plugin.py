"""Plugin manifest: names the backend by import string; reading it touches no device library."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from adaattn_core.errors import BackendUnavailableError
from adaattn_core.plugins import hookimpl

PRIORITY = 20
"""``"auto"`` asks it before the other backends of this distribution."""


@hookimpl
def adaattn_register_backends(register: Callable[..., None]) -> None:
    """Register the backend ``cuda``."""
    register("cuda", "adaattn_cuda.backend:CudaBackend", probe=probe, priority=PRIORITY)


@hookimpl
def adaattn_register_commands(group: Any) -> None:
    """Add ``cache`` and ``kernels``; they also work on a machine without a GPU."""
    importlib.import_module("adaattn_cuda.commands").register(group)


@hookimpl
def adaattn_warm_up(say: Callable[[str], None], arch: str | None, jobs: int) -> None:
    """Compile the usual kernels, for the devices of this machine or for `arch`."""
    reason = None if arch else probe()
    if reason is not None:
        say(f"cuda: no kernel compiled ({reason}); --arch sm_90a compiles for one elsewhere")
        return
    importlib.import_module("adaattn_cuda.commands").warm_up(say, arch, jobs)


def probe() -> str | None:
    """Why no kernel can run here, or None: asks the driver alone, through cuda.bindings."""
    driver = importlib.import_module("adaattn_cuda.device.driver")
    try:
        count = driver.device_count()
    except BackendUnavailableError as error:
        return error.got
    return None if count else "the driver sees no device"
