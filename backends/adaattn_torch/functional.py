"""scaled_dot_product_attention: PyTorch's function, with a budget and a certificate."""

from __future__ import annotations

import math
import threading
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch.nn.attention.bias import CausalBias, CausalVariant

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import (
    ArgumentError,
    BackendUnavailableError,
    ShapeError,
    UnsupportedError,
)
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy
from adaattn_torch.bridge import Attended, attend
from adaattn_torch.info import AttentionInfo, announce, warn_of_fallback

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
torch.compiler.assume_constant_result(warn_of_fallback)  # type: ignore[no-untyped-call]


class _Bypass(threading.local):
    """Whether this thread is inside a fallback: enabled modes then let calls pass."""

    active = False


bypass = _Bypass()


class _Prepared(NamedTuple):
    """Tensors of four dimensions, and the shape that the output must have."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Mask
    scale: float
    shape: tuple[int, ...]


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
    prepared = _prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    reason = prepared if isinstance(prepared, str) else None
    if not isinstance(prepared, str):
        try:
            attended = attend(
                prepared.query,
                prepared.key,
                prepared.value,
                mask=prepared.mask,
                scale=prepared.scale,
                budget=budget,
                policy=policy,
                plan=plan,
                backend=backend,
                layer=layer,
                seed=seed,
            )
        except UnsupportedError as error:
            if strict:
                raise
            reason = f"{error.got}; needed {error.needed}"
        except BackendUnavailableError as error:
            if strict or backend != "auto":
                raise
            reason = f"{error.got}; needed {error.needed}"
        else:
            out = attended.out.reshape(prepared.shape)
            return (out, _info(attended)) if return_info else out
    assert reason is not None
    out = _fall_back(
        reason, strict, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    info = AttentionInfo.of_fallback(reason, layer)
    if not torch.compiler.is_compiling():
        announce(info)
    return (out, info) if return_info else out


def _info(attended: Attended) -> AttentionInfo:
    if attended.info is None:
        raise UnsupportedError(
            got="return_info=True with fake or meta tensors, or under a tracing mode",
            needed="tensors with values, outside dispatch modes",
            do="leave return_info out while tracing",
        )
    return attended.info


def _prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> _Prepared | str:
    """Check and bring to four dimensions; or say why PyTorch must take the call.

    What PyTorch would refuse is left to PyTorch, so that its own error is raised.
    """
    reason = _reason(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is not None:
        return reason
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if factor < 0:
        query, factor = -query, -factor
    if not 0 < factor < math.inf:
        return f"scale={factor}"
    lead = _leading_shape(query, key, value, enable_gqa)
    if lead is None:
        return "leading dimensions that do not broadcast"
    len_q, len_kv = query.shape[-2], key.shape[-2]
    heads_kv = key.shape[-3] if enable_gqa else None
    query = _four_axes(query, lead, None)
    key, value = _four_axes(key, lead, heads_kv), _four_axes(value, lead, heads_kv)
    mask = Mask.none()
    if isinstance(attn_mask, CausalBias):
        if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (len_q, len_kv):
            return "a CausalBias made for other lengths"
        upper = attn_mask.variant == CausalVariant.UPPER_LEFT
        mask = Mask.causal("top_left" if upper else "bottom_right")
    elif is_causal:
        mask = Mask.causal("top_left")
    elif attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, query.dtype):
            return f"a mask of {attn_mask.dtype} for tensors of {query.dtype}"
        array = _mask_axes(attn_mask, lead, len_q, len_kv)
        if array is None:
            return f"a mask of shape {tuple(attn_mask.shape)}"
        mask = Mask.boolean(array) if array.dtype == torch.bool else Mask.additive(array)
    return _Prepared(query, key, value, mask, factor, (*lead, len_q, value.shape[-1]))


def _reason(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Say why PyTorch must take the call, as far as types and sizes tell."""
    if dropout_p != 0.0:
        return "dropout"
    if is_causal and attn_mask is not None:
        raise ArgumentError(  # some of PyTorch's kernels ignore one of the two
            got="attn_mask together with is_causal=True",
            needed="one of the two",
            do="merge the causal mask into attn_mask",
        )
    tensors = (query, key, value)
    if any(x.is_nested or x.layout != torch.strided for x in tensors):
        return "nested or sparse tensors"
    if not torch.compiler.is_compiling() and any(
        torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (*tensors, attn_mask)
        if x is not None
    ):  # fmt: skip
        return "a torch.func transform (vmap, grad, jvp)"
    if any(x.dim() < 2 for x in tensors) or (enable_gqa and any(x.dim() < 3 for x in tensors)):
        return "too few dimensions"
    if not query.device == key.device == value.device:
        return "tensors on different devices"
    is_array = isinstance(attn_mask, torch.Tensor) and not isinstance(attn_mask, CausalBias)
    if is_array and attn_mask is not None and attn_mask.device != query.device:
        return "a mask on another device"
    if key.shape[-2] != value.shape[-2]:
        raise ShapeError(  # some of PyTorch's kernels read past the end
            got=f"{key.shape[-2]} keys, {value.shape[-2]} values",
            needed="as many values as keys",
            do="check that key and value come from the same layer and cache",
        )
    if key.shape[-1] != query.shape[-1]:
        return "queries and keys of different lengths of vectors"
    if any(0 in x.shape[:-2] or x.shape[-1] == 0 for x in tensors):
        return "a dimension of size 0 other than a length"
    return None


