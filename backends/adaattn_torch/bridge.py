"""attend(): one attention, differentiably; to an operator where somebody records."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget, as_budget
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy
from adaattn_torch import (
    call as calls,
)
from adaattn_torch import (
    operators,  # noqa: F401 -- defines torch.ops.adaattn
)
from adaattn_torch.backward import Saved, gradients, saves_output
from adaattn_torch.call import Asked, Call, encode, structural
from adaattn_torch.forward import Computed, run
from adaattn_torch.gradient import attention_tangent
from adaattn_torch.info import AttentionInfo
from adaattn_torch.ruled import attend_ruled
from adaattn_torch.watchers import (
    in_forward_mode,
    is_recorded,
    is_transformed,
    refuse_transform,
)

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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
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
    softcap, sinks
        Score rules; see `adaattn_torch.scaled_dot_product_attention`.

    Returns
    -------
    Attended

    Raises
    ------
    UnsupportedError
        If a torch.func transform wraps the tensors.
    AdaAttnError
        What `adaattn_core.attention` raises.
    """
    mask = Mask.none() if mask is None else mask
    if is_transformed(query, key, value, mask.allowed, mask.bias):
        refuse_transform()
    asked = Asked(as_budget(budget), policy, plan, backend, layer, seed)
    allowed, bias = _four_axes(mask.allowed), _four_axes(mask.bias)
    call = Call(query, key, value, allowed, bias, structural(mask), scale, asked)
    if softcap is not None or sinks is not None:
        call = call._replace(softcap=softcap, sinks=sinks)
    return Attended(*compute(call, want_info))


def compute(call: Call, want_info: bool) -> Computed:
    """Compute what `attend` returns, of a call that was made already and that nothing wraps."""
    query, key, value, allowed, bias, mask, scale, asked = call[:8]
    if call.is_ruled:
        return attend_ruled(call, want_info)
    if is_recorded(query, key, value):
        out, lse = torch.ops.adaattn.attention(
            query, key, value, allowed, bias, scale, *encode(mask, asked)
        )
        return out, lse, None
    if in_forward_mode() or (torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
        or (bias is not None and bias.requires_grad)
    )):  # fmt: skip
        seen: list[AttentionInfo | None] = []
        out, lse = _Attention.apply(  # type: ignore[no-untyped-call]
            query, key, value, allowed, bias, call, want_info, seen
        )
        return out, lse, seen[0]
    return run(call, want_info)


def _four_axes(array: torch.Tensor | None) -> torch.Tensor | None:
    return None if array is None else array[(None,) * (4 - array.dim())]


# Saved first of all. PyTorch's attention saves nothing of this shape, so a checkpoint that
# repeats the one in place of the other is an error to PyTorch, and no wrong gradient.
_MARK = torch.empty(0, 7, 1)


class _Attention(torch.autograd.Function):
    """Forward by a backend, backward by `gradients`, itself differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        bias: torch.Tensor | None,
        call: Call,
        want_info: bool,
        seen: list[AttentionInfo | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, info = run(call, want_info)
        seen.append(info)
        kept = (out, lse) if saves_output(query, call.asked.is_exactness) else (None, None)
        ctx.save_for_backward(_MARK, query, key, value, allowed, bias, *kept)
        ctx.save_for_forward(_MARK, query, key, value, allowed, bias, None, None)
        ctx.scale, ctx.mask, ctx.backend = call.scale, call.mask, call.asked.backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, query, key, value, allowed, bias, out, lse = ctx.saved_tensors
        if grads[0] is None and grads[1] is None:
            return (None,) * 8
        saved = Saved(query, key, value, allowed, bias, ctx.mask, ctx.scale, out, lse)
        d_query, d_key, d_value, d_bias, _ = gradients(
            saved, ctx.backend, *grads, need_bias=ctx.needs_input_grad[4]
        )
        return d_query, d_key, d_value, None, d_bias, *(None,) * 3

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        t_query, t_key, t_value, _, t_bias = tangents[:5]
        _, query, key, value, allowed, bias = ctx.saved_tensors[:6]
        return attention_tangent(
            query, key, value, allowed, bias, ctx.mask, ctx.scale,
            t_query, t_key, t_value, t_bias,
        )  # fmt: skip
