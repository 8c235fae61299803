"""Masks that transformers asks for, kept as patterns: causal, a window, padding on the right.

transformers writes masks out, one boolean per row and key. Here a mask whose pattern the core
can state (`adaattn_core.mask.Mask`) travels as a `CompactMask`, so that kernels skip what is
hidden and plans may choose every structure. Whatever else touches it (an index, a cast, a sum)
gets the boolean tensor that transformers would have made. Patterns that cannot be stated
(padding on the left, packed sequences, chunks, custom functions) are written out as before.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from transformers import masking_utils

from adaattn_core.mask import Mask
from adaattn_torch.masks.compact import CompactMask

Window = tuple[int | None, int | None]


def adaattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor | None:
    """Make a model's mask; the signature is transformers' mask interface.

    None where transformers' own function for PyTorch returns None; a `CompactMask` where the
    pattern is causal, a causal window or none, with or without padding on the right; else what
    that function makes. Where the caller forbids leaving the mask out (it will be concatenated,
    or enters a compiled graph), and under a trace, it is always that function's tensor.

    Parameters are those of `transformers.masking_utils.sdpa_mask`. On a GPU the padding is read
    on the host once per mask, as that function does.
    """
    described: tuple[Mask, bool] | None = None
    window = None if _traced(attention_mask, q_offset) else window_of(mask_function)
    may_skip = allow_is_bidirectional_skip if window == (None, None) else allow_is_causal_skip
    if window is not None and may_skip:
        described = _describe(
            batch_size,
            q_length,
            kv_length,
            int(q_offset),
            int(kv_offset),
            window,
            attention_mask,
        )
    if described is None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            device=device,
            **options,
        )
    pattern, nothing = described
    shape = (batch_size, 1, q_length, kv_length)
    return None if nothing else CompactMask(pattern, shape, torch.device(device))


def _traced(*values: Any) -> bool:
    """Whether values must not be read here: tracers, fake tensors; offsets kept on a device."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(x) is not torch.Tensor for x in values if isinstance(x, torch.Tensor))
        or any(isinstance(x, torch.Tensor) and x.dim() == 0 and x.is_cuda for x in values)
    )


def _describe(
    batch: int,
    len_q: int,
    len_kv: int,
    q_offset: int,
    kv_offset: int,
    window: Window,
    padding: torch.Tensor | None,
) -> tuple[Mask, bool] | None:
    """Return the pattern, and whether no mask says the same; None if there is no pattern."""
    ends = _right_padding(padding, batch, len_kv, kv_offset)
    if ends is None:
        return None
    left, right = window
    full = all(end == len_kv for end in ends)
    if right is None:
        return (Mask.none() if full else Mask.key_lengths(ends)), full
    shift = q_offset - kv_offset  # row i is at key i + shift
    if left is not None and left >= len_kv - 1 and shift + len_q <= len_kv:
        left = None  # the window holds every key there is
    last = shift + len_q
    if left is None and full and (len_q == 1 or len_q == len_kv) and last == len_kv:
        return Mask.none(), True
    # Into an empty static cache; one row without a mask would see its empty slots.
    if left is None and shift == 0 == q_offset and 1 < len_q <= min(ends):
        return Mask.causal("top_left"), True
    if shift == 0:
        mask = Mask.sliding_window(left, right, "top_left")
        return (mask if full else mask & Mask.key_lengths(ends)), False
    if shift < 0 or last > len_kv or min(ends) < last:
        return None  # padding in the midst of what rows see, at a distance that differs
    mask = Mask.sliding_window(left, right, "bottom_right")
    return (mask if last == len_kv else mask & Mask.key_lengths((last,) * batch)), False


def _right_padding(
    padding: torch.Tensor | None, batch: int, len_kv: int, kv_offset: int
) -> tuple[int, ...] | None:
    """Count the keys of each entry before its padding; None if that is not on the right."""
    if padding is None:
        return (len_kv,) * batch
    if padding.dim() != 2 or padding.shape[0] != batch:
        return None
    real = padding[:, kv_offset : kv_offset + len_kv].bool()
    real = torch.nn.functional.pad(real, (0, len_kv - real.shape[1]))  # what it does not name
    ends = real.sum(-1)
    column = torch.arange(len_kv, device=real.device)
    plain = (real == (column < ends[:, None])).all()
    *found, is_plain = torch.cat([ends, plain[None].to(ends.dtype)]).tolist()
    return tuple(found) if is_plain else None


def window_of(mask_function: Callable[..., Any]) -> Window | None:
    """Keys to the left and right that one of transformers' mask functions lets a row see.

    The function must be that very one, or made by that very maker (the same code object);
    anything else is None, and is then written out.
    """
    if mask_function is masking_utils.causal_mask_function:
        return None, 0
    if mask_function is masking_utils.bidirectional_mask_function:
        return None, None
    sample = masking_utils.sliding_window_causal_mask_function(1)
    parts = _closure(mask_function, sample).get("mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    if parts[1] is not masking_utils.causal_mask_function:
        return None
    size = _closure(parts[0], masking_utils.sliding_window_overlay(1)).get("sliding_window")
    return (size - 1, 0) if isinstance(size, int) and size > 0 else None


def _closure(function: Callable[..., Any], like: Callable[..., Any]) -> dict[str, Any]:
    """Variables that a function closes over, if its code is that of `like`; else none."""
    if not isinstance(function, FunctionType) or not isinstance(like, FunctionType):
        return {}
    if function.__code__ is not like.__code__:
        return {}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))
