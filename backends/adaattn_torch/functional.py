"""scaled_dot_product_attention: PyTorch's function, with a budget and a certificate."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch.overrides import handle_torch_function, has_torch_function

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget, as_budget
from adaattn_core.errors import BackendUnavailableError, UnsupportedError
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy
from adaattn_torch.bridge import compute
from adaattn_torch.call import Asked
from adaattn_torch.info import AttentionInfo, fall_back, warn_of_fallback
from adaattn_torch.masks.compact import CompactMask
from adaattn_torch.prepare import NOT_TENSORS, prepare
from adaattn_torch.ruled import plain_attention, with_rules

torch.compiler.assume_constant_result(warn_of_fallback)  # type: ignore[no-untyped-call]


@overload
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    budget: ErrorBudget | float | None = ...,
    policy: Policy | str | None = ...,
    backend: Backend | str = ...,
    plan: Plan | None = ...,
    layer: str = ...,
    seed: int | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    strict: bool = ...,
    return_info: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    budget: ErrorBudget | float | None = ...,
    policy: Policy | str | None = ...,
    backend: Backend | str = ...,
    plan: Plan | None = ...,
    layer: str = ...,
    seed: int | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    strict: bool = ...,
    return_info: Literal[True],
) -> tuple[torch.Tensor, AttentionInfo]: ...


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    budget: ErrorBudget | float | None = None,
    policy: Policy | str | None = None,
    backend: Backend | str = "auto",
    plan: Plan | None = None,
    layer: str = "",
    seed: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    strict: bool = False,
    return_info: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, AttentionInfo]:
    """`torch.nn.functional.scaled_dot_product_attention` to a stated tolerance.

    The first eight parameters mean what they mean there: a causal mask starts at the upper
    left, True in a boolean mask lets a query attend, a float mask is added to the scaled
    scores, and dropout is applied whenever ``dropout_p > 0``. Rows that see nothing give 0.
    The output has the query's order of strides.

    What no backend can do (dropout, ``scale=0``, vmap, nested tensors, ...) PyTorch's own
    function computes: a `FallbackWarning` is given once per reason, and the info says so.

    A certificate belongs to every call that somebody can ask about: one with a budget, a
    policy, a plan or a seed, one whose info is returned or listened to. Where there is nobody,
    a backend that offers it computes the same output without one, in less time.

    The gradient is exact attention's at the same inputs, whatever the forward pass
    approximated ("straight-through"). Autocast casts the inputs as it does for PyTorch's own.

    Parameters
    ----------
    query : Tensor, shape (..., heads_q, len_q, dim_qk)
    key : Tensor, shape (..., heads_kv, len_kv, dim_qk)
    value : Tensor, shape (..., heads_kv, len_kv, dim_v)
    attn_mask : Tensor, optional
        Broadcastable to (..., heads_q, len_q, len_kv); or a `CausalBias`.
    dropout_p, is_causal, scale, enable_gqa
        As in PyTorch.
    budget : ErrorBudget or float, optional
        Tolerated error; a float is ``ErrorBudget(rel=budget)``. None: exact.
    policy, backend, plan, layer, seed
        See `adaattn_core.attention`.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)`` before the mask. Default: none.
    sinks : Tensor, optional, shape (heads_q,)
        One more logit in the denominator of each head's rows; it has a gradient. Under
        `torch.compile`, a call with either is written out as plain operations.
    strict : bool
        Raise instead of falling back.
    return_info : bool
        Return the output and an `AttentionInfo`.

    Returns
    -------
    Tensor, shape (..., heads_q, len_q, dim_v), or (Tensor, AttentionInfo)

    Raises
    ------
    UnsupportedError
        If PyTorch would have to compute it and `strict` is set, or if an info is asked for
        where there is none yet: under `torch.compile`, or with fake or meta tensors.
    BackendUnavailableError
        If `backend` names one that cannot run here.
    AdaAttnError
        What `adaattn_core.attention` raises.
    """
    if return_info and torch.compiler.is_compiling():
        raise UnsupportedError(
            got="return_info=True under torch.compile",
            needed="an eager call: a compiled graph returns tensors only",
            do="collect infos of compiled models with `adaattn_torch.listening`",
        )
    asked = Asked(as_budget(budget), policy, plan, backend, layer, seed)
    call = prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, asked)
    is_ruled = softcap is not None or sinks is not None
    if is_ruled and not isinstance(call, str):
        call = with_rules(call, softcap, sinks)
    if isinstance(call, str):
        reason = call
    else:
        try:
            out, _, info = compute(call, return_info)
        except UnsupportedError as error:
            if strict:
                raise
            reason = f"{error.got}; needed {error.needed}"
        except BackendUnavailableError as error:
            if strict or backend != "auto":
                raise
            reason = f"{error.got}; needed {error.needed}"
        else:
            if call.shape is not None:
                out = out.reshape(call.shape)
            return (out, _known(info)) if return_info else out
    if reason is NOT_TENSORS and has_torch_function((query, key, value, attn_mask)):
        return handle_torch_function(  # type: ignore[no-any-return]
            cast(Any, scaled_dot_product_attention), (query, key, value, attn_mask),
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            budget=budget, policy=policy, backend=backend, plan=plan, layer=layer, seed=seed,
            softcap=softcap, sinks=sinks, strict=strict, return_info=return_info,
        )  # fmt: skip
    if isinstance(attn_mask, CompactMask):
        attn_mask = attn_mask.dense()
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    theirs = partial(
        F.scaled_dot_product_attention, *arguments, scale=scale, enable_gqa=enable_gqa
    )
    if is_ruled:
        theirs = partial(plain_attention, *arguments, scale, softcap, sinks, grouped=enable_gqa)
    fell_back, out = fall_back(theirs, reason, strict, layer)
    return (out, fell_back) if return_info else out


def _known(info: AttentionInfo | None) -> AttentionInfo:
    if info is None:
        raise UnsupportedError(
            got="return_info=True with fake or meta tensors, or under a tracing mode",
            needed="tensors with values, outside dispatch modes",
            do="leave return_info out while tracing",
        )
    return info
