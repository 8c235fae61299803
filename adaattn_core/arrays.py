"""Border crossing: arrays of any library (DLPack or the array API) to NumPy and back."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

import array_api_compat
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adaattn_core.errors import DTypeError, UnsupportedError
from adaattn_core.formats import FORMATS

INPUT_FORMATS = ("f64", "f32", "f16", "bf16")
"""Formats that query, key and value may arrive in."""

_DTYPE_NAMES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "bool": "bool",
}

_known_names: dict[Hashable, str] = {}
"""Names by a library's own object: NumPy takes microseconds to write a dtype out."""

_HOST = re.compile(r"(tfrt_)?cpu([:_]\d+)?")


def require_array(name: str, x: Any) -> None:
    """Raise unless `x` is an array whose every entry counts.

    Raises
    ------
    DTypeError
        If it is no array, or one with a mask of its own that would be lost.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise DTypeError(
            got=f"{name} as a masked array",
            needed="a plain array: entries that are masked out would come back",
            do="pass x.filled(0), and Mask.boolean for the keys that are not to be seen",
        )
    if not isinstance(getattr(x, "shape", None), Sequence) or not hasattr(x, "dtype"):
        raise DTypeError(
            got=f"{name} of type {type(x).__name__}",
            needed="an array (NumPy, or a library that speaks DLPack or the array API)",
            do="convert it, e.g. numpy.asarray(x, numpy.float32)",
        )


def dtype_name(x: Any) -> str:
    """Return the project's name of an array's dtype (``f32``, ``bf16``, ``bool``, ...).

    Raises
    ------
    DTypeError
        If the dtype has no name here.
    """
    dtype = getattr(x, "dtype", type(x).__name__)
    try:
        return _known_names[dtype]
    except (KeyError, TypeError):  # met for the first time, or of a kind that has no hash
        pass
    text = str(dtype).rsplit(".", 1)[-1]
    try:
        name = _DTYPE_NAMES[text]
        if isinstance(dtype, Hashable):
            _known_names[dtype] = name
        return name
    except KeyError:
        raise DTypeError(
            got=f"an array of dtype {text}",
            needed=f"one of {', '.join(INPUT_FORMATS)}",
            do="cast the array first; bf16 stored as uint16 bits: x.view(ml_dtypes.bfloat16)",
            dtype=text,
        ) from None


def array_device(x: Any) -> str:
    """Return where an array lives, as text (``cpu``, ``cuda:0``, ...)."""
    if isinstance(x, np.ndarray):
        return "cpu"
    try:
        # Torch's own attribute says it at once; finding out whose array it is takes longer.
        device = str(x.device if hasattr(x, "data_ptr") else array_api_compat.device(x))
    except Exception as error:  # whatever an object does that only looks like an array
        raise DTypeError(
            got=f"an array of type {type(x).__name__} on an unknown device",
            needed="an array of a library that speaks DLPack or the array API",
            do="convert it first, e.g. with numpy.asarray(x)",
        ) from error
    if device.startswith("<CUDA Device"):  # CuPy's spelling
        return f"cuda:{device.removeprefix('<CUDA Device ').removesuffix('>')}"
    device = device.lower()
    # Host memory is one place, whatever a library numbers it as (JAX: cpu:0, TFRT_CPU_0).
    return "cpu" if _HOST.fullmatch(device) else device


def to_numpy(x: Any) -> NDArray[Any]:
    """View or copy an array as NumPy; bf16 comes back as ``ml_dtypes.bfloat16``.

    Raises
    ------
    UnsupportedError
        If the array lives on a device, or carries a gradient that would be lost.
    """
    if isinstance(x, np.ndarray):
        return x
    if getattr(x, "requires_grad", False):
        raise UnsupportedError(
            got="a tensor that requires a gradient",
            needed="plain data: this door has no backward pass and would cut the gradient",
            do="use adaattn_torch.scaled_dot_product_attention, or pass x.detach() on purpose",
        )
    if not array_device(x).startswith("cpu"):
        raise UnsupportedError(
            got=f"an array on {array_device(x)}",
            needed="an array in host memory",
            do='choose a backend for that device, e.g. backend="cuda"',
            device=array_device(x),
        )
    if dtype_name(x) == "bf16":
        xp = array_api_compat.array_namespace(x)
        return to_numpy(xp.astype(x, xp.float32)).astype(ml_dtypes.bfloat16)
    try:
        return np.from_dlpack(x)
    except Exception as error:  # every library has its own for layouts that it cannot hand over
        raise UnsupportedError(
            got=f"an array of type {type(x).__name__}: {error}",
            needed="a plain strided array in host memory that speaks DLPack",
            do="convert it first, e.g. to a dense tensor or with numpy.asarray(x)",
        ) from error


def like(values: NDArray[Any], reference: Any, *, keep_dtype: bool = True) -> Any:
    """Return `values` in the library, on the device and (by default) dtype of `reference`."""
    name = dtype_name(reference)
    if isinstance(reference, np.ndarray):
        return values.astype(reference.dtype, copy=False) if keep_dtype else values
    xp = array_api_compat.array_namespace(reference)
    exact = values.astype(np.float32) if values.dtype == FORMATS["bf16"].dtype else values
    moved = xp.asarray(exact, device=array_api_compat.device(reference))
    return xp.astype(moved, reference.dtype) if keep_dtype and name != "bool" else moved


def in_library_of(reference: Any, result: Any, *, keep_dtype: bool = True) -> Any:
    """Return a backend's array in the library of the caller's, sharing memory where that can.

    Parameters
    ----------
    reference : array
        The caller's.
    result : array
        The backend's own, on the same device.
    keep_dtype : bool
        Whether it has the dtype of `reference` there, else its own.
    """
    if isinstance(result, np.ndarray):
        return like(result, reference, keep_dtype=keep_dtype)
    if isinstance(result, type(reference)):
        return result
    if isinstance(reference, np.ndarray) or array_device(result) == "cpu":
        return like(to_numpy(result), reference, keep_dtype=keep_dtype)
    return array_api_compat.array_namespace(reference).from_dlpack(result)


def move_axis_layout(x: Any, layout: str) -> Any:
    """Return a (batch, heads, len, dim) view of an array in `layout`; its own inverse."""
    if layout == "bhsd":
        return x
    if isinstance(x, np.ndarray):
        return x.transpose(0, 2, 1, 3)
    return array_api_compat.array_namespace(x).permute_dims(x, (0, 2, 1, 3))
