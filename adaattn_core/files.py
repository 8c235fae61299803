"""Files: read or refused for one reason in three lines, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adaattn_core.checks import shown
from adaattn_core.errors import AdaAttnError, ArgumentError, FileError

REASON_LENGTH = 200
"""Characters of another library's message that are quoted."""


def as_path(path: Any) -> Path:
    """Return `path` as a Path.

    Raises
    ------
    ArgumentError
        If it is neither text nor a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(
            got=f"path={shown(path)}", needed="a file name", do="pass text or a pathlib.Path"
        )
    return Path(path)


def cache_folder(name: str) -> Path:
    """Folder of this machine for what can be made again; it may not exist yet.

    ``ADAATTN_CACHE_DIR/name``, else below the user's cache.
    """
    chosen = os.environ.get("ADAATTN_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser() / name
    return user_cache() / name


def user_cache() -> Path:
    """Return the user's own folder for such things."""
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "adaattn"


@contextmanager
def reading(
    path: Path, *, needed: str, do: str, error: type[AdaAttnError] = FileError
) -> Iterator[None]:
    """Turn whatever a parser raises inside into one error about the file.

    Parsers of files that anybody may have written raise anything: a damaged archive alone can
    end in nine kinds of exception. The project's own errors pass.

    Parameters
    ----------
    path : Path
    needed, do : str
        Lines of the error.
    error : type
        What is raised; ``path`` is attached.
    """
    try:
        if not path.is_file() and not path.is_fifo():
            raise error(
                got=f"{path}: {_not_a_file(path)}",
                needed=needed,
                do="check the path",
                path=str(path),
            )
        yield
    except AdaAttnError:
        raise
    except Exception as problem:
        got = f"{path}: {_reason(problem)}"
        raise error(got=got, needed=needed, do=do, path=str(path)) from problem


def _not_a_file(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    if path.exists():
        return "a device, not a file"
    return "a loop of symbolic links" if target(path).is_symlink() else "no such file"


def _reason(problem: Exception) -> str:
    if isinstance(problem, MemoryError):
        return "asks for more memory than there is"
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(str(problem).split())
    text = text if len(text) <= REASON_LENGTH else text[:REASON_LENGTH] + "..."
    return text or type(problem).__name__


def unwritable_reason(path: Path) -> str | None:
    """Return why `path` cannot become a file, or None if it should be possible."""
    try:
        folder = target(path).parent
        if path.is_dir():
            return "is a folder"
        if target(path).is_symlink():
            return "is a loop of symbolic links"
        if (path.exists() and not path.is_file()) or _is_stream(path):
            return "is not an ordinary file"
        if not folder.is_dir():
            return f"there is no folder {folder}"
        if not os.access(folder, os.W_OK):
            return f"folder {folder} cannot be written"
    except (OSError, ValueError) as problem:  # e.g. a name that is too long
        return _reason(problem)
    return None


def _is_stream(path: Path) -> bool:
    """Whether a name such as /dev/stdout stands for what is open already."""
    folder = os.path.realpath(path.parent)
    return folder == "/dev" or folder.startswith("/proc/")


def check_writable(path: Path) -> None:
    """Raise FileError if `path` cannot become a file; called before anything is computed."""
    reason = unwritable_reason(path)
    if reason is not None:
        raise _unwritable(path, reason)


def _unwritable(path: Path, reason: str) -> FileError:
    return FileError(
        got=f"{path}: {reason}",
        needed="a file name in a folder that exists and can be written",
        do="create the folder or choose another path",
        path=str(path),
    )


def target(path: Path) -> Path:
    """Return where a file really lies; a loop of symbolic links stays as it is."""
    return Path(os.path.realpath(path))


def atomic_write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it into place.

    Behind a symbolic link the file that it points to is replaced, not the link.

    Raises
    ------
    FileError
        If the folder cannot be written, or `path` is a device, pipe or folder; nothing is left
        behind.
    """
    check_writable(path)
    path = target(path)
    # Named before it exists: whatever interrupts us, the name to remove is known.
    temporary = path.parent / f".{path.name[:64]}.{secrets.token_hex(8)}"
    try:
        try:
            stream = temporary.open("xb")
        except OSError as problem:
            raise _unwritable(path, _reason(problem)) from problem
        with stream:
            write(stream)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write text (UTF-8) whole or not at all; see `atomic_write`."""
    data = text.encode(errors="backslashreplace")  # a JSON file may bring half a surrogate pair
    atomic_write(path, lambda stream: write_all(stream, data))


def write_all(stream: BinaryIO, data: bytes) -> None:
    """Write bytes, as `atomic_write` wants it."""
    stream.write(data)
