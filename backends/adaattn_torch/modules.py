"""AdaptiveAttention, a multi-head attention module with a budget; and a converter of models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch import nn

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import UnsupportedError
from adaattn_core.policies.base import Policy
from adaattn_torch.functional import scaled_dot_product_attention
from adaattn_torch.info import AttentionInfo, announce, listening, warn_of_fallback


class AdaptiveAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` to a stated tolerance; parameters and names are the same.

    Calls that ask for weights, and modules with dropout (while training), `add_bias_kv` or
    `add_zero_attn`, are computed by the parent class: visibly, see `last_info`.

    Parameters
    ----------
    *args, **options
        Of `torch.nn.MultiheadAttention`.
    budget, policy, backend, layer
        See `adaattn_core.attention`.
    strict : bool
        Raise instead of falling back.

    Attributes
    ----------
    last_info : AttentionInfo or None
        Of the last eager call.
    """

    def __init__(
        self,
        *args: Any,
        budget: ErrorBudget | float | None = None,
        policy: Policy | str | None = None,
        backend: Backend | str = "auto",
        layer: str = "",
        strict: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.budget, self.policy, self.backend = budget, policy, backend
        self.layer, self.strict = layer, strict
        self.last_info: AttentionInfo | None = None
        # nn.TransformerEncoderLayer computes attention itself, past this module, unless a
        # module of it has a hook.
        self.register_forward_pre_hook(_stay)

    @classmethod
    def from_multihead(
        cls, module: nn.MultiheadAttention, **settings: Any
    ) -> AdaptiveAttention:
        """Take over a module's parameters (the same objects: optimisers keep working).

        Parameters
        ----------
        **settings
            ``budget``, ``policy``, ``backend``, ``layer``, ``strict``.
        """
        new = cls(
            module.embed_dim,
            module.num_heads,
            dropout=module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device="meta",
            **settings,
        )
        for name, parameter in module.named_parameters(recurse=False):
            setattr(new, name, parameter)
        new.out_proj = module.out_proj
        return new.train(module.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`: True in a boolean mask hides a key."""
        reason = self._reason(query, key, need_weights, attn_mask, is_causal)
        if reason is not None:
            return self._fall_back(
                reason, query, key, value, key_padding_mask=key_padding_mask,
                need_weights=need_weights, attn_mask=attn_mask,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._split(x) for x in self._project(query, key, value))
        causal = is_causal and key_padding_mask is None
        mask = None if causal else self._mask(q, attn_mask, key_padding_mask)
        out = self._attend(q, k, v, mask, causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        def attention() -> torch.Tensor:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                mask,
                is_causal=causal,
                budget=self.budget,
                policy=self.policy,
                backend=self.backend,
                layer=self.layer,
                strict=self.strict,
            )

        if torch.compiler.is_compiling():
            return attention()
        found: list[AttentionInfo] = []
        with listening(found):
            out = attention()
        self.last_info = found[-1] if found else None
        return out

    def _reason(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> str | None:
        """Say why the parent class must take the call."""
        if need_weights:
            return "need_weights=True asks for attention weights (pass need_weights=False)"
        if self.training and self.dropout:
            return "dropout while training"
        if self.bias_k is not None or self.add_zero_attn:
            return "add_bias_kv or add_zero_attn"
        if query.is_nested or query.dim() not in (2, 3) or key.dim() != query.dim():
            return "nested tensors, or numbers of dimensions that PyTorch refuses"
        if is_causal and attn_mask is None:
            return "is_causal without attn_mask, which PyTorch refuses"
        return None

    def _fall_back(
        self, reason: str, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.strict:
            raise UnsupportedError(
                got=reason,
                needed="a call that a backend computes itself, because strict=True",
                do="change the call, or leave strict out to let PyTorch compute it",
            )
        outputs: tuple[torch.Tensor, torch.Tensor | None] = super().forward(*args, **options)
        warn_of_fallback(reason)
        self.last_info = AttentionInfo.of_fallback(reason, self.layer)
        announce(self.last_info)
        return outputs

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(x, weight, bias)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self,
        query: torch.Tensor,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Merge the two masks: boolean (True = may attend) if both are, else additive."""
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.reshape(-1, self.num_heads, *attn_mask.shape[1:])
            masks.append(attn_mask)
        if key_padding_mask is not None:
            masks.append(
                key_padding_mask[..., None, None, :]
                if key_padding_mask.dim() == 2
                else key_padding_mask
            )
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            allowed = ~masks[0]
            return allowed & ~masks[1] if len(masks) == 2 else allowed
        added = [_additive(mask, query.dtype) for mask in masks]
        return added[0] + added[1] if len(added) == 2 else added[0]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(mask, -torch.inf)


def _stay(module: nn.Module, inputs: Any) -> None:
    """Do nothing; see `AdaptiveAttention`."""


def convert(model: nn.Module, **settings: Any) -> nn.Module:
    """Replace every `torch.nn.MultiheadAttention` in a model, in place.

    Parameters
    ----------
    model : Module
        A model, or a `torch.nn.MultiheadAttention` itself.
    **settings
        ``budget``, ``policy``, ``backend``, ``strict``; the layer names are the modules'.

    Returns
    -------
    Module
        The model; or, for a single attention module, its replacement.
    """
    if type(model) is nn.MultiheadAttention:
        return AdaptiveAttention.from_multihead(model, **settings)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its nested tensors are for PyTorch's fast path
        if type(module) is nn.MultiheadAttention:
            parent = model.get_submodule(name.rpartition(".")[0])
            new = AdaptiveAttention.from_multihead(module, layer=name, **settings)
            setattr(parent, name.rpartition(".")[2], new)
    return model
