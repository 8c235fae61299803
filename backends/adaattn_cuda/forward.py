"""The shortest way to a kernel: exact dense attention without a plan and without a certificate.

Checks, kernel choice and launch plan belong to the layout of the arrays, so they are made once
per layout and found again by it. What a call then costs the host is two allocations and a
launch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

from adaattn_core.errors import UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.arrays import view
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.launch import Launch
from adaattn_cuda.library import library_of

__all__ = ["attention_forward"]

_LAYOUTS_REMEMBERED = 256


class _Prepared(NamedTuple):
    """All that a call needs besides addresses."""

    launch: Launch
    out_shape: tuple[int, ...]
    dtype: str
    device: int


_prepared: OrderedDict[Hashable, _Prepared] = OrderedDict()
_lock = threading.Lock()


def attention_forward(
    query: Any, key: Any, value: Any, *, mask: Mask | None = None, scale: float | None = None
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
        Structural: causal, window, key lengths, ragged. Default: every key is visible.
    scale : float, optional
        Default 1/sqrt(dim_qk).

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
    UnsupportedError
        For array masks, and for what `CudaBackend.run` does not take.
    """
    structure = None if mask is None else _structure(mask)
    library = library_of(query)
    known_by: Hashable = None
    prepared = None
    if type(query) is type(key) is type(value):  # else: checked below, and refused if foreign
        pointers = (library.pointer(query), library.pointer(key), library.pointer(value))
        known_by = (
            library.layout(query),
            library.layout(key),
            library.layout(value),
            (pointers[0] | pointers[1] | pointers[2]) & 15,
            structure,
            scale,
        )
        with _lock:
            prepared = _prepared.get(known_by)
            if prepared is not None:
                _prepared.move_to_end(known_by)
    if prepared is None:
        return _first(query, key, value, mask, scale, known_by)
    shape = prepared.out_shape
    out = library.empty(shape, prepared.dtype, query)
    lse = library.empty(shape[:3], "f32", query)
    prepared.launch.start(
        (*pointers, library.pointer(out), library.pointer(lse), 0, 0),
        prepared.device,
        library.stream(prepared.device),
    )
    return out, lse


def _structure(mask: Mask) -> Hashable:
    if not mask.is_structural:
        raise UnsupportedError(
            got=f"a {mask.describe()} mask",
            needed="a structural mask: causal, window, key lengths, ragged",
            do='use attention(..., backend="cuda"), which takes array masks',
        )
    return (
        mask.left, mask.right, mask.alignment,
        mask.lengths, mask.cu_seqlens_q, mask.cu_seqlens_kv,
    )  # fmt: skip


def _first(
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | None,
    scale: float | None,
    known_by: Hashable,
) -> tuple[Any, Any]:
    """Check everything, run it through the backend, and keep the launch."""
    problem = AttentionProblem.from_arrays(query, key, value, mask=mask, scale=scale)
    backend = CudaBackend()
    plan = Plan.uniform(problem, HeadPlan(qk=problem.dtype, pv=problem.dtype))
    raw = backend.run(problem, plan)
    (launch,) = backend.last_launches()
    shape = tuple(int(n) for n in raw.out.shape)
    prepared = _Prepared(launch, shape, problem.dtype, view(query).device)
    if known_by is not None:
        with _lock:
            _prepared[known_by] = prepared
            while len(_prepared) > _LAYOUTS_REMEMBERED:
                _prepared.popitem(last=False)
    return raw.out, raw.lse
