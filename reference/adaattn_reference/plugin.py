"""Plugin manifest: names the backend by import string; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable

from adaattn_core.plugins import hookimpl


@hookimpl
def adaattn_register_backends(register: Callable[..., None]) -> None:
    """Register the backend ``numpy``; it runs wherever NumPy does."""
    register("numpy", "adaattn_reference.backend:NumpyBackend")
