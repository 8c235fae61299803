"""Gradient of exact attention, a few query rows at a time: memory linear in the length.

Weights are recomputed from the inputs, so the gradient does not depend on how the output was
approximated: it is exact attention's gradient at the same inputs ("straight-through").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from adaattn_core.mask import Mask

CHUNK_BYTES = 32 << 20
"""Bytes of one chunk's scores; a handful of such buffers live at a time."""

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


class _Block(NamedTuple):
    """Rows of one or all sequences and the keys that any of them may see."""

    batch: slice
    rows: slice
    keys: slice
    visible: torch.Tensor | None


def attention_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: Mask,
    scale: float,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    *,
    need_bias: bool = False,
) -> Gradients:
    """Gradients of exact attention with respect to query, key, value and additive mask.

    Plain differentiable operations: under ``create_graph=True`` the result has a gradient of
    its own (and then keeps every chunk alive).

    Parameters
    ----------
    query : Tensor, shape (batch, heads_q, len_q, dim_qk)
    key : Tensor, shape (batch, heads_kv, len_kv, dim_qk)
    value : Tensor, shape (batch, heads_kv, len_kv, dim_v)
    allowed, bias : Tensor or None
        Boolean and additive masks, four-dimensional, broadcastable to the scores.
    mask : Mask
        The structural part.
    grad_out : Tensor or None, shape (batch, heads_q, len_q, dim_v)
    grad_lse : Tensor or None, shape (batch, heads_q, len_q)

    Returns
    -------
    tuple of Tensor
        Of query, key, value, and of the additive mask (None unless asked for).
    """
    batch, heads_q, len_q, _ = query.shape
    heads_kv, len_kv = key.shape[1], key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    d_query = torch.zeros(query.shape, dtype=wide, device=query.device)
    d_key = torch.zeros(key.shape, dtype=wide, device=query.device)
    d_value = torch.zeros(value.shape, dtype=wide, device=query.device)
    d_bias = (
        torch.zeros(bias.shape, dtype=wide, device=query.device)
        if bias is not None and need_bias
        else None
    )
    for block in _blocks(mask, batch, heads_q, len_q, len_kv, query.device):
        at_q, at_k = (
            (block.batch, slice(None), block.rows),
            (block.batch, slice(None), block.keys),
        )
        q = _grouped(query[at_q].to(wide), heads_kv)
        k = key[at_k].to(wide).unsqueeze(2)
        v = value[at_k].to(wide).unsqueeze(2)
        scores = q @ k.mT * scale
        visible = block.visible
        if allowed is not None:
            part = _part(allowed, block).expand(q.shape[0], heads_q, *scores.shape[-2:])
            part = _grouped(part, heads_kv)
            visible = part if visible is None else part & visible
        if bias is not None:
            part = _part(bias, block).to(wide).expand(q.shape[0], heads_q, *scores.shape[-2:])
            part = _grouped(part, heads_kv)
            scores = scores + part
            unmasked = part != -torch.inf
            visible = unmasked if visible is None else unmasked & visible
        if visible is not None:
            scores = torch.where(visible, scores, -torch.inf)
            # What nobody sees may hold NaN, and 0 * NaN is NaN.
            full = visible.expand(scores.shape)
            seen = full.any(-2).any(2, keepdim=True).unsqueeze(-1)
            k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
            q = torch.where(full.any(-1, keepdim=True), q, 0)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse))
        if grad_out is not None:
            g = _grouped(grad_out[at_q].to(wide), heads_kv)
            d_value[at_k] += (weights.mT @ g).sum(2)
            d_weights = g @ v.mT
            if visible is not None:
                d_weights = torch.where(visible, d_weights, 0)
            d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
        else:
            d_scores = torch.zeros_like(weights)
        if grad_lse is not None:
            g_lse = _grouped(grad_lse[at_q].to(wide), heads_kv).unsqueeze(-1)
            d_scores = d_scores + weights * torch.where(lse == -torch.inf, 0, g_lse)
        d_query[at_q] += (d_scores @ k * scale).flatten(1, 2)
        d_key[at_k] += (d_scores.mT @ q * scale).sum(2)
        if d_bias is not None:
            target = _part(d_bias, block)
            target += d_scores.flatten(1, 2).sum_to_size(target.shape)
    return (
        d_query.to(query.dtype),
        d_key.to(key.dtype),
        d_value.to(value.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _grouped(x: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """Split the axis of query heads into (heads_kv, heads of a group)."""
    return x.reshape(x.shape[0], heads_kv, x.shape[1] // heads_kv, *x.shape[2:])


def _part(array: torch.Tensor, block: _Block) -> torch.Tensor:
    """Cut a block out of a broadcast mask: axes of length 1 stay."""
    cuts = (block.batch, slice(None), block.rows, block.keys)
    return array[
        tuple(slice(None) if n == 1 else cut for n, cut in zip(array.shape, cuts, strict=True))
    ]


def _blocks(
    mask: Mask, batch: int, heads: int, len_q: int, len_kv: int, device: torch.device
) -> Iterator[_Block]:
    """Cut the problem: per sequence where lengths differ, then into chunks of rows."""
    for which, rows, keys in _spans(mask, batch, len_q, len_kv):
        n_rows, n_keys = rows.stop - rows.start, keys.stop - keys.start
        entries = which.stop - which.start
        left, right = mask.reach(n_rows, n_keys)
        step = max(1, CHUNK_BYTES // max(1, 4 * entries * heads * n_keys))
        for first in range(0, n_rows, step):
            last = min(first + step, n_rows)
            shift = n_keys - n_rows if mask.alignment == "bottom_right" else 0
            low = 0 if left is None else max(0, first + shift - left)
            high = n_keys if right is None else min(n_keys, last + shift + right)
            if high <= low:
                continue
            visible = None
            if mask.has_window:
                position = torch.arange(first, last, device=device)[:, None] + shift
                column = torch.arange(low, high, device=device)
                visible = torch.ones(last - first, high - low, dtype=torch.bool, device=device)
                if right is not None:
                    visible &= column <= position + right
                if left is not None:
                    visible &= column >= position - left
            yield _Block(
                which,
                slice(rows.start + first, rows.start + last),
                slice(keys.start + low, keys.start + high),
                visible,
            )


def _spans(
    mask: Mask, batch: int, len_q: int, len_kv: int
) -> Iterator[tuple[slice, slice, slice]]:
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_kv is not None:
        for i in range(len(mask.cu_seqlens_q) - 1):
            yield (
                slice(0, 1),
                slice(mask.cu_seqlens_q[i], mask.cu_seqlens_q[i + 1]),
                slice(mask.cu_seqlens_kv[i], mask.cu_seqlens_kv[i + 1]),
            )
    elif mask.lengths is not None:
        for b, n in enumerate(mask.lengths):
            yield slice(b, b + 1), slice(0, len_q), slice(0, n)
    else:
        yield slice(0, batch), slice(0, len_q), slice(0, len_kv)
