"""Plugin manifest: names the backend by import string; reading it does not import PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

from adaattn_core.plugins import hookimpl

PRIORITY = 10
"""``"auto"`` asks it after ``cuda`` and before ``numpy``."""


@hookimpl
def adaattn_register_backends(register: Callable[..., None]) -> None:
    """Register the backend ``torch``; it runs wherever PyTorch does."""
    register("torch", "adaattn_torch.backend:TorchBackend", probe=probe, priority=PRIORITY)


def probe() -> str | None:
    """Why it cannot run here, or None; finds PyTorch without importing it."""
    return None if importlib.util.find_spec("torch") else "PyTorch is not installed"


@hookimpl
def adaattn_warm_up(say: Callable[[str], None], arch: str | None) -> None:
    """Measure what PyTorch's operations cost here, unless it is for a machine elsewhere."""
    if arch is None and probe() is None:
        importlib.import_module("adaattn_torch.backend.pricing").warm_up(say)
