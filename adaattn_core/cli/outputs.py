"""Writing the output of a run: whole or not at all, and refused before the work is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from adaattn_core.cli.inputs import WRITTEN, check_suffix
from adaattn_core.errors import FileError
from adaattn_core.files import atomic_write, check_writable, target, write_all


def check_array_output(path: Path) -> None:
    """Raise FileError unless `path` can become an .npz or .safetensors file."""
    check_suffix(path, WRITTEN)
    check_writable(path)


def check_writable_apart(source: Path, *outputs: Path) -> None:
    """Raise FileError unless all outputs can be written, none over the input or one another."""
    taken = {target(source)}
    for path in outputs:
        check_writable(path)
        if target(path) in taken:
            raise FileError(
                got=f"{path} named twice",
                needed="a file of its own for the input and for every output",
                do="choose another name for the output",
                path=str(path),
            )
        taken.add(target(path))


def write_output(path: Path, out: NDArray[Any], lse: NDArray[Any]) -> None:
    """Write arrays ``out`` and ``lse``; bf16 in .npz as uint16 bits with ``dtype="bfloat16"``.

    Parameters
    ----------
    path : Path
        Ends in .npz or .safetensors.
    out : ndarray
        Attention output.
    lse : ndarray of float32
        Natural log of each row's sum of exponentials.
    """
    arrays = {"out": np.ascontiguousarray(out), "lse": np.ascontiguousarray(lse)}
    if path.suffix == ".safetensors":
        data = save(arrays)
        atomic_write(path, lambda stream: write_all(stream, data))
    else:
        atomic_write(path, lambda stream: _write_npz(stream, arrays))


def _write_npz(stream: BinaryIO, arrays: dict[str, NDArray[Any]]) -> None:
    out = arrays["out"]
    if out.dtype.name == "bfloat16":
        np.savez(stream, out=out.view(np.uint16), lse=arrays["lse"], dtype=np.str_("bfloat16"))
    else:
        np.savez(stream, out=out, lse=arrays["lse"])
