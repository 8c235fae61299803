"""The one place where the CUDA backend reads the environment.

Every variable is read at the moment of use, never at import, so that a test or a notebook may
change it. docs/reference/environment.md holds the same table; a test keeps the two equal.
"""

from __future__ import annotations

import os
from pathlib import Path

from adaattn_core.files import user_cache

__all__ = ["VARIABLES", "cache_dir", "keep_dir", "no_jit", "quiet"]

VARIABLES = {
    "ADAATTN_CACHE_DIR": "folder of the compiled kernels, and of measured prices",
    "ADAATTN_NO_JIT": "1: a kernel missing from the cache is an error, never compiled",
    "ADAATTN_KEEP": "folder that receives the source, cubin and compiler log of every compile",
    "ADAATTN_QUIET": "1: compile without the progress line on stderr",
}


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in {"", "0", "false", "no"}


def cache_dir() -> Path:
    """Folder of the compiled kernels: ``ADAATTN_CACHE_DIR``, else below the user's cache."""
    chosen = os.environ.get("ADAATTN_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return user_cache() / "kernels"


def no_jit() -> bool:
    """Whether compiling is forbidden (``ADAATTN_NO_JIT``)."""
    return _flag("ADAATTN_NO_JIT")


def keep_dir() -> Path | None:
    """Folder that receives every compile's files (``ADAATTN_KEEP``), or None."""
    chosen = os.environ.get("ADAATTN_KEEP")
    return Path(chosen).expanduser() if chosen else None


def quiet() -> bool:
    """Whether the progress line of a compile is left out (``ADAATTN_QUIET``)."""
    return _flag("ADAATTN_QUIET")
