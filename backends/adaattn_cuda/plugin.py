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
    """Add ``warmup``, ``cache`` and ``kernels``; they also work on a machine without a GPU."""
    importlib.import_module("adaattn_cuda.commands").register(group)


def probe() -> str | None:
    """Why no kernel can run here, or None: asks the driver alone, through cuda.bindings."""
    driver = importlib.import_module("adaattn_cuda.device.driver")
    try:
        count = driver.device_count()
    except BackendUnavailableError as error:
        return error.got
    return None if count else "the driver sees no device"
