"""Arrays of any library as tensors that share their memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from adaattn_core.errors import UnsupportedError

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}


class _Readable:
    """An array's memory under a promise that nobody writes: PyTorch warns of read-only ones."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        said = array.__array_interface__
        self.__array_interface__ = {**said, "data": (said["data"][0], False)}


def as_tensor(array: Any) -> torch.Tensor:
    """View an array as a tensor; it is never written to.

    Raises
    ------
    UnsupportedError
        If it is a tensor that carries a gradient, which would be lost, or no strided array.
    """
    if isinstance(array, torch.Tensor):
        if array.requires_grad:
            raise UnsupportedError(
                got="a tensor that requires a gradient",
                needed="plain data: this door has no backward pass and would cut the gradient",
                do="use adaattn_torch.scaled_dot_product_attention, or pass x.detach()",
            )
        if array.layout is not torch.strided or array.is_nested:
            raise UnsupportedError(
                got=f"a tensor of layout {array.layout}",
                needed="a plain strided tensor",
                do="convert it first, e.g. with x.to_dense()",
            )
        return array.resolve_neg() if array.is_neg() else array
    if isinstance(array, np.ndarray):
        return _from_numpy(array)
    try:
        return from_dlpack(array)
    except Exception as error:  # every library has its own for what it cannot hand over
        raise UnsupportedError(
            got=f"an array of type {type(array).__name__}: {error}",
            needed="an array that speaks DLPack, on a device that PyTorch knows",
            do="convert it first, e.g. with numpy.asarray(x)",
        ) from error


def _from_numpy(array: NDArray[Any]) -> torch.Tensor:
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    is_bf16 = array.dtype == ml_dtypes.bfloat16
    if is_bf16:
        array = array.view(np.int16)
    if not array.size:
        array = array.copy()
    elif not array.flags.writeable:
        array = np.asarray(_Readable(array))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if is_bf16 else tensor


def row_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last axis lies side by side, as kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()
