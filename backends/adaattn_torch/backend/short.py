"""The shortest way to a kernel: exact attention without a plan and without a certificate.

Reductions of queries, keys and output tell whether the numbers are sound; whatever is
not, and every mask that one call of a kernel does not take, goes the way of `TorchBackend.run`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from adaattn_core.arrays import in_library_of
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_torch.backend import halves, kernels
from adaattn_torch.backend.operands import SCALE_RANGE, SCORE_RANGE, float32_is_exact
from adaattn_torch.backend.tensors import DTYPES

if TYPE_CHECKING:
    from adaattn_torch.backend.backend import TorchBackend

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LIMIT = SCORE_RANGE[torch.float32]


def forward(
    backend: TorchBackend,
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | None,
    scale: float | None,
) -> tuple[Any, Any]:
    """See `adaattn_core.backend.Forwards.forward`."""
    if type(query) is type(key) is type(value) is torch.Tensor:
        found = _one_call(query, key, value, mask, scale)
        if found is not None:
            return found
    problem = AttentionProblem.from_arrays(query, key, value, mask=mask, scale=scale)
    plan = Plan.uniform(problem, HeadPlan(qk=problem.dtype, pv=problem.dtype))
    raw = backend.run(problem, plan)
    out = in_library_of(query, raw.out)
    return out, in_library_of(query, raw.lse, keep_dtype=False)


def _one_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Attention by one call of a kernel; None where that does not do."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        return None
    batch, heads, len_q, dim = query.shape
    batch_key, shared, len_kv, dim_key = key.shape
    batch_value, shared_value, len_value, dim_v = value.shape
    dtype, on_cpu = query.dtype, query.is_cpu
    causal = False
    if mask is not None and mask is not _NOTHING:
        if mask.lengths is not None or mask.cu_seqlens_q is not None or mask.left is not None:
            return None
        if mask.allowed is not None or mask.bias is not None:
            return None
        causal = mask.right == 0
        if mask.right is not None and not causal:
            return None
        last = len_q == 1 and mask.alignment == "bottom_right"
        if causal and len_q != len_kv and not last:
            return None
        causal = causal and len_q > 1  # one row sees every key
    if not (
        dtype in _NAMES
        and batch and heads and len_q and len_kv and dim and dim_v and shared
        and dtype is key.dtype is value.dtype
        and batch == batch_key == batch_value
        and shared == shared_value
        and len_kv == len_value
        and dim == dim_key
        and not heads % shared
        and (
            (on_cpu and key.is_cpu and value.is_cpu)
            or query.device == key.device == value.device
        )
        and not (query.requires_grad or key.requires_grad or value.requires_grad)
    ):  # fmt: skip
        return None
    strides = query.stride()
    if not (strides[3] == key.stride(3) == value.stride(3) == 1):
        return None
    if scale is None:
        scale = 1.0 / math.sqrt(dim)
    if not SCALE_RANGE[0] < scale < SCALE_RANGE[1]:
        return None
    narrow = dtype is torch.bfloat16 or dtype is torch.float16
    widened = narrow and on_cpu  # see `Sequence.working`
    if (dtype is torch.float32 or widened) and not float32_is_exact():
        return None
    if widened:
        query, key, value = query.float(), key.float(), value.float()
    if kernels.kernel_for(query, dim_v, masked=False) == kernels.PLAIN:
        return None
    size = heads // shared
    if (
        causal
        and halves.whole_part((shared, size, len_q), query.dtype, query.device.type) < shared
    ):
        if batch > 1:  # heads are halved by sequence
            return None
        if size == 1:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = query, key, value
    if size > 1 and batch == 1:  # as `dense.grouped`
        q = query.view(shared, size, len_q, dim)
        k, v = (x.transpose(0, 1).expand(-1, size, -1, -1) for x in (key, value))
    elif size > 1:
        if not (_folds(query) and _folds(key) and _folds(value)):
            return None
        q = query.reshape(batch * shared, size, len_q, dim)
        k = key.reshape(batch * shared, 1, len_kv, dim).expand(-1, size, -1, -1)
        v = value.reshape(batch * shared, 1, len_kv, dim_v).expand(-1, size, -1, -1)
    elif heads > 1 and strides[1] > strides[2] and all(map(_folds, (query, key, value))):
        q, k, v = (x.flatten(0, 1)[:, None] for x in (query, key, value))  # as the output comes
    if causal:
        out, lse, _ = halves.causal(q, k, v, scale)
    else:
        out, lse = kernels.fused(q, k, v, scale)
    found = (*_edges(query), *_edges(key), out.sum())
    # Elsewhere than on a CPU reading waits for the device: once.
    numbers = [x.item() for x in found] if on_cpu else torch.stack(found).tolist()
    of_query, of_key = max(-numbers[0], numbers[1]), max(-numbers[2], numbers[3])
    reach = of_query * max(scale, 1.0) * dim
    # NaN compares false. What values hold, and sums that overflow, show in the output, and
    # that in its sum.
    if not (
        reach < _LIMIT
        and reach * of_key < _LIMIT
        and of_key < _LIMIT
        and math.isfinite(numbers[4])
    ):
        return None
    shape = (batch, heads, len_q)
    if out.shape[:3] != shape:
        lse = lse.reshape(shape)
        if len_q == 1:
            out = out.reshape(*shape, dim_v)
        elif batch == 1 and strides[2] > strides[1]:  # rows outermost, as the query's
            out = out.permute(2, 0, 1, 3).reshape(1, len_q, heads, dim_v).transpose(1, 2)
        else:
            out = out.reshape(*shape, dim_v)
    if widened:
        out = out.to(dtype)
    return out, lse if lse.dtype == torch.float32 else lse.float()


_NOTHING = Mask.none()


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest number; rows outermost where they are so in memory."""
    turned = x.shape[2] > 1 and x.stride(1) < x.stride(2)
    low, high = torch.aminmax(x.transpose(1, 2) if turned else x)
    return low, high


def _folds(x: torch.Tensor) -> bool:
    """Whether batch and heads are one axis in memory."""
    return x.stride(0) == x.shape[1] * x.stride(1)
