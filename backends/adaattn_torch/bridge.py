"""attend(): checked four-dimensional tensors to a backend and back, differentiably."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from adaattn_core import attention
from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy
from adaattn_torch import call as calls
from adaattn_torch import operators
from adaattn_torch.arrays import from_backend, in_order_of, to_backend
from adaattn_torch.call import Call, encode, structural
from adaattn_torch.direct import Forward, backend_for, forward_for, forward_of
from adaattn_torch.gradient import attention_gradient, attention_tangent, in_forward_mode
from adaattn_torch.info import AttentionInfo, announce, is_heard
from adaattn_torch.prepare import is_transformed, refuse_transform

# Dynamo evaluates a call of this function once, on constants, and keeps the text; it looks the
# function up in its module, which is why it is marked in place.
torch.compiler.assume_constant_result(calls.encode_constants)  # type: ignore[no-untyped-call]


class Attended(NamedTuple):
    """What `attend` returns.

    Attributes
    ----------
    out : Tensor, shape (batch, heads_q, len_q, dim_v)
    lse : Tensor of float32, shape (batch, heads_q, len_q)
    info : AttentionInfo or None
        None where no values exist yet (under a trace, or with fake tensors), and where it was
        not wanted.
    """

    out: torch.Tensor
    lse: torch.Tensor
    info: AttentionInfo | None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: Mask | None = None,
    scale: float,
    budget: ErrorBudget | float | None = None,
    policy: Policy | str | None = None,
    plan: Plan | None = None,
    backend: Backend | str = "auto",
    layer: str = "",
    seed: int | None = None,
    want_info: bool = True,
) -> Attended:
    """Attention of four-dimensional tensors, with gradients.

    The gradient is that of exact attention at the same inputs, whatever the forward pass
    approximated ("straight-through"); it covers the output, the lse and an additive mask.

    Parameters
    ----------
    query : Tensor, shape (batch, heads_q, len_q, dim_qk)
    key : Tensor, shape (batch, heads_kv, len_kv, dim_qk)
    value : Tensor, shape (batch, heads_kv, len_kv, dim_v)
    mask : Mask, optional
        Boolean and additive masks are tensors on the same device, of up to four dimensions.
    scale : float
        Factor on the scores, > 0.
    budget, policy, plan, backend, layer, seed
        See `adaattn_core.attention`.
    want_info : bool
        False lets an exact call that nobody listens to go without a certificate, where the
        backend offers that; the output is the same.

    Returns
    -------
    Attended

    Raises
    ------
    AdaAttnError
        What `adaattn_core.attention` raises.
    """
    mask = Mask.none() if mask is None else mask
    allowed, bias = _four_axes(mask.allowed), _four_axes(mask.bias)
    if isinstance(budget, int | float):
        budget = ErrorBudget(rel=float(budget))
    call = Call(structural(mask), budget, policy, plan, backend, layer, seed)
    if is_transformed(query, key, value, allowed, bias):
        refuse_transform()
    if _is_recorded(query, key, value):
        out, lse = torch.ops.adaattn.attention(
            query, key, value, allowed, bias, scale, *encode(call)
        )
        return Attended(out, lse, None)
    inputs = (query, key, value, bias)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if wanted or in_forward_mode():
        seen: list[AttentionInfo | None] = []
        out, lse = _Attention.apply(  # type: ignore[no-untyped-call]
            query, key, value, allowed, bias, scale, call, want_info, seen
        )
        return Attended(out, lse, seen[0])
    return Attended(*run(query, key, value, allowed, bias, scale, call, want_info))


def exactly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask,
    scale: float,
    backend: Backend | str,
) -> torch.Tensor | None:
    """Exact attention by a backend's short way; None where `attend` must be asked.

    For structural masks outside of traces, where no gradient is wanted and nobody listens; the
    output is that of `attend`. Parameters are those of `attend`.
    """
    if (
        _is_recorded(query, key, value)
        or in_forward_mode()
        or is_heard()
        or not mask.is_structural
    ):
        return None
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return None
    forward = forward_for(backend, query.device)
    if forward is None:
        return None
    arrays = to_backend(query), to_backend(key), to_backend(value)
    found = _directly(forward, arrays, mask, scale)
    return None if found is None else in_order_of(query, from_backend(found[0]))


def _four_axes(array: torch.Tensor | None) -> torch.Tensor | None:
    return None if array is None else array[(None,) * (4 - array.dim())]


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_recorded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether somebody watches at the dispatcher: compilers, tracers, fake tensors, counters.

    They must see an operator: values computed past the dispatcher would be constants to them.
    """
    return (
        torch.compiler.is_compiling()
        or not (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN)
        or query.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    call: Call,
    want_info: bool,
) -> tuple[torch.Tensor, torch.Tensor, AttentionInfo | None]:
    """Compute, without a gradient; the output has the query's order of strides."""
    mask = call.mask
    if allowed is not None:
        mask = mask & Mask.boolean(to_backend(allowed))
    if bias is not None:
        mask = mask & Mask.additive(to_backend(bias))
    arrays = to_backend(query), to_backend(key), to_backend(value)
    backend = backend_for(call.backend, query.device.type)
    if not want_info and call.asks_nothing and not is_heard():
        forward = forward_of(backend)
        found = None if forward is None else _directly(forward, arrays, mask, scale)
        if found is not None:
            return in_order_of(query, from_backend(found[0])), from_backend(found[1]), None
    result = attention(
        *arrays,
        mask=mask,
        scale=scale,
        budget=call.budget,
        policy=call.policy,
        plan=call.plan,
        backend=backend,
        seed=call.seed,
        layer=call.layer,
    )
    info = AttentionInfo.of_result(result, call.layer)
    announce(info)
    return in_order_of(query, from_backend(result.out)), from_backend(result.lse), info


def _directly(
    forward: Forward, arrays: tuple[Any, Any, Any], mask: Mask, scale: float
) -> tuple[Any, Any] | None:
    """Exact attention without a certificate, if the backend takes such a call."""
    try:
        return forward(*arrays, mask=mask, scale=scale)
    except UnsupportedError:
        return None  # the ordinary way does it, or says why not


operators.set_forward(run)


# Saved first of all. PyTorch's attention saves nothing of this shape, so a checkpoint that
# repeats the one in place of the other is an error to PyTorch, and no wrong gradient.
_MARK = torch.empty(0, 7, 1)


class _Attention(torch.autograd.Function):
    """Forward by a backend, backward by `attention_gradient`, itself differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: float,
        call: Call,
        want_info: bool,
        seen: list[AttentionInfo | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, info = run(query, key, value, allowed, bias, scale, call, want_info)
        seen.append(info)
        ctx.save_for_backward(_MARK, query, key, value, allowed, bias)
        ctx.save_for_forward(_MARK, query, key, value, allowed, bias)
        ctx.scale, ctx.mask = scale, call.mask
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, query, key, value, allowed, bias = ctx.saved_tensors
        if grads[0] is None and grads[1] is None:
            return (None,) * 9
        need_bias = ctx.needs_input_grad[4]
        d_query, d_key, d_value, d_bias = attention_gradient(
            query, key, value, allowed, bias, ctx.mask, ctx.scale, *grads, need_bias=need_bias
        )
        return d_query, d_key, d_value, None, d_bias, *(None,) * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        t_query, t_key, t_value, _, t_bias = tangents[:5]
        _, query, key, value, allowed, bias = ctx.saved_tensors
        return attention_tangent(
            query, key, value, allowed, bias, ctx.mask, ctx.scale,
            t_query, t_key, t_value, t_bias,
        )  # fmt: skip
