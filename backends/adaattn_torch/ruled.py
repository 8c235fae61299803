"""Attention with a softcap or sinks: differentiably by a backend, or by plain operations.

`adaattn_core.scores` says what the two are. Plain eager calls go to a backend, and their
gradients are computed as those of calls without rules are (`adaattn_torch.backward`): by a
backend that differentiates the rule, else in chunks of plain operations. Recorded calls
(`torch.compile`, tracing) are written out as plain operations.
"""

from __future__ import annotations

from typing import Any

import torch

from adaattn_core.errors import UnsupportedError
from adaattn_torch.backward import Saved, gradients, saves_output
from adaattn_torch.call import Call
from adaattn_torch.forward import Computed, run
from adaattn_torch.gradient import attention_tangent
from adaattn_torch.info import AttentionInfo
from adaattn_torch.watchers import in_forward_mode, is_recorded

__all__ = ["attend_ruled", "plain_attention", "with_rules"]


def with_rules(call: Call, softcap: float | None, sinks: torch.Tensor | None) -> Call | str:
    """Add score rules to a call; or say why plain operations must compute it."""
    if is_recorded(call.query, call.key, call.value):
        return "a softcap or sinks in a recorded call"
    if sinks is not None and call.query.shape[1] != sinks.shape[-1]:
        return f"sinks of shape {tuple(sinks.shape)} for {call.query.shape[1]} heads"
    return call._replace(softcap=softcap, sinks=sinks)


def attend_ruled(call: Call, want_info: bool) -> Computed:
    """Compute a call with a rule that was checked already.

    Raises
    ------
    UnsupportedError
        If somebody records it: no operator carries rules.
    """
    query, key, value, allowed, bias = call[:5]
    if is_recorded(query, key, value):
        raise UnsupportedError(
            got="a softcap or sinks in a recorded call",
            needed="an eager call",
            do="use adaattn_torch.scaled_dot_product_attention: it writes such calls out",
        )
    given = [x for x in (query, key, value, bias, call.sinks) if x is not None]
    if in_forward_mode() or (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        seen: list[AttentionInfo | None] = []
        out, lse = _RuledAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, allowed, bias, call.sinks, call, want_info, seen
        )
        return out, lse, seen[0]
    return run(call, want_info)


# Of a shape that plain calls do not save first: a checkpoint that repeats one in the other's
# place is an error to PyTorch (see `adaattn_torch.bridge`).
_MARK = torch.empty(0, 7, 2)


class _RuledAttention(torch.autograd.Function):
    """Forward by a backend, backward by `gradients`, itself differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        call: Call,
        want_info: bool,
        seen: list[AttentionInfo | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, info = run(call, want_info)
        seen.append(info)
        kept = (out, lse) if saves_output(query, call.asked.is_exactness) else (None, None)
        ctx.save_for_backward(_MARK, query, key, value, allowed, bias, sinks, *kept)
        ctx.save_for_forward(_MARK, query, key, value, allowed, bias, sinks, None, None)
        ctx.scale, ctx.mask, ctx.softcap = call.scale, call.mask, call.softcap
        ctx.backend = call.asked.backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, query, key, value, allowed, bias, sinks, out, lse = ctx.saved_tensors
        if grads[0] is None and grads[1] is None:
            return (None,) * 9
        saved = Saved(
            query, key, value, allowed, bias, ctx.mask, ctx.scale, out, lse, ctx.softcap, sinks
        )
        d_query, d_key, d_value, d_bias, d_sinks = gradients(
            saved, ctx.backend, *grads, need_bias=ctx.needs_input_grad[4]
        )
        return d_query, d_key, d_value, None, d_bias, d_sinks, *(None,) * 3

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        t_query, t_key, t_value, _, t_bias, t_sinks = tangents[:6]
        _, query, key, value, allowed, bias, sinks = ctx.saved_tensors[:7]
        return attention_tangent(
            query, key, value, allowed, bias, ctx.mask, ctx.scale,
            t_query, t_key, t_value, t_bias, ctx.softcap, sinks, t_sinks,
        )  # fmt: skip


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    grouped: bool = True,
) -> torch.Tensor:
    """Compute the definition in plain PyTorch operations: what no backend takes.

    Parameters
    ----------
    query, key, value : Tensor, shape (..., heads, len, dim)
        With `grouped`, heads of keys and values are repeated as grouped queries need.
    mask : Tensor or None
        Boolean (True = may attend) or additive; with `causal`, a causal mask besides.
    dropout : float
        Probability of leaving out a weight.
    """
    group = query.shape[-3] // key.shape[-3]
    if grouped and group > 1:
        key, value = (x.repeat_interleave(group, dim=-3) for x in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.to(wide) @ key.to(wide).mT * factor
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        if mask.dtype != torch.bool:
            scores = scores + mask
        scores = scores.masked_fill(hidden, -torch.inf)
    total = torch.logsumexp(scores, -1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(wide).reshape(-1, 1, 1))
    weights = torch.exp(scores - torch.where(total == -torch.inf, 0, total))
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ value.to(wide)).to(query.dtype)
