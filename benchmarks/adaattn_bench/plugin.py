"""Plugin manifest: brings the command ``bench``; nothing heavy is imported."""

from __future__ import annotations

import importlib
from typing import Any

from adaattn_core.plugins import hookimpl


@hookimpl
def adaattn_register_commands(group: Any) -> None:
    """Add ``bench``."""
    importlib.import_module("adaattn_bench.commands.bench").register(group)
