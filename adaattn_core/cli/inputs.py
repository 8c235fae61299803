"""Reading query, key, value and mask from .npz, .safetensors and .npy files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

from adaattn_core.errors import DTypeError, FileError, ShapeError
from adaattn_core.files import reading
from adaattn_core.mask import Mask

WRITTEN = (".npz", ".safetensors")
"""File kinds that outputs are written to."""
SUFFIXES = (*WRITTEN, ".npy")
"""File kinds that are read."""

ARRAY_NAMES = ("q", "k", "v")
OPTIONAL_NAMES = ("scale", "mask")

MISNAMED = (
    "attn_mask",
    "attention_mask",
    "bias",
    "key_lengths",
    "lengths",
    "cu_seqlens",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cu_seqlens_kv",
)
"""Names that other tools give to what decides which keys a row sees: never overlooked."""

RECIPES = {
    ".npz": "numpy.savez(path, q=q, k=k, v=v)",
    ".safetensors": "safetensors.numpy.save_file({'q': q, ...}, path)",
    ".npy": "numpy.save(path, numpy.stack([q, k, v]))",
}

_SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


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
    mask : Mask
        The file's boolean or additive mask; `Mask.none()` without one.
    """

    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    scale: float | None
    batched: bool
    mask: Mask


def check_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raise FileError unless the name ends in one of the suffixes."""
    if path.suffix not in suffixes:
        raise FileError(
            got=f"{path}: a file of kind {path.suffix or 'without a suffix'}",
            needed=f"a name that ends in {' or '.join(suffixes)}",
            do=f"save q, k and v together: {RECIPES['.npz']}",
            path=str(path),
        )


def read_inputs(path: Path) -> Inputs:
    """Read arrays ``q``, ``k``, ``v`` (and ``scale``, ``mask``) from a file.

    Parameters
    ----------
    path : Path
        An .npz (bf16 as uint16 bit patterns beside an entry ``dtype="bfloat16"``), a
        .safetensors file, or an .npy of the three arrays stacked along a first axis. Arrays
        are (batch, heads, len, dim) or (heads, len, dim). A mask is boolean (True = may
        attend) or floating point (added to the scaled scores).

    Raises
    ------
    FileError
        If the file is missing, damaged, of an unknown kind, lacks an array, or has a mask
        under another name.
    DTypeError
        If an array is not of a floating point format that AdaAttn takes.
    ShapeError
        If an array has neither three nor four axes, or the three differ in that.
    """
    check_suffix(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".npy": _read_npy}
    needed = f"an undamaged {path.suffix} file"
    with reading(path, needed=needed, do=f"write it again: {RECIPES[path.suffix]}"):
        entries = readers[path.suffix](path)
    query, key, value = (_with_batch_axis(name, entries[name]) for name in ARRAY_NAMES)
    axes = {name: entries[name].ndim for name in ARRAY_NAMES}
    if len(set(axes.values())) != 1:
        raise ShapeError(
            got=", ".join(f"{name} with {n} axes" for name, n in axes.items()),
            needed="the same number of axes in q, k and v",
            do="add a batch axis to all of them or to none",
        )
    scale, mask = _scale(entries.get("scale")), _mask(entries.get("mask"))
    return Inputs(query, key, value, scale, axes["q"] == 4, mask)


def _with_batch_axis(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim not in (3, 4):
        raise ShapeError(
            got=f"{name} of shape {array.shape}",
            needed="(batch, heads, len, dim) or (heads, len, dim)",
            do="reshape the array before saving it",
        )
    return array if array.ndim == 4 else array[None]


def _scale(scale: NDArray[Any] | None) -> float | None:
    if scale is None:
        return None
    if scale.size != 1 or scale.dtype.kind not in "fiu":
        raise ShapeError(
            got=f"scale of shape {scale.shape} and dtype {scale.dtype}",
            needed="one number",
            do="save the factor on the scores, e.g. scale=0.125, or leave it out",
        )
    return float(scale.reshape(()))


def _mask(mask: NDArray[Any] | None) -> Mask:
    if mask is None:
        return Mask.none()
    return Mask.boolean(mask) if mask.dtype == bool else Mask.additive(mask)


# -- npz and npy -------------------------------------------------------------------------------
def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as stream, _archive(np.load(stream, allow_pickle=False)) as archive:
        _check_names(path, set(archive.files))
        wanted = {*archive.files} & {*ARRAY_NAMES, *OPTIONAL_NAMES, "dtype"}
        entries = {name: archive[name] for name in wanted}
    if not all(isinstance(entry, np.ndarray) for entry in entries.values()):
        raise ValueError("a zip archive, but not one of arrays")
    stored = entries.pop("dtype", None)
    declared = None if stored is None else str(stored.reshape(-1)[0]) if stored.size else ""
    for name in ARRAY_NAMES:
        entries[name] = _decode(name, entries[name], declared)
    if "mask" in entries:
        entries["mask"] = _decode_mask(entries["mask"], declared)
    return entries


def _archive(loaded: Any) -> Any:
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("a single array, not an archive")
    return loaded


def _read_npy(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as stream:
        stacked = np.load(stream, allow_pickle=False)
    if not isinstance(stacked, np.ndarray):
        raise ValueError("an archive, not a single array")
    if stacked.ndim not in (4, 5) or len(stacked) != len(ARRAY_NAMES):
        raise FileError(
            got=f"{path}: one array of shape {stacked.shape}",
            needed="q, k and v stacked: (3, batch, heads, len, dim) or (3, heads, len, dim)",
            do=f"where their shapes differ use {RECIPES['.npz']}",
            path=str(path),
        )
    return {name: _decode(name, x, None) for name, x in zip(ARRAY_NAMES, stacked, strict=True)}


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
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if declared not in (None, str(native.dtype)):
        raise DTypeError(
            got=f'{name} of dtype {array.dtype} in a file with dtype="{declared}"',
            needed="arrays of the dtype that the file declares",
            do="remove the entry dtype, or store what it says",
            dtype=str(array.dtype),
        )
    return native


def _decode_mask(mask: NDArray[Any], declared: str | None) -> NDArray[Any]:
    """Return a boolean mask as it is, an additive one as numbers (of any float format)."""
    if mask.dtype == bool:
        return mask
    if mask.dtype.kind in "iu" and not (mask.dtype == np.uint16 and declared == "bfloat16"):
        raise DTypeError(
            got=f"mask of dtype {mask.dtype}",
            needed="bool (True = may attend), or floating point (added to the scaled scores)",
            do="cast it: 0 and 1 could mean either",
            dtype=str(mask.dtype),
        )
    return _decode("mask", mask, declared if mask.dtype.kind in "uV" else None)


# -- safetensors -------------------------------------------------------------------------------
def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    tensors = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    _check_names(path, set(tensors))
    wanted = set(tensors) & {*ARRAY_NAMES, *OPTIONAL_NAMES}
    return {name: _from_safetensors(name, tensors[name]) for name in wanted}


def _from_safetensors(name: str, tensor: Mapping[str, Any]) -> NDArray[Any]:
    known = _SAFETENSORS_DTYPES | ({"BOOL": np.bool_} if name == "mask" else {})
    if tensor["dtype"] not in known:
        raise DTypeError(
            got=f"{name} of dtype {tensor['dtype']}",
            needed=f"one of {', '.join(known)}",
            do="cast the tensors before saving them",
            dtype=tensor["dtype"],
        )
    is_bool = tensor["dtype"] == "BOOL"
    dtype = np.dtype(np.uint8 if is_bool else known[tensor["dtype"]])
    array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    # A byte other than 0 and 1 would be neither true nor false.
    return np.asarray(array != 0) if is_bool else array


def _check_names(path: Path, names: set[str]) -> None:
    missing = [name for name in ARRAY_NAMES if name not in names]
    if missing:
        raise FileError(
            got=f"{path} with {', '.join(sorted(names)) or 'nothing in it'}",
            needed=f"arrays named {', '.join(ARRAY_NAMES)}; {', '.join(missing)} missing",
            do="save the arrays under these names",
            path=str(path),
        )
    misnamed = sorted(names & {*MISNAMED})
    if misnamed:
        raise FileError(
            got=f"{path} with {', '.join(misnamed)}",
            needed="one mask, boolean or additive, under the name mask",
            do="write it out as an array named mask, or remove it",
            path=str(path),
        )
