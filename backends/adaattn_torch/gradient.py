"""Gradient and tangent of exact attention, in chunks of rows: memory linear in the length.

Weights are recomputed from the inputs, so neither depends on how the output was approximated:
they are exact attention's at the same inputs ("straight-through").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from adaattn_core.mask import Mask

CHUNK_BYTES = 32 << 20
"""Bytes of one chunk's scores; a handful of such buffers live at a time."""

Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]
"""Of query, key, value, the additive mask, and the sinks."""


class _Block(NamedTuple):
    """Rows of one or all sequences and the keys that any of them may see."""

    batch: slice
    rows: slice
    keys: slice
    visible: torch.Tensor | None


class _Chunk(NamedTuple):
    """A block's operands and weights, query heads split into (heads_kv, heads of a group).

    Queries that see nothing and keys that nobody sees are 0: they may hold NaN, and 0 * NaN is
    NaN. `seen` tells which keys are kept, of shape (batch, heads_kv, 1, keys, 1). With sinks,
    `lse` and `weights` count them, and `sink` is what is left for the sink of each row; `slope`
    is what a softcap multiplies the derivative of a score by.
    """

    block: _Block
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None
    seen: torch.Tensor | None
    lse: torch.Tensor
    weights: torch.Tensor
    slope: torch.Tensor | None
    sink: torch.Tensor | None


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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Gradients:
    """Gradients of exact attention, score rules included, with respect to all of its tensors.

    Plain differentiable operations: under ``create_graph=True`` the result has a gradient of
    its own (and then keeps every chunk alive). Gradients of the output may be batched.

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
    softcap : float or None
    sinks : Tensor or None, shape (heads_q,)
        See `adaattn_core.scores`.

    Returns
    -------
    tuple of Tensor
        Of query, key, value, of the additive mask (None unless asked for), and of the sinks.
    """
    wide, heads_kv = _wide(query), key.shape[1]
    zero = _zero(wide, grad_out, grad_lse)
    d_query, d_key, d_value = (zero.new_zeros(x.shape) for x in (query, key, value))
    d_bias = zero.new_zeros(bias.shape) if bias is not None and need_bias else None
    d_sinks = None if sinks is None else zero.new_zeros(sinks.shape)
    if d_sinks is not None and sinks is not None and grad_lse is not None:
        # Of a row that sees nothing the lse is the sink; the others' share is taken off below.
        of_head = grad_lse.to(wide).sum((0, 2))
        d_sinks = d_sinks + torch.where(sinks == -torch.inf, 0, of_head)
    for chunk in _chunks(query, key, value, allowed, bias, mask, scale, softcap, sinks):
        block, weights, visible = chunk.block, chunk.weights, chunk.visible
        if grad_out is not None:
            g = _grouped(_rows(grad_out, block).to(wide), heads_kv)
            _keys(d_value, block).add_((weights.mT @ g).sum(2))
            d_weights = g @ chunk.value.mT
            if visible is not None:
                d_weights = torch.where(visible, d_weights, 0)
            mean = (weights * d_weights).sum(-1, keepdim=True)
            d_scores = weights * (d_weights - mean)
            if d_sinks is not None and chunk.sink is not None:
                d_sinks = d_sinks - _per_head(chunk.sink * mean)
        else:
            d_scores = torch.zeros_like(weights)
        if grad_lse is not None:
            g_lse = _grouped(_rows(grad_lse, block).to(wide), heads_kv).unsqueeze(-1)
            d_scores = d_scores + weights * torch.where(chunk.lse == -torch.inf, 0, g_lse)
            if d_sinks is not None and sinks is not None and chunk.sink is not None:
                rest = torch.where(chunk.lse == -torch.inf, 0, g_lse * (1 - chunk.sink))
                none = (sinks == -torch.inf).reshape(heads_kv, -1, 1, 1)
                d_sinks = d_sinks - _per_head(torch.where(none, 0, rest))
        if d_bias is not None:
            target = _part(d_bias, block)
            target.add_(_merged(d_scores).sum_to_size(target.shape))
        if chunk.slope is not None:
            d_scores = d_scores * chunk.slope
        _rows(d_query, block).add_(_merged(d_scores @ chunk.key * scale))
        _keys(d_key, block).add_((d_scores.mT @ chunk.query * scale).sum(2))
    return (
        d_query.to(query.dtype),
        d_key.to(key.dtype),
        d_value.to(value.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        None if d_sinks is None or sinks is None else d_sinks.to(sinks.dtype),
    )


def attention_tangent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: Mask,
    scale: float,
    t_query: torch.Tensor | None,
    t_key: torch.Tensor | None,
    t_value: torch.Tensor | None,
    t_bias: torch.Tensor | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    t_sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents of exact attention's output and lse, for forward-mode differentiation.

    Parameters
    ----------
    query, key, value, allowed, bias, mask, scale
        See `attention_gradient`.
    t_query, t_key, t_value, t_bias : Tensor or None
        Tangents of the inputs, each of its input's shape; None is 0.
    softcap, sinks, t_sinks
        See `attention_gradient`; the tangent of the sinks.

    Returns
    -------
    t_out : Tensor, shape (batch, heads_q, len_q, dim_v)
    t_lse : Tensor of float32, shape (batch, heads_q, len_q)
    """
    wide, heads_kv = _wide(query), key.shape[1]
    zero = _zero(wide, t_query, t_key, t_value, t_bias, t_sinks)
    t_out = zero.new_zeros((*query.shape[:-1], value.shape[-1]))
    t_lse = zero.new_zeros(query.shape[:-1])
    if sinks is not None and t_sinks is not None:  # of rows that see nothing; others follow
        own = torch.where(sinks == -torch.inf, 0, t_sinks.to(wide))
        t_lse = t_lse + own[None, :, None]
    for chunk in _chunks(query, key, value, allowed, bias, mask, scale, softcap, sinks):
        block, weights = chunk.block, chunk.weights

        def kept(tangent: torch.Tensor, chunk: _Chunk = chunk) -> torch.Tensor:
            cut = _keys(tangent, chunk.block).to(wide).unsqueeze(2)
            return cut if chunk.seen is None else torch.where(chunk.seen, cut, 0)

        t_scores = torch.zeros_like(weights)
        if t_query is not None:
            part = _grouped(_rows(t_query, block).to(wide), heads_kv)
            t_scores = t_scores + part @ chunk.key.mT * scale
        if t_key is not None:
            t_scores = t_scores + chunk.query @ kept(t_key).mT * scale
        if chunk.slope is not None:
            t_scores = t_scores * chunk.slope
        if t_bias is not None:
            part = _part(t_bias, block).to(wide)
            shape = (weights.shape[0], query.shape[1], *weights.shape[-2:])
            t_scores = t_scores + _grouped(part.expand(shape), heads_kv)
        if chunk.visible is not None:
            t_scores = torch.where(chunk.visible, t_scores, 0)
        mean = (weights * t_scores).sum(-1, keepdim=True)
        before = torch.zeros_like(mean)
        if sinks is not None and t_sinks is not None and chunk.sink is not None:
            before = torch.where(sinks == -torch.inf, 0, t_sinks.to(wide))
            before = before.reshape(heads_kv, -1, 1, 1).expand(mean.shape)
            mean = mean + chunk.sink * before
        out = weights * (t_scores - mean) @ chunk.value
        if t_value is not None:
            out = out + weights @ kept(t_value)
        _rows(t_out, block).add_(_merged(out))
        _rows(t_lse, block).add_(_merged(mean - before)[..., 0])
    return t_out.to(query.dtype), t_lse.to(torch.float32)


def _wide(query: torch.Tensor) -> torch.dtype:
    """Return the format that is computed in."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _zero(wide: torch.dtype, *given: torch.Tensor | None) -> torch.Tensor:
    """Return a scalar 0 from which buffers are made: batched as soon as one of `given` is.

    Only such buffers may be added to in place under a batch of gradients (vmap).
    """
    zeros = [x.new_zeros((), dtype=wide) for x in given if x is not None]
    total = zeros[0]
    for zero in zeros[1:]:
        total = total + zero
    return total


def _chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Iterator[_Chunk]:
    """Compute the weights of exact attention, block by block."""
    batch, heads_q, len_q, _ = query.shape
    heads_kv, len_kv = key.shape[1], key.shape[2]
    wide = _wide(query)
    for block in _blocks(mask, batch, heads_q, len_q, len_kv, query.device):
        q = _grouped(_rows(query, block).to(wide), heads_kv)
        k = _keys(key, block).to(wide).unsqueeze(2)
        v = _keys(value, block).to(wide).unsqueeze(2)
        scores = q @ k.mT * scale
        visible, seen, slope = block.visible, None, None
        if softcap is not None:
            capped = torch.tanh(scores / softcap)
            scores, slope = softcap * capped, 1 - capped * capped
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
            full = visible.expand(scores.shape)
            seen = full.any(-2).any(2, keepdim=True).unsqueeze(-1)
            k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
            q = torch.where(full.any(-1, keepdim=True), q, 0)
            slope = None if slope is None else torch.where(visible, slope, 0)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        # Not exp(scores - lse): of a row of the lowest finite numbers the lse is one of them.
        blind = lse == -torch.inf
        weights = torch.softmax(torch.where(blind, 0, scores), -1)
        weights = torch.where(blind, 0, weights)
        sink = None
        if sinks is not None:
            logit = sinks.to(wide).reshape(heads_kv, -1, 1, 1)
            with_sink = torch.logaddexp(lse, logit)
            unseen = with_sink == -torch.inf
            weights = weights * torch.where(blind, 0, torch.exp(lse - with_sink))
            sink = torch.where(unseen, 0, torch.exp(logit - with_sink))
            lse = with_sink
        yield _Chunk(block, q, k, v, visible, seen, lse, weights, slope, sink)


def _per_head(x: torch.Tensor) -> torch.Tensor:
    """Sum (batch, heads_kv, heads of a group, rows, 1) to one number a query head."""
    return x.sum((0, 3, 4)).reshape(-1)


def _rows(array: torch.Tensor, block: _Block) -> torch.Tensor:
    """Cut a block's rows out of what has one per query."""
    return _narrow(_narrow(array, 0, block.batch), 2, block.rows)


def _keys(array: torch.Tensor, block: _Block) -> torch.Tensor:
    """Cut a block's keys out of what has one per key."""
    return _narrow(_narrow(array, 0, block.batch), 2, block.keys)


def _narrow(array: torch.Tensor, axis: int, cut: slice) -> torch.Tensor:
    """Slice an axis; indexing with a slice of everything has no rule for batched tensors."""
    return array.narrow(axis, cut.start, cut.stop - cut.start)


def _grouped(x: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """Split the axis of query heads into (heads_kv, heads of a group)."""
    return x.reshape(x.shape[0], heads_kv, x.shape[1] // heads_kv, *x.shape[2:])


def _merged(x: torch.Tensor) -> torch.Tensor:
    """Invert `_grouped`; not by ``flatten``, which has no rule for batches of gradients."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _part(array: torch.Tensor, block: _Block) -> torch.Tensor:
    """Cut a block out of a broadcast mask: axes of length 1 stay."""
    for axis, cut in ((0, block.batch), (2, block.rows), (3, block.keys)):
        if array.shape[axis] != 1:
            array = _narrow(array, axis, cut)
    return array


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
