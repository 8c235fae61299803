"""Multi-head attention around an attention of one's own, by `torch.nn.functional`'s rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name

Attention = Callable[..., torch.Tensor]
"""Called as PyTorch's function: query, key, value, attn_mask, dropout_p, is_causal."""


class MultiHead(NamedTuple):
    """Arguments of `torch.nn.functional.multi_head_attention_forward`, under its names."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: torch.Tensor | None
    in_proj_bias: torch.Tensor | None
    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: torch.Tensor
    out_proj_bias: torch.Tensor | None
    training: bool = True
    key_padding_mask: torch.Tensor | None = None
    need_weights: bool = True
    attn_mask: torch.Tensor | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: torch.Tensor | None = None
    k_proj_weight: torch.Tensor | None = None
    v_proj_weight: torch.Tensor | None = None
    static_k: torch.Tensor | None = None
    static_v: torch.Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False

    def reason(self) -> str | None:
        """Say why PyTorch must take the call; what it would refuse is left to it."""
        if self.need_weights:
            return "need_weights=True asks for attention weights (pass need_weights=False)"
        if self.static_k is not None or self.static_v is not None:
            return "static keys or values"
        tensors = (self.query, self.key, self.value)
        if any(x.is_nested for x in tensors):
            return "nested tensors"
        if not self._shapes_fit():
            return "shapes that nn.MultiheadAttention refuses"
        if not self._masks_fit():
            return "a mask that nn.MultiheadAttention refuses"
        if (self.bias_k is None) != (self.bias_v is None):
            return "only one of bias_k and bias_v"
        return None

    def _shapes_fit(self) -> bool:
        query, key, value = self.query, self.key, self.value
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            return False
        if query.dim() == 3 and query.shape[1] != key.shape[1]:
            return False
        if key.shape[:-1] != value.shape[:-1]:
            return False
        width = query.shape[-1]
        if width != self.embed_dim_to_check or width % self.num_heads:
            return False
        if self.use_separate_proj_weight:
            given = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return all(
                weight is not None and weight.shape == (width, x.shape[-1])
                for weight, x in zip(given, (query, key, value), strict=True)
            )
        return self.in_proj_weight is not None and key.shape[-1] == value.shape[-1] == width

    def _masks_fit(self) -> bool:
        padding, mask = self.key_padding_mask, self.attn_mask
        if any(
            x is not None and x.dtype != torch.bool and not x.is_floating_point()
            for x in (padding, mask)
        ):
            return False
        len_q, len_kv = self.query.shape[0], self.key.shape[0]
        batch = self.query.shape[1] if self.query.dim() == 3 else 1
        if padding is not None:
            wanted = (batch, len_kv) if self.query.dim() == 3 else (len_kv,)
            if padding.shape != wanted:
                return False
        if mask is None:
            return not self.is_causal  # a hint about a mask that is not there
        if mask.shape in ((len_q, len_kv), (batch * self.num_heads, len_q, len_kv)):
            return True
        # The hint is taken at its word, as PyTorch does: the mask itself is not read.
        hinted = self.is_causal and padding is None
        return hinted and (mask.dim() == 2 or (mask.dim() == 3 and self.query.dim() == 3))

    def forward(self, attention: Attention) -> torch.Tensor:
        """Compute the output, (len_q, [batch,] embed_dim), where no `reason` is against it."""
        query, key, value = self.query, self.key, self.value
        padding = self.key_padding_mask
        batched = query.dim() == 3
        if not batched:
            # The same tensors stay the same: projected at once below.
            if query is key is value:
                query = key = value = query.unsqueeze(1)
            else:
                query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            padding = None if padding is None else padding.unsqueeze(0)
        q, k, v = self._project(query, key, value)
        causal = self.is_causal and padding is None
        mask = None if causal else self.attn_mask
        batch = query.shape[1]
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else _split(mask, 0, batch)
        if padding is not None:
            padding = padding[:, None, None]
        for more in self._further_keys(k):
            k, v = torch.cat([k, more[0]]), torch.cat([v, more[1]])
            mask = None if mask is None else F.pad(mask, (0, 1))
            padding = None if padding is None else F.pad(padding, (0, 1))
        q, k, v = (_split(x, -1, self.num_heads).permute(1, 2, 0, 3) for x in (q, k, v))
        merged = _merged(mask, padding, query.dtype)
        out = attention(q, k, v, merged, self.dropout_p if self.training else 0.0, causal)
        out = out.permute(2, 0, 1, 3).flatten(2)
        out = F.linear(out, self.out_proj_weight, self.out_proj_bias)
        return out if batched else out.squeeze(1)

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        weights: Any
        if self.use_separate_proj_weight:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            assert self.in_proj_weight is not None
            if query is key is value:
                return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(
            F.linear(x, weight, bias)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

    def _further_keys(self, k: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One more key and value each, visible to all: learned ones, and zeros."""
        shape = (1, *k.shape[1:])
        further = []
        if self.bias_k is not None and self.bias_v is not None:
            further.append((self.bias_k.expand(shape), self.bias_v.expand(shape)))
        if self.add_zero_attn:
            further.append((k.new_zeros(shape), k.new_zeros(shape)))
        return further


def _split(x: torch.Tensor, axis: int, parts: int) -> torch.Tensor:
    parted: torch.Tensor = x.unflatten(axis, (parts, -1))  # type: ignore[no-untyped-call]
    return parted


def _merged(
    mask: torch.Tensor | None, padding: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Merge masks in which True hides: boolean (True = may attend) if both are, else added."""
    masks = [x for x in (mask, padding) if x is not None]
    if not masks:
        return None
    if all(x.dtype == torch.bool for x in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    added = [_additive(x, dtype) for x in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(mask, -torch.inf)
