"""Tensors to arrays that backends take, and back, without copying."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import torch


def to_backend(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a backend takes: the tensor's numbers, without a gradient."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    # Kernels read vectors along the last axis.
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


def from_backend(array: Any) -> torch.Tensor:
    """Return what a backend gave back as a tensor."""
    if isinstance(array, torch.Tensor):
        return array
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def lowered(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in autocast's lower precision, if autocast would cast it."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def empty_output(query: torch.Tensor, dim_v: int) -> torch.Tensor:
    """Return an empty (batch, heads, len_q, dim_v) tensor with the query's order of strides."""
    strides = query.stride()
    # Stable: axes with equal strides (length 1, broadcast) keep their own order.
    order = sorted(range(query.dim()), key=lambda axis: -strides[axis])
    return torch.empty_permuted(
        (*query.shape[:-1], dim_v), order, dtype=query.dtype, device=query.device
    )


def in_order_of(query: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return `out` with the query's order of strides; copies only if it must."""
    wanted, free = _strides_like(query.shape, query.stride(), out.shape[-1])
    strides = out.stride()
    if strides == wanted:
        return out
    if all(strides[i] == n or i in free for i, n in enumerate(wanted)):
        return out.as_strided(out.shape, wanted)  # the same memory, under the strides promised
    return out.new_empty_strided(out.shape, wanted).copy_(out)


@lru_cache(maxsize=1024)
def _strides_like(
    shape: tuple[int, ...], strides: tuple[int, ...], dim_v: int
) -> tuple[tuple[int, ...], frozenset[int]]:
    """Strides of `empty_output`, and the axes of length 1, on which strides do not matter."""
    query = torch.empty_strided(shape, strides, device="meta")
    free = frozenset(axis for axis, n in enumerate((*shape[:-1], dim_v)) if n == 1)
    return empty_output(query, dim_v).stride(), free
