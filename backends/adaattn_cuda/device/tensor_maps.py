"""Tensor maps: what the copy engine of Hopper must know about an array.

The two driver functions are called through ctypes, the only ones that are: the driver wants a
map on a multiple of 64 bytes, where cuda.bindings has none of its own (its CUtensorMap lies
inside a Python object), and cuda.core's takes a tenth of a second to import.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from adaattn_core.errors import AdaAttnError
from adaattn_cuda.device import driver

__all__ = ["ALIGNMENT_BYTES", "MAP_BYTES", "encode", "move"]

MAP_BYTES = 128
ALIGNMENT_BYTES = 64

# CUtensorMap* enumerators of cuda.h.
_DATA_TYPES = {"u8": 0, "f16": 6, "bf16": 9}
_INTERLEAVE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_OOB_FILL_ZEROS = 0

_VERSION = 12000
"""CUDA version of the functions' signatures."""

_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p,
    *[ctypes.c_void_p] * 4, *[ctypes.c_int] * 4,
)  # fmt: skip
_REPLACE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@cache
def _functions() -> tuple[Any, Any]:
    """Return cuTensorMapEncodeTiled and cuTensorMapReplaceAddress."""
    cuda = driver.load_driver()

    def address(name: bytes) -> int:
        found, _ = driver.check(
            cuda.cuGetProcAddress(name, _VERSION, 0), f"looking for {name.decode()}"
        )
        return int(found)

    return (
        _ENCODE(address(b"cuTensorMapEncodeTiled")),
        _REPLACE(address(b"cuTensorMapReplaceAddress")),
    )


def encode(
    place: Any,
    dtype: str,
    address: int,
    sizes: tuple[int, int, int, int],
    steps_bytes: tuple[int, int, int],
    box: tuple[int, int],
) -> None:
    """Write the map of a (batch, heads, len, dim) array, whose boxes are rows of one head.

    Rows of a box are swizzled by 128 bytes. Columns and rows outside the array arrive as zeros,
    which is what pads head dims that are no multiple of a box's columns.

    Parameters
    ----------
    place : ctypes array of 128 bytes
        On a multiple of 64 bytes.
    dtype : {"bf16", "f16", "u8"}
    address : int
    sizes : tuple of int
        (dim, len, heads, batch), each at least 1.
    steps_bytes : tuple of int
        From one row, head and batch entry to the next.
    box : tuple of int
        Columns and rows.

    Raises
    ------
    AdaAttnError
        If the driver refuses: the copy engine cannot address that layout.
    """
    status = _functions()[0](
        ctypes.addressof(place),
        _DATA_TYPES[dtype],
        4,
        address,
        (ctypes.c_uint64 * 4)(*sizes),
        (ctypes.c_uint64 * 3)(*steps_bytes),
        (ctypes.c_uint32 * 4)(*box, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        _OOB_FILL_ZEROS,
    )
    if status:
        raise AdaAttnError(
            got=f"CUDA error {status} for sizes {sizes}, steps of {steps_bytes} bytes",
            needed="a layout that the copy engine can address",
            do="copy the array to contiguous memory",
            status=status,
        )


def move(place: Any, address: int) -> None:
    """Make the map in `place` describe the same array at another address.

    Raises
    ------
    AdaAttnError
        If the driver refuses the address: none that is a multiple of 16 bytes.
    """
    status = _functions()[1](ctypes.addressof(place), address)
    if status:
        raise AdaAttnError(
            got=f"CUDA error {status} for an array at {address:#x}",
            needed="an address that the copy engine takes",
            do="copy the array to memory of its own",
            status=status,
        )
