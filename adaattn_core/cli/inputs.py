"""Reading query, key and value from .npz and .safetensors files."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from adaattn_core.errors import DTypeError, FileError, ShapeError

SUFFIXES = (".npz", ".safetensors")
"""File kinds that are read and written."""

ARRAY_NAMES = ("q", "k", "v")

_SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}

_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.PickleError,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Q/K/V of one layer, as read.

    Attributes
    ----------
    query, key, value : ndarray, shape (batch, heads, len, dim)
        float64, float32, float16 or ``ml_dtypes.bfloat16``.
    scale : float or None
        Factor on the scores that the file states, if any.
    batched : bool
        Whether the file's arrays had a batch axis; the output gets the same axes.
    """

    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    scale: float | None
    batched: bool


def check_suffix(path: Path) -> None:
    """Raise FileError unless the name ends in a known suffix."""
    if path.suffix not in SUFFIXES:
        raise FileError(
            got=f"{path}: a file of kind {path.suffix or 'without a suffix'}",
            needed=f"a name that ends in {' or '.join(SUFFIXES)}",
            do="save q, k and v together: numpy.savez(path, q=q, k=k, v=v)",
            path=str(path),
        )


def read_inputs(path: Path) -> Inputs:
    """Read arrays ``q``, ``k``, ``v`` (and ``scale``) from a file.

    Parameters
    ----------
    path : Path
        An .npz (bf16 as uint16 bit patterns beside an entry ``dtype="bfloat16"``) or a
        .safetensors file. Arrays are (batch, heads, len, dim) or (heads, len, dim).

    Raises
    ------
    FileError
        If the file is missing, damaged, of an unknown kind, or lacks an array.
    DTypeError
        If an array is not of a floating point format that AdaAttn takes.
    ShapeError
        If an array has neither three nor four axes, or the three differ in that.
    """
    check_suffix(path)
    if not path.is_file():
        raise FileError(
            got=f"{path}: {'a folder' if path.is_dir() else 'no such file'}",
            needed="a readable .npz or .safetensors file",
            do="check the path",
            path=str(path),
        )
    entries = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    query, key, value = (_with_batch_axis(name, entries[name]) for name in ARRAY_NAMES)
    axes = {name: entries[name].ndim for name in ARRAY_NAMES}
    if len(set(axes.values())) != 1:
        raise ShapeError(
            got=", ".join(f"{name} with {n} axes" for name, n in axes.items()),
            needed="the same number of axes in q, k and v",
            do="add a batch axis to all of them or to none",
        )
    return Inputs(query, key, value, _scale(entries), axes["q"] == 4)


def _with_batch_axis(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim not in (3, 4):
        raise ShapeError(
            got=f"{name} of shape {array.shape}",
            needed="(batch, heads, len, dim) or (heads, len, dim)",
            do="reshape the array before saving it",
        )
    return array if array.ndim == 4 else array[None]


def _scale(entries: Mapping[str, NDArray[Any]]) -> float | None:
    if "scale" not in entries:
        return None
    scale = entries["scale"]
    if scale.size != 1 or scale.dtype.kind not in "fiu":
        raise ShapeError(
            got=f"scale of shape {scale.shape} and dtype {scale.dtype}",
            needed="one number",
            do="save the factor on the scores, e.g. scale=0.125, or leave it out",
        )
    return float(scale.reshape(()))


# -- npz ---------------------------------------------------------------------------------------
def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with (
            path.open("rb") as stream,
            _archive(np.load(stream, allow_pickle=False)) as archive,
        ):
            names = set(archive.files)
            wanted = names & {*ARRAY_NAMES, "scale", "dtype"}
            entries = {name: archive[name] for name in wanted}
            if not all(isinstance(entry, np.ndarray) for entry in entries.values()):
                raise ValueError("a zip archive, but not one of arrays")
    except _UNREADABLE as error:
        raise _unreadable(path, error, "numpy.savez(path, q=q, k=k, v=v)") from error
    _require_arrays(path, names)
    stored = entries.pop("dtype", None)
    declared = None if stored is None else str(stored.reshape(-1)[0]) if stored.size else ""
    for name in ARRAY_NAMES:
        entries[name] = _decode(name, entries[name], declared)
    return entries


def _archive(loaded: Any) -> Any:
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("a single array, not an archive")
    return loaded


def _decode(name: str, array: NDArray[Any], declared: str | None) -> NDArray[Any]:
    """Turn bf16 bit patterns into numbers; anything else must be what the file declares."""
    is_bits = array.dtype == np.uint16 or array.dtype == np.dtype("V2")
    if declared == "bfloat16" and is_bits:
        return array.view(ml_dtypes.bfloat16)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise DTypeError(
            got=f"{name} of dtype {array.dtype}"
            + ("" if declared is None else f' in a file with dtype="{declared}"'),
            needed="float64, float32, float16, or uint16 bit patterns of bfloat16",
            do='cast the arrays, or save bf16 as x.view("uint16") beside dtype="bfloat16"',
            dtype=str(array.dtype),
        )
    if declared not in (None, str(array.dtype)):
        raise DTypeError(
            got=f'{name} of dtype {array.dtype} in a file with dtype="{declared}"',
            needed="arrays of the dtype that the file declares",
            do="remove the entry dtype, or store what it says",
            dtype=str(array.dtype),
        )
    return array


# -- safetensors -------------------------------------------------------------------------------
def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        tensors = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise _unreadable(
            path, error, "safetensors.numpy.save_file({'q': q, ...}, path)"
        ) from error
    _require_arrays(path, set(tensors))
    wanted = set(tensors) & {*ARRAY_NAMES, "scale"}
    return {name: _from_safetensors(name, tensors[name]) for name in wanted}


def _from_safetensors(name: str, tensor: Mapping[str, Any]) -> NDArray[Any]:
    if tensor["dtype"] not in _SAFETENSORS_DTYPES:
        raise DTypeError(
            got=f"{name} of dtype {tensor['dtype']}",
            needed=f"one of {', '.join(_SAFETENSORS_DTYPES)}",
            do="cast the tensors before saving them",
            dtype=tensor["dtype"],
        )
    dtype = np.dtype(_SAFETENSORS_DTYPES[tensor["dtype"]])
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])


# -- errors ------------------------------------------------------------------------------------
def _require_arrays(path: Path, names: set[str]) -> None:
    missing = [name for name in ARRAY_NAMES if name not in names]
    if missing:
        raise FileError(
            got=f"{path} with {', '.join(sorted(names)) or 'nothing in it'}",
            needed=f"arrays named {', '.join(ARRAY_NAMES)}; {', '.join(missing)} missing",
            do="save the arrays under these names",
            path=str(path),
        )


def _unreadable(path: Path, error: Exception, recipe: str) -> FileError:
    detail = " ".join(str(error).split()) or type(error).__name__
    return FileError(
        got=f"{path}: {detail}",
        needed=f"an undamaged {path.suffix} file",
        do=f"write it again: {recipe}",
        path=str(path),
    )