def _autocast(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cast to the lower precision of an active autocast, as it does for PyTorch's function."""
    kind = query.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: torch.Tensor) -> torch.Tensor:
        eligible = x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    if attn_mask is not None and not isinstance(attn_mask, CausalBias):
        attn_mask = cast(attn_mask)
    return cast(query), cast(key), cast(value), attn_mask


def _leading_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[int, ...] | None:
    """Broadcast shape of everything before (len, dim), with the query's heads; None if none."""
    heads: tuple[int, ...] = ()
    shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if enable_gqa:
        (h_q, h_k, h_v) = (shape[-1] for shape in shapes)
        if h_k != h_v or h_q % h_k:
            return None
        heads, shapes = (h_q,), [shape[:-1] for shape in shapes]
    if shapes[0] == shapes[1] == shapes[2]:
        return (*shapes[0], *heads)
    try:
        return (*torch.broadcast_shapes(*shapes), *heads)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None


def _four_axes(x: torch.Tensor, lead: tuple[int, ...], heads_kv: int | None) -> torch.Tensor:
    """Bring to (batch, heads, len, dim): a view wherever the strides allow one."""
    if heads_kv is not None:
        lead = (*lead[:-1], heads_kv)
    if tuple(x.shape[:-2]) != lead:
        x = x.expand(*lead, *x.shape[-2:])
    if len(lead) == 2:
        return x
    if len(lead) < 2:
        return x[(None,) * (2 - len(lead))]
    return x.flatten(0, len(lead) - 2)


def _mask_axes(
    mask: torch.Tensor, lead: tuple[int, ...], len_q: int, len_kv: int
) -> torch.Tensor | None:
    """Bring a mask to four dimensions, broadcast axes of length 1; None if it does not fit."""
    full = (*lead, len_q, len_kv)
    if mask.dim() > len(full):
        return None
    pairs = zip(reversed(mask.shape), reversed(full), strict=False)
    if any(n not in (1, whole) for n, whole in pairs):
        return None
    mask = mask[(None,) * (max(len(full), 4) - mask.dim())]
    if len(lead) > 2:
        if any(n != 1 for n in mask.shape[: len(lead) - 1]):
            mask = mask.expand(*lead[:-1], *mask.shape[-3:])
        mask = mask.flatten(0, len(lead) - 2)
    return mask


def _fall_back(
    reason: str,
    strict: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    if strict:
        raise UnsupportedError(
            got=reason,
            needed="a call that a backend computes itself, because strict=True",
            do="change the call, or leave strict out to let PyTorch compute it",
        )
    extra: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if torch.compiler.is_compiling():
        warn_of_fallback(reason)
        return F.scaled_dot_product_attention(*arguments, **extra)
    before, bypass.active = bypass.active, True
    try:
        out = F.scaled_dot_product_attention(*arguments, **extra)
    finally:
        bypass.active = before
    warn_of_fallback(reason)  # after: what PyTorch refuses is its error, and no fallback
    return out
