"""The shortest way to a kernel: exact dense attention without a plan and without a certificate.

Checks, kernel choice and launch plan belong to the layout of the arrays, so they are made once
per layout and found again by it. What a call then costs the host is two allocations and a
launch.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device.launch import Launch
from adaattn_cuda.device.library import Library, adopt, library_of
from adaattn_cuda.device.views import view
from adaattn_cuda.dispatch import input_views, make_launch, mask_key, mask_views, sink_view
from adaattn_cuda.kernels.task import addresses
from adaattn_cuda.recent import Recent

__all__ = ["attention_forward"]


class _Prepared(NamedTuple):
    """All that a call needs besides addresses."""

    launch: Launch
    out_shape: tuple[int, ...]
    dtype: str
    device: int


_prepared: Recent[_Prepared] = Recent(256)


def attention_forward(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
) -> tuple[Any, Any]:
    """Compute exact attention on the caller's stream.

    Parameters
    ----------
    query : array, shape (batch, heads_q, len_q, dim_qk)
    key : array, shape (batch, heads_kv, len_kv, dim_qk)
    value : array, shape (batch, heads_kv, len_kv, dim_v)
        On one CUDA device, of one library and one dtype out of f32, f16 and bf16; the last axis
        contiguous.
    mask : Mask, optional
        Default: every key is visible. Its arrays, if any, are on the same device.
    scale : float, optional
        Default 1/sqrt(dim_qk).
    softcap : float, optional
    sinks : array of float32, optional, shape (heads_q,)
        As `CudaBackend.forward` takes them.

    Returns
    -------
    out : array, shape (batch, heads_q, len_q, dim_v)
        In the library and dtype of `query`.
    lse : array of float32, shape (batch, heads_q, len_q)
        Natural log of the sum of exponentials; -inf where a row sees nothing.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        As `AttentionProblem.from_arrays` does.
    UnsupportedError, KernelCompileError, AdaAttnError
        As `CudaBackend.run` does; `CudaBackend.forward` lists the cases.
    """
    library = library_of(query)
    if not (type(query) is type(key) is type(value)):
        # Most likely refused.
        return _first(library, query, key, value, mask, scale, softcap, sinks, None)
    pointers, layout = library.inputs(query, key, value)
    aligned = (pointers[0] | pointers[1] | pointers[2]) & 15
    known_by: Hashable = (layout, aligned, scale)
    masks: tuple[int, ...] = (0, 0)
    if mask is not None:
        known_by, masks = _with_mask(known_by, library, mask, type(query))
    if softcap is not None or sinks is not None:
        known_by, masks = _with_rules(known_by, masks, library, softcap, sinks, type(query))
    prepared = _prepared.get(known_by)
    if prepared is None:
        return _first(library, query, key, value, mask, scale, softcap, sinks, known_by)
    launch, out_shape, dtype, device = prepared
    out, lse, written = library.outputs(out_shape, dtype, query)
    launch.start((*pointers, *written, *masks), device, library.stream(device))
    return out, lse


def _with_mask(
    known_by: Hashable, library: Library, mask: Mask, kind: type
) -> tuple[Hashable, tuple[int, int]]:
    """Add the mask to a key, all but the addresses of its arrays, which are returned beside.

    The key is None where a mask's array is of another library: such a call is not remembered.
    """
    structure = mask_key(mask)
    if mask.allowed is None and mask.bias is None:
        return (known_by, structure), (0, 0)
    layouts: list[Hashable] = []
    pointers: list[int] = []
    for array in (mask.allowed, mask.bias):
        if array is not None and type(array) is not kind:
            return None, (0, 0)
        layouts.append(None if array is None else library.layout(array))
        pointers.append(0 if array is None else library.pointer(array))
    known_by = (known_by, structure, *layouts, pointers[1] & 3)  # misaligned ones are refused
    return known_by, (pointers[0], pointers[1])


def _with_rules(
    known_by: Hashable,
    masks: tuple[int, ...],
    library: Library,
    softcap: float | None,
    sinks: Any,
    kind: type,
) -> tuple[Hashable, tuple[int, ...]]:
    """Add softcap and sinks to a key, all but the sinks' address, which follows the masks'."""
    if sinks is None:
        return (known_by, softcap), masks
    if type(sinks) is not kind or known_by is None:
        return None, masks
    pointer = library.pointer(sinks)
    return (known_by, softcap, library.layout(sinks), pointer & 3), (*masks, pointer)


def _first(
    library: Library,
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | None,
    scale: float | None,
    softcap: float | None,
    sinks: Any,
    known_by: Hashable,
) -> tuple[Any, Any]:
    """Check everything, choose and load the kernel, start it, and remember the launch."""
    if not hasattr(query, "ndim"):  # a bare view of memory has no dimensions to check
        query, key, value = map(adopt, (query, key, value))
        return attention_forward(
            query, key, value, mask=mask, scale=scale, softcap=softcap, sinks=sinks
        )
    problem = AttentionProblem.from_arrays(
        query, key, value, mask=mask, scale=scale, softcap=softcap, sinks=sinks
    )
    inputs = input_views(problem)
    device, rows = inputs[0].device, inputs[0].shape[:3]
    masks = mask_views(problem.mask, (*rows, problem.len_kv), device)
    out, lse, _ = library.outputs((*rows, problem.dim_v), problem.dtype, query)
    arrays = (*inputs, view(out), view(lse), *masks)
    stream = library.stream(device)
    seen_sinks = sink_view(problem)
    formats = (problem.dtype, problem.dtype)
    launch = make_launch(problem, arrays, formats, None, stream, seen_sinks)
    launch.start(addresses(arrays, seen_sinks), device, stream)
    if known_by is not None:
        _prepared.put(
            known_by, _Prepared(launch, (*rows, problem.dim_v), problem.dtype, device)
        )
    return out, lse
