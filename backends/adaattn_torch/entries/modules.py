"""AdaptiveAttention, a multi-head attention module with a budget; and a converter of models."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import UnsupportedError
from adaattn_core.policies.base import Policy
from adaattn_torch.entries.multihead import MultiHead
from adaattn_torch.functional import scaled_dot_product_attention
from adaattn_torch.info import AttentionInfo, fall_back, listening


class AdaptiveAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` to a stated tolerance; parameters and names are the same.

    Calls that ask for weights are computed by the parent class, and dropout (while training)
    by PyTorch's function: visibly, see `last_info`. What the parent class refuses is refused.

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
        self._settle(budget, policy, backend, layer, strict)

    def _settle(
        self,
        budget: ErrorBudget | float | None = None,
        policy: Policy | str | None = None,
        backend: Backend | str = "auto",
        layer: str = "",
        strict: bool = False,
    ) -> None:
        """Set what this class has beside its parent."""
        self.budget, self.policy, self.backend = budget, policy, backend
        self.layer, self.strict = layer, strict
        self.last_info: AttentionInfo | None = None
        # nn.TransformerEncoderLayer computes attention itself, past this module, unless a
        # module of it has a hook.
        if _stay not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_stay)

    @classmethod
    def from_multihead(
        cls, module: nn.MultiheadAttention, **settings: Any
    ) -> AdaptiveAttention:
        """Make another module of the same parameters: optimisers keep working.

        Hooks, buffers, submodules and attributes are shared as well.

        Parameters
        ----------
        **settings
            ``budget``, ``policy``, ``backend``, ``layer``, ``strict``.

        Raises
        ------
        UnsupportedError
            As `convert`.
        """
        wanted = _converted_class(module, "")
        new: AdaptiveAttention = wanted.__new__(wanted)
        # Tables of its own, so that what is registered with one does not appear in the other.
        new.__dict__.update(
            (name, copy(x) if isinstance(x, dict) else x) for name, x in vars(module).items()
        )
        new._settle(**settings)
        return new

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
        given = query, key, value
        if self.batch_first and not query.is_nested and query.dim() == 3:
            same = query is key is value
            first = query.transpose(0, 1)
            query, key, value = (
                (first,) * 3 if same else (first, *(_batch_second(x) for x in (key, value)))
            )
        call = MultiHead(
            query, key, value, self.embed_dim, self.num_heads,
            self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v,
            self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias,
            training=self.training, key_padding_mask=key_padding_mask,
            need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight, k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight, average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )  # fmt: skip
        reason = call.reason()
        if reason is not None:
            theirs = partial(
                super().forward, *given, key_padding_mask=key_padding_mask,
                need_weights=need_weights, attn_mask=attn_mask,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
            info, outputs = fall_back(theirs, reason, self.strict, self.layer)
            if not torch.compiler.is_compiling():
                self.last_info = info
            return outputs  # type: ignore[no-any-return]
        out = call.forward(self._attend)
        return (out.transpose(0, 1) if self.batch_first and out.dim() == 3 else out), None

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        causal: bool,
    ) -> torch.Tensor:
        def attention() -> torch.Tensor:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                mask,
                dropout,
                causal,
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


def _batch_second(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1) if x.dim() == 3 else x


def _stay(module: nn.Module, inputs: Any) -> None:
    """Do nothing; see `AdaptiveAttention`."""


def _converted_class(module: nn.MultiheadAttention, name: str) -> type[AdaptiveAttention]:
    """Return the class that a module gets; or refuse, with the reason.

    Raises
    ------
    UnsupportedError
    """
    where = f"the module {name!r}" if name else "a module"
    if isinstance(module, AdaptiveAttention):
        return type(module)
    clash = sorted({*_SETTINGS, "last_info"} & {*vars(module), *module._modules})
    if clash:
        raise UnsupportedError(
            got=f"{where} with attributes named {', '.join(clash)}",
            needed="other names: AdaptiveAttention has attributes of these",
            do="rename them, or build an AdaptiveAttention yourself",
        )
    if "forward" in vars(module):
        raise UnsupportedError(
            got=f"{where} with a forward method of its own object",
            needed="nn.MultiheadAttention's own: a converted module would never call that one",
            do="convert before you wrap forward",
        )
    kind = type(module)
    if kind is nn.MultiheadAttention:
        return AdaptiveAttention
    if is_parametrized(module) and kind.__bases__ == (nn.MultiheadAttention,):
        # A class that PyTorch made for this one module: properties over its parent.
        own = {name: x for name, x in vars(kind).items() if name not in _NOT_COPIED}
        return type(kind.__name__, (AdaptiveAttention,), own)
    raise UnsupportedError(
        got=f"{where} of the class {kind.__module__}.{kind.__qualname__}",
        needed="nn.MultiheadAttention itself: a subclass may compute something else",
        do="convert the other modules one by one, or use adaattn_torch.enable()",
    )


_NOT_COPIED = ("__dict__", "__weakref__")
_SETTINGS = ("budget", "policy", "backend", "layer", "strict")


def convert(model: nn.Module, **settings: Any) -> nn.Module:
    """Make every `torch.nn.MultiheadAttention` in a model an `AdaptiveAttention`, in place.

    The modules stay the same objects, with their parameters, buffers, hooks, parametrisations
    and attributes, wherever they are referred to. Those that are `AdaptiveAttention` already
    get the new settings. Nothing is converted if something must be refused.

    Parameters
    ----------
    model : Module
        A model, or a `torch.nn.MultiheadAttention` itself.
    **settings
        ``budget``, ``policy``, ``backend``, ``strict``; the layer names are the modules'.

    Returns
    -------
    Module
        The model.

    Raises
    ------
    UnsupportedError
        For a subclass of `torch.nn.MultiheadAttention`, or a module whose ``forward`` was
        replaced: what they compute is not known.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    classes = {name: _converted_class(module, name) for name, module in found.items()}
    for name, attention in found.items():
        attention.__class__ = classes[name]
        assert isinstance(attention, AdaptiveAttention)
        attention._settle(**({"layer": name} | settings))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its nested tensors are for PyTorch's fast path
    return model
