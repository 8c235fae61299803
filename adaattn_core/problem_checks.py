"""What a problem's arrays, scale and mask must be, before anything is built of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from adaattn_core.arrays import dtype_name, require_array
from adaattn_core.checks import real
from adaattn_core.errors import ArgumentError, DTypeError, ShapeError
from adaattn_core.mask import Mask

NO_SCALE = "leave scale out for 1/sqrt(dim_qk); fold a sign into the queries"


def check_axes(name: str, x: Any) -> None:
    """Refuse what is no array of four dimensions."""
    require_array(name, x)
    if len(x.shape) != 4:
        raise ShapeError(
            got=f"{name} of shape {tuple(x.shape)}",
            needed="four dimensions: batch, heads, len, dim",
            do="add the missing dimensions, e.g. x[None] for a single batch entry",
        )


def checked_scale(scale: float | None, dim_qk: int) -> float:
    """Return the scale, by default 1/sqrt(dim_qk); it is positive and finite."""
    if scale is None:
        return 1.0 / math.sqrt(max(dim_qk, 1))
    scale = real("scale", scale, do=NO_SCALE)
    if math.isfinite(scale) and scale > 0:
        return scale
    raise ArgumentError(f"scale={scale}", needed="a positive finite number", do=NO_SCALE)


def checked_mask(mask: Mask | None) -> Mask:
    """Return the mask, by default the one that hides nothing."""
    mask = Mask.none() if mask is None else mask
    if not isinstance(mask, Mask):
        raise ArgumentError(
            got=f"mask of type {type(mask).__name__}",
            needed="a Mask",
            do="wrap the array: Mask.boolean(x) (True = may attend) or Mask.additive(x)",
        )
    return mask


def check_shapes(q: Any, k: Any, v: Any) -> None:
    """Refuse queries, keys and values whose shapes do not belong together."""
    if k[0] != q[0] or v[0] != q[0]:
        raise ShapeError(
            got=f"batch {q[0]} in query, {k[0]} in key, {v[0]} in value",
            needed="one batch size",
            do="expand the smaller arrays yourself (a broadcast view costs nothing)",
        )
    if k[1] != v[1] or k[2] != v[2]:
        raise ShapeError(
            got=f"key (heads, len) = {(k[1], k[2])}, value (heads, len) = {(v[1], v[2])}",
            needed="as many values as keys",
            do="check that key and value come from the same layer and cache",
        )
    if k[3] != q[3] or q[3] < 1 or v[3] < 1:
        raise ShapeError(
            got=f"dim {q[3]} in query, {k[3]} in key, {v[3]} in value",
            needed="query and key vectors of one length of at least 1, values of at least 1",
            do="check the head dimension of the projections",
        )
    if k[1] < 1 or q[1] < 1 or q[1] % k[1]:
        raise ShapeError(
            got=f"{q[1]} query heads for {k[1]} key/value heads",
            needed="heads_q a positive multiple of heads_kv",
            do="query head h reads key head h // (heads_q / heads_kv); do not repeat keys",
        )


def check_mask(mask: Mask, q: Any, k: Any, lengths: Sequence[tuple[int, int]]) -> None:
    """Refuse a mask that does not fit; `lengths` are (len_q, len_kv) of every sequence."""
    if mask.lengths is not None and mask.cu_seqlens_q is not None:
        raise ArgumentError(
            got="a mask with both key lengths and cu_seqlens",
            needed="one of the two",
            do="state the lengths through cu_seqlens_kv",
        )
    if (
        mask.alignment == "equal"
        and mask.has_window
        and any(len_q != len_kv for len_q, len_kv in lengths)
    ):
        worst = next(pair for pair in lengths if pair[0] != pair[1])
        raise ShapeError(
            got=f"a causal or window mask without alignment for len_q={worst[0]},"
            f" len_kv={worst[1]}",
            needed="an alignment when the two lengths differ: nothing is guessed",
            do='pass alignment="top_left" (PyTorch) or "bottom_right" (FlashAttention)',
        )
    full = (q[0], q[1], q[2], k[2])
    for name, array in (("boolean", mask.allowed), ("additive", mask.bias)):
        if array is None:
            continue
        require_array(f"{'an' if name == 'additive' else 'a'} {name} mask", array)
        shape = tuple(array.shape)
        try:
            fits = np.broadcast_shapes(shape, full) == full
        except ValueError:
            fits = False
        if not fits:
            raise ShapeError(
                got=f"a {name} mask of shape {shape}",
                needed=f"a shape broadcastable to {full} (batch, heads_q, len_q, len_kv)",
                do="add axes of length 1 where the mask does not vary",
            )
        kind = dtype_name(array)
        if (kind == "bool") != (name == "boolean"):
            raise DTypeError(
                got=f"a {name} mask of dtype {kind}",
                needed="bool for Mask.boolean, floating point for Mask.additive",
                do="True means may attend; an additive mask is added to the scaled scores",
            )
