"""Operators ``adaattn::attention`` and ``adaattn::attention_backward`` for torch's dispatcher.

Compilers and tracers see these two; plain eager calls do without them (`adaattn_torch.bridge`).
The second takes the output and the lse of an exact forward, and none of an approximated one.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from adaattn_core.errors import UnsupportedError
from adaattn_torch.arrays import empty_output, lowered
from adaattn_torch.backward import Saved, gradients, saves_output
from adaattn_torch.call import Call, asks_for_exactness, decode
from adaattn_torch.forward import run
from adaattn_torch.gradient import attention_tangent
from adaattn_torch.watchers import in_forward_mode, is_transformed, refuse_transform

FORWARD, BACKWARD = "adaattn::attention", "adaattn::attention_backward"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? allowed, Tensor? bias, float scale"

torch.library.define(
    FORWARD,
    f"({_INPUTS}, str call, float rel, float rows, float confidence)"
    " -> (Tensor out, Tensor lse)",
)
torch.library.define(
    BACKWARD,
    f"({_INPUTS}, str call, Tensor? out, Tensor? lse, Tensor? grad_out, Tensor? grad_lse,"
    " bool need_bias)"
    " -> (Tensor query, Tensor key, Tensor value, Tensor bias)",
)


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    call: str,
    rel: float,
    rows: float,
    confidence: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    mask, asked = decode(call, rel, rows, confidence)
    found = Call(query, key, value, allowed, bias, mask, scale, asked)
    out, lse, _ = run(found, want_info=False)
    return out, lse


@torch.library.register_fake(FORWARD)  # type: ignore[untyped-decorator]
def _attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    call: str,
    rel: float,
    rows: float,
    confidence: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = empty_output(query, value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    call: str,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    mask, asked = decode(call)
    d_query, d_key, d_value, d_bias, _ = gradients(
        Saved(query, key, value, allowed, bias, mask, scale, out, lse),
        asked.backend, grad_out, grad_lse, need_bias=need_bias,
    )  # fmt: skip
    # An operator cannot leave out a tensor: nothing is asked for, nothing is given.
    return d_query, d_key, d_value, query.new_empty(0) if d_bias is None else d_bias


@torch.library.register_fake(BACKWARD)  # type: ignore[untyped-decorator]
def _backward_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    call: str,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query, key, value))
    if bias is None or not need_bias:
        return d_query, d_key, d_value, query.new_empty(0)
    return d_query, d_key, d_value, bias.new_empty(bias.shape)


class _Differentiable(torch.autograd.Function):
    """The forward operator with its derivatives, in both modes.

    ``torch.library.register_autograd`` knows the reverse mode only, and drops tangents.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        query, key, value, allowed, bias, scale, call = inputs[:7]
        out, lse = _below_autograd(*inputs)
        kept = (out, lse) if saves_output(query, asks_for_exactness(call)) else (None, None)
        ctx.save_for_backward(query, key, value, allowed, bias, *kept)
        ctx.save_for_forward(query, key, value, allowed, bias, None, None)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.call = scale, call
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, allowed, bias, out, lse = ctx.saved_tensors
        if grads[0] is None and grads[1] is None:
            return (None,) * 10
        need_bias = ctx.needs_input_grad[4]
        d_query, d_key, d_value, d_bias = torch.ops.adaattn.attention_backward(
            query, key, value, allowed, bias, ctx.scale, ctx.call, out, lse, *grads, need_bias
        )
        return d_query, d_key, d_value, None, d_bias if need_bias else None, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        t_query, t_key, t_value, _, t_bias = tangents[:5]
        query, key, value, allowed, bias = ctx.saved_tensors[:5]
        return attention_tangent(
            query, key, value, allowed, bias, decode(ctx.call)[0], ctx.scale,
            t_query, t_key, t_value, t_bias,
        )  # fmt: skip


def _below_autograd(*inputs: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.adaattn.attention(*inputs)


@torch.library.impl(FORWARD, "Autograd")
def _attention_autograd(*inputs: Any) -> Any:
    tensors = [x for x in inputs[:5] if x is not None]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if wanted or in_forward_mode():
        if is_transformed(*tensors):
            refuse_transform()
        return _Differentiable.apply(*inputs)  # type: ignore[no-untyped-call]
    return _below_autograd(*inputs)


def _autocast(kind: str, device: str) -> None:
    """Register what autocast does: cast as `scaled_dot_product_attention` does, then go on.

    ``torch.library.register_autocast`` would fix the lower precision once and for all; it is
    the active context that names it.
    """
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, kind))

    @torch.library.impl(FORWARD, kind)
    def cast(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        bias: torch.Tensor | None,
        *rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (lowered(x, dtype) for x in (query, key, value))
        bias = None if bias is None else lowered(bias, dtype)
        with torch._C._ExcludeDispatchKeyGuard(without):
            found: tuple[torch.Tensor, torch.Tensor] = torch.ops.adaattn.attention(
                query, key, value, allowed, bias, *rest
            )
        return found


_autocast("AutocastCPU", "cpu")
_autocast("AutocastCUDA", "cuda")


def _refuse_twice(ctx: Any, *grads: Any) -> NoReturn:
    raise UnsupportedError(
        got="a second derivative through a compiled or traced attention",
        needed="eager mode: only there the gradient has a gradient of its own",
        do="call the attention outside torch.compile",
    )


torch.library.register_autograd(BACKWARD, _refuse_twice, setup_context=lambda *a, **k: None)
