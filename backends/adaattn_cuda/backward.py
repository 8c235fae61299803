"""Gradients of exact attention: checks, outputs and the launches of a backward pass.

As in the forward's short way, everything but the addresses belongs to the layout of the arrays:
it is made once per layout and found again by it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

from adaattn_core.backend import Gradients
from adaattn_core.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import BackwardLaunch
from adaattn_cuda.device.library import library_of
from adaattn_cuda.device.views import ArrayView, broadcast, view
from adaattn_cuda.dispatch import (
    input_views,
    make_backward,
    mask_key,
    mask_views,
    sink_view,
)
from adaattn_cuda.forward import attention_forward
from adaattn_cuda.kernels.backward_task import BackwardTask
from adaattn_cuda.recent import Recent

__all__ = ["attention_backward"]


class _Prepared(NamedTuple):
    """A backward pass made ready for one layout."""

    launch: BackwardLaunch
    zeroed: bool  # rows or keys that belong to no sequence are not written by any block


_prepared: Recent[_Prepared] = Recent(256)


def attention_backward(
    query: Any,
    key: Any,
    value: Any,
    grad_out: Any,
    *,
    out: Any = None,
    lse: Any = None,
    grad_lse: Any = None,
    mask: Mask | None = None,
    scale: float | None = None,
    need_bias: bool = False,
    deterministic: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
) -> Gradients:
    """Start a backward pass on the caller's stream; see `Differentiates.backward`.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        As `AttentionProblem.from_arrays` does, and if a gradient does not fit its array.
    UnsupportedError, KernelCompileError, AdaAttnError
        As `attention_forward` does, and for what no backward kernel takes.
    """
    problem = AttentionProblem.from_arrays(
        query, key, value, mask=mask, scale=scale, softcap=softcap, sinks=sinks
    )
    if problem.paged is not None:
        raise UnsupportedError(
            got="keys and values as pages",
            needed="arrays: a cache has no gradient",
            do="pass the keys and values themselves, or paged.gather()",
        )
    if (out is None) != (lse is None):
        raise ArgumentError(
            got="an output without its lse, or the other way round",
            needed="both of exact attention, or neither",
            do="pass what forward returned, or leave both out to have them computed again",
        )
    inputs = input_views(problem)
    given = (grad_out, out, lse, grad_lse)
    # Autograd calls from threads of its own, which may not have entered the device yet.
    with driver.OnDevice(inputs[0].device):
        return _start(problem, inputs, given, need_bias, deterministic)


def _start(
    problem: AttentionProblem,
    inputs: tuple[ArrayView, ArrayView, ArrayView],
    given: tuple[Any, Any, Any, Any],
    need_bias: bool,
    deterministic: bool,
) -> Gradients:
    """Start a checked problem's backward pass; `given` are grad_out, out, lse and grad_lse."""
    query, (grad_out, out, lse, grad_lse) = problem.query, given
    library, device = library_of(query), inputs[0].device
    rows = (problem.batch, problem.heads_q, problem.len_q)
    if out is None:
        out, lse = attention_forward(
            query, problem.key, problem.value, mask=problem.mask, scale=problem.scale,
            softcap=problem.softcap, sinks=problem.sinks,
        )  # fmt: skip
    views = (*inputs, view(out), view(lse), view(grad_out))
    g_lse = None if grad_lse is None else view(grad_lse)
    sinks = sink_view(problem)
    d_sinks = None if sinks is None else library.empty((problem.heads_q,), "f32", query)
    _check_given(views, g_lse, (*rows, problem.dim_v))
    shape = (*rows, problem.len_kv)
    allowed, bias = mask_views(problem.mask, shape, device)
    d_bias, d_bias_view = None, None
    if need_bias and bias is not None:
        d_bias = library.empty(tuple(problem.mask.bias.shape), "f32", query)
        d_bias_view = broadcast(view(d_bias), shape)
    gradients = tuple(library.empty(tuple(x.shape), problem.dtype, query) for x in inputs)
    stream = library.stream(device)

    known_by: Hashable = (
        tuple(None if x is None else x[1:] for x in (*views, allowed, bias, d_bias_view)),
        tuple(x.pointer & 15 for x in views),
        (mask_key(problem.mask), problem.scale, deterministic, problem.softcap, sinks is None),
    )
    prepared = _prepared.get(known_by)
    if prepared is None:
        masks = (allowed, bias, d_bias_view)
        task = BackwardTask.of(problem, views, masks, deterministic, sinks)
        prepared = _Prepared(make_backward(task, problem, stream), not task.is_uniform)
        _prepared.put(known_by, prepared)

    zeroed = [view(x) for x in gradients] if prepared.zeroed else []
    for x in (*zeroed, *((view(d_bias),) if d_bias is not None else ())):
        driver.zero_bytes(x.pointer, math.prod(x.shape) * x.item_bytes, stream)
    workspace = library.empty((prepared.launch.workspace_bytes // 4,), "f32", query)
    pointers = (
        *(x.pointer for x in views),
        g_lse.pointer if g_lse else 0,
        *(library.pointer(x) for x in gradients),
        *(x.pointer if x else 0 for x in (allowed, bias, d_bias_view)),
        library.pointer(workspace),
        sinks.pointer if sinks else 0,
        library.pointer(d_sinks) if d_sinks is not None else 0,
    )
    prepared.launch.start(pointers, device, stream)
    d_query, d_key, d_value = gradients
    return Gradients(d_query, d_key, d_value, d_bias, d_sinks)


def _check_given(
    views: tuple[ArrayView, ...], grad_lse: ArrayView | None, shape: tuple[int, ...]
) -> None:
    """Check the output, its lse and both gradients against the problem's shape."""
    query, out, lse, grad_out = views[0], *views[3:6]
    named = [("out", out, shape), ("lse", lse, shape[:3]), ("grad_out", grad_out, shape)]
    if grad_lse is not None:
        named.append(("grad_lse", grad_lse, shape[:3]))
    for name, array, wanted in named:
        if array.shape != wanted or array.device != query.device:
            raise ShapeError(
                got=f"{name} of shape {array.shape} on device {array.device}",
                needed=f"shape {wanted} on device {query.device}",
                do="pass the arrays of the call whose gradient is wanted",
            )
        dtype = query.dtype if len(wanted) == 4 else "f32"
        if array.dtype != dtype:
            raise DTypeError(
                got=f"{name} of {array.dtype}",
                needed=dtype,
                do="cast it: nothing is converted silently",
            )
        is_lse = len(wanted) == 3
        if min(wanted) > 0 and not _is_laid_out(array, rows_too=is_lse):
            raise UnsupportedError(
                got=f"{name} with strides {array.strides}",
                needed="a contiguous array" if is_lse else "stride 1 along its last axis",
                do="copy it once to contiguous memory (torch: x.contiguous())",
                strides=array.strides,
            )


def _is_laid_out(array: ArrayView, *, rows_too: bool) -> bool:
    """Whether the last axis, or with `rows_too` the whole array, is contiguous."""
    step = 1
    for n, stride in zip(reversed(array.shape), reversed(array.strides), strict=True):
        if n > 1 and stride != step:
            return False
        if not rows_too:
            return True
        step *= n
    return True
