"""Backward: by a backend that differentiates on the GPU, else in chunks of plain operations.

Fused kernels compute plain numbers, so where the gradient itself is to have a gradient
(``create_graph=True``), or comes in batches (``is_grads_batched``), it is computed in chunks.
So it is on a CPU, and for what a backend refuses by `UnsupportedError`. Every way computes the
gradient of exact attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from adaattn_core.backend import Backend, Differentiates
from adaattn_core.errors import UnsupportedError
from adaattn_core.mask import Mask
from adaattn_torch.arrays import to_backend
from adaattn_torch.forward import backend_for
from adaattn_torch.gradient import Gradients, attention_gradient
from adaattn_torch.watchers import is_transformed

__all__ = ["Saved", "gradients", "saves_output"]


class Saved(NamedTuple):
    """What a forward pass keeps for its backward pass.

    Attributes
    ----------
    query, key, value, allowed, bias : Tensor
        See `adaattn_torch.call.Call`.
    mask : Mask
        The structural part.
    scale : float
    out, lse : Tensor or None
        Exact attention's; None where the forward pass approximated, or where nothing would
        read them.
    softcap, sinks
        Score rules (`adaattn_core.scores`).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    allowed: torch.Tensor | None
    bias: torch.Tensor | None
    mask: Mask
    scale: float
    out: torch.Tensor | None
    lse: torch.Tensor | None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def saves_output(query: torch.Tensor, is_exact: bool) -> bool:
    """Whether the output and its lse are worth keeping: exact, and read by a fused kernel."""
    return is_exact and query.device.type == "cuda"


def gradients(
    saved: Saved,
    backend: Backend | str,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    *,
    need_bias: bool = False,
) -> Gradients:
    """Gradients of exact attention, whatever the forward pass approximated.

    Parameters
    ----------
    saved : Saved
    backend : Backend or str
        The one that was asked for; another kind of device than CUDA, or a backend that does not
        differentiate, means chunks.
    grad_out : Tensor or None, shape (batch, heads_q, len_q, dim_v)
    grad_lse : Tensor or None, shape (batch, heads_q, len_q)
    need_bias : bool

    Returns
    -------
    tuple of Tensor
        Of query, key, value, of the additive mask (None unless asked for), and of the sinks.
    """
    query, key, value, allowed, bias, mask, scale, _, _, softcap, sinks = saved
    if query.device.type == "cuda" and not torch.is_grad_enabled() and not is_transformed(
        query, key, value, allowed, bias, sinks,
        *(g for g in (grad_out, grad_lse) if g is not None),
    ):  # fmt: skip
        found = backend_for(backend, query.device.type)
        if isinstance(found, Differentiates):
            try:
                return _fused(found, saved, grad_out, grad_lse, need_bias)
            except UnsupportedError:
                pass  # the chunks take everything
    return attention_gradient(
        query, key, value, allowed, bias, mask, scale, grad_out, grad_lse, need_bias=need_bias,
        softcap=softcap, sinks=sinks,
    )  # fmt: skip


def _fused(
    backend: Differentiates,
    saved: Saved,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    need_bias: bool,
) -> Gradients:
    query, key, value, allowed, bias, mask, scale, out, lse, softcap, sinks = saved
    if sinks is not None:
        sinks = sinks.detach().float().contiguous()
    if allowed is not None:
        mask = mask & Mask.boolean(to_backend(allowed))
    if bias is not None:
        mask = mask & Mask.additive(to_backend(bias))
    if grad_out is None:
        grad_out = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    elif 0 in grad_out.stride():  # of a sum, say: one number, read again and again
        grad_out = grad_out.contiguous()
    found = backend.backward(
        to_backend(query),
        to_backend(key),
        to_backend(value),
        to_backend(grad_out),
        out=None if out is None else to_backend(out),
        lse=None if lse is None else to_backend(lse),
        grad_lse=None if grad_lse is None else to_backend(grad_lse.float().contiguous()),
        mask=mask,
        scale=scale,
        need_bias=need_bias,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        softcap=softcap,
        sinks=None if sinks is None else to_backend(sinks),
    )
    d_bias = found.bias.to(bias.dtype) if need_bias and bias is not None else None
    d_sinks = None if saved.sinks is None else found.sinks.to(saved.sinks.dtype)
    return found.query, found.key, found.value, d_bias, d_sinks
