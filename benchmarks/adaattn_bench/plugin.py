"""Plugin manifest: brings the commands ``bench`` and ``eval``; nothing heavy is imported."""

from __future__ import annotations

import importlib
from typing import Any

from adaattn_core.plugins import hookimpl


@hookimpl
def adaattn_register_commands(group: Any) -> None:
    """Add ``bench`` and ``eval``."""
    for name in ("bench", "evaluate"):
        importlib.import_module(f"adaattn_bench.commands.{name}").register(group)
