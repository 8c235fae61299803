"""Manifest of the toy backend: names it, says whether it can run, and imports nothing heavy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from adaattn_core.plugins import hookimpl


def probe() -> str | None:
    """Return why the backend cannot run on this machine, or None if it can."""
    return None if importlib.util.find_spec("numpy") else "NumPy is not installed"


@hookimpl
def adaattn_register_backends(register: Callable[..., None]) -> None:
    """Offer the backend under its name; the factory is imported on first use."""
    register("toy", "adaattn_toy.backend:ToyBackend", probe=probe)
