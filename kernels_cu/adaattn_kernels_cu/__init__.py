"""CUDA C++ sources of the kernels, as package data; nothing here runs.

A *name* is a path below :func:`root`, such as ``"adaattn/attn/sm80_attn_fwd.cuh"``: exactly
what a translation unit writes in its ``#include "..."`` line.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

__all__ = ["closure", "digest", "names", "root", "source"]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def root() -> Path:
    """Folder to hand to the compiler as include path."""
    return Path(__file__).resolve().parent


def names() -> list[str]:
    """Every shipped source, sorted."""
    here = root()
    return sorted(path.relative_to(here).as_posix() for path in here.rglob("*.cuh"))


def source(name: str) -> str:
    """Text of one shipped source.

    Raises
    ------
    FileNotFoundError
        If no source of that name is shipped.
    """
    return (root() / name).read_text(encoding="utf-8")


def closure(name: str) -> dict[str, str]:
    """Return the sources that ``name`` includes, directly or not, and itself: ``{name: text}``.

    Includes that are not shipped here (``cuda_fp16.h``) belong to the compiler and are left
    out; whoever keys a cache by :func:`digest` keys it by the compiler's version as well.
    """
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found[current] = source(current)
        for included in _INCLUDE.findall(found[current]):
            beside = (Path(current).parent / included).as_posix()
            waiting.extend(c for c in (included, beside) if (root() / c).is_file())
    return dict(sorted(found.items()))


def digest(name: str) -> str:
    """SHA-256 (hex) over the include closure of ``name``: names and texts."""
    state = hashlib.sha256()
    for member, text in closure(name).items():
        for part in (member, text):
            data = part.encode("utf-8")
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
    return state.hexdigest()
