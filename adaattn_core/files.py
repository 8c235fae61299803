"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from adaattn_core.errors import FileError


def atomic_write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it into place.

    Raises
    ------
    FileError
        If the folder cannot be written; nothing is left behind.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise FileError(
            got=f"{path}: {error.strerror or error}",
            needed="a folder that exists and can be written",
            do="create the folder or choose another path",
            path=str(path),
        ) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write text (UTF-8) whole or not at all; see `atomic_write`."""
    atomic_write(path, lambda stream: _write_bytes(stream, text.encode()))


def _write_bytes(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
