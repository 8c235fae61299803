"""Arrays at the border: address, shape and strides of anything that lives on a CUDA device."""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from typing import Any, NamedTuple

from adaattn_core.arrays import dtype_name
from adaattn_core.errors import UnsupportedError

__all__ = ["ArrayView", "broadcast", "contiguous", "view"]

ITEM_BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "bool": 1}


class ArrayView(NamedTuple):
    """Where an array is and how it is laid out; it does not keep the array alive.

    Attributes
    ----------
    pointer : int
        Address of element 0.
    shape, strides : tuple of int
        Strides in elements.
    dtype : str
        Name of the format, or ``"bool"``.
    device : int
        CUDA device number; -1 for host memory.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]


def view(array: Any) -> ArrayView:
    """Describe a CUDA array without copying it.

    Torch tensors and CuPy arrays are read through their attributes (a microsecond), anything
    else through ``__cuda_array_interface__``, or by cuda.core through DLPack.

    Raises
    ------
    DTypeError
        If the element type has no format here.
    UnsupportedError
        If the array is not in CUDA memory, or requires a gradient.
    """
    if hasattr(array, "data_ptr"):
        return _torch_view(array)
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        return _interface_view(array, interface)
    if hasattr(array, "__dlpack__"):
        return _dlpack_view(array)
    raise _not_cuda(f"an object of type {type(array).__name__}")


def _not_cuda(got: str) -> UnsupportedError:
    return UnsupportedError(
        got=got,
        needed="arrays in CUDA memory (torch, CuPy, cuda.core, or anything with DLPack)",
        do='move them to the device first, or use backend="numpy" for host arrays',
    )


_torch_dtypes: dict[Any, str] = {}


def _torch_view(tensor: Any) -> ArrayView:
    if tensor.requires_grad:
        raise UnsupportedError(
            got="a tensor that requires a gradient",
            needed="plain data: this door has no backward pass and would cut the gradient",
            do="use adaattn_torch.scaled_dot_product_attention, or pass x.detach() on purpose",
        )
    device = tensor.device
    if not tensor.is_cuda:
        raise _not_cuda(f"a torch tensor on {device}")
    dtype = _torch_dtypes.get(tensor.dtype)
    if dtype is None:
        dtype = _torch_dtypes[tensor.dtype] = dtype_name(tensor)
    return ArrayView(
        tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype, device.index or 0
    )


def _interface_view(array: Any, interface: dict[str, Any]) -> ArrayView:
    shape = tuple(int(n) for n in interface["shape"])
    # bf16 has no type string; libraries that have it (CuPy with ml_dtypes) show it as a dtype.
    dtype = dtype_name(array)
    strides = interface.get("strides")
    item = ITEM_BYTES[dtype]
    steps = _strides(shape) if strides is None else tuple(int(s) // item for s in strides)
    device = getattr(getattr(array, "device", None), "id", None)
    pointer = int(interface["data"][0])
    return ArrayView(pointer, shape, steps, dtype, 0 if device is None else int(device))


def broadcast(array: ArrayView, shape: tuple[int, ...]) -> ArrayView:
    """Return ``array`` in a larger shape, by strides of 0; nothing is copied."""
    missing = len(shape) - len(array.shape)
    steps = [0] * missing + [
        0 if have == 1 else step for have, step in zip(array.shape, array.strides, strict=True)
    ]
    return ArrayView(array.pointer, shape, tuple(steps), array.dtype, array.device)


def contiguous(pointer: int, shape: tuple[int, ...], dtype: str, device: int) -> ArrayView:
    """Describe a C-contiguous array."""
    return ArrayView(pointer, shape, _strides(shape), dtype, device)


@lru_cache(maxsize=256)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= n
    return tuple(reversed(steps))


_DL_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def _dlpack_view(array: Any) -> ArrayView:
    kind, device = array.__dlpack_device__()
    if int(kind) not in _DL_CUDA:
        raise _not_cuda(f"an array of type {type(array).__name__} on DLPack device {int(kind)}")
    # stream -1: the launch goes to the caller's own stream, so no ordering is asked for here.
    seen = _memory_view().from_dlpack(array, stream_ptr=-1)
    shape = tuple(int(n) for n in seen.shape)
    strides = _strides(shape) if seen.strides is None else tuple(int(n) for n in seen.strides)
    return ArrayView(int(seen.ptr), shape, strides, dtype_name(seen), int(device))


@cache
def _memory_view() -> Any:
    """cuda.core's view of foreign memory; imported late, since it takes a tenth of a second."""
    return importlib.import_module("cuda.core.utils").StridedMemoryView
