"""Arguments of PyTorch's function: a call of four-dimensional tensors, or why not."""

from __future__ import annotations

import math

import torch
from torch.compiler import is_compiling
from torch.nn.attention.bias import CausalBias, CausalVariant

from adaattn_core.errors import ArgumentError, ShapeError
from adaattn_core.mask import Mask
from adaattn_torch.arrays import lowered
from adaattn_torch.call import Asked, Call
from adaattn_torch.masks.compact import CompactMask
from adaattn_torch.watchers import TRANSFORM, is_transformed, transforms

DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
_NOTHING, _CAUSAL = Mask.none(), Mask.causal("top_left")

NOT_TENSORS = "arguments that are not tensors"


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    asked: Asked,
) -> Call | str:
    """Check and bring to four dimensions; or say why PyTorch must take the call.

    What PyTorch would refuse is left to PyTorch, so that its own error is raised. Parameters
    are those of PyTorch's function; `asked` is what is asked besides.
    """
    if attn_mask is None and dropout_p == 0.0 and _needs_nothing(query, key, value, enable_gqa):
        factor = 1.0 / math.sqrt(query.shape[3]) if scale is None else _number(scale)
        if 0 < factor < math.inf:
            mask = _CAUSAL if is_causal else _NOTHING
            return Call(query, key, value, None, None, mask, factor, asked)
    reason = _reason(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is not None:
        return reason
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else _number(scale)
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
    mask = _CAUSAL if is_causal else _NOTHING
    allowed = bias = None
    pattern = _pattern(attn_mask, query, len_kv)
    if pattern is not None:
        mask = pattern
    elif isinstance(attn_mask, CausalBias):
        if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (len_q, len_kv):
            return "a CausalBias made for other lengths"
        upper = attn_mask.variant == CausalVariant.UPPER_LEFT
        mask = Mask.causal("top_left" if upper else "bottom_right")
    elif attn_mask is not None:
        if isinstance(attn_mask, CompactMask):
            attn_mask = attn_mask.dense()
        if attn_mask.dtype not in (torch.bool, query.dtype):
            return f"a mask of {attn_mask.dtype} for tensors of {query.dtype}"
        array = _mask_axes(attn_mask, lead, len_q, len_kv)
        if array is None:
            return f"a mask of shape {tuple(attn_mask.shape)}"
        allowed, bias = (array, None) if array.dtype == torch.bool else (None, array)
    shape = None if len(lead) == 2 else (*lead, len_q, value.shape[-1])
    return Call(query, key, value, allowed, bias, mask, factor, asked, shape)


def _number(scale: float) -> float:
    """Return a scale as a float; text, which PyTorch refuses, as NaN."""
    return math.nan if isinstance(scale, str) else float(scale)


def _needs_nothing(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> bool:
    """Whether four-dimensional tensors fit as they are: the usual case, told quickly.

    Every line here is in the host time of every call.
    """
    if not type(query) is type(key) is type(value) is torch.Tensor:
        return False
    if is_compiling() or transforms() is not None:
        return False
    if query.is_nested or key.is_nested or value.is_nested:
        return False
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    if not len(of_query) == len(of_key) == len(of_value) == 4:
        return False
    batch, heads, len_q, dim = of_query
    batch_key, groups, len_kv, dim_key = of_key
    batch_value, groups_value, len_value, dim_v = of_value
    if not (batch and heads and groups and len_q and len_kv and dim and dim_v):
        return False
    if not (batch == batch_key == batch_value and dim == dim_key and len_kv == len_value):
        return False
    if groups != groups_value or (heads != groups and (not enable_gqa or heads % groups)):
        return False
    dtype = query.dtype
    if not (dtype is key.dtype is value.dtype and dtype in DTYPES):
        return False
    if not query.layout is key.layout is value.layout is torch.strided:
        return False
    if query.is_cuda:
        device = query.get_device()
        if not (key.is_cuda and value.is_cuda):
            return False
        same = device == key.get_device() == value.get_device()
        return same and not torch.is_autocast_enabled("cuda")
    all_here = query.is_cpu and key.is_cpu and value.is_cpu
    return all_here and not torch.is_autocast_enabled("cpu")


def _pattern(attn_mask: torch.Tensor | None, query: torch.Tensor, len_kv: int) -> Mask | None:
    """Pattern of a compact mask that was made for just these four-dimensional tensors."""
    if not isinstance(attn_mask, CompactMask):
        return None
    made_for = (query.shape[0], 1, query.shape[2], len_kv)
    return attn_mask.pattern if attn_mask.shape == made_for else None


def foreign(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
) -> str | None:
    """Say why PyTorch must take these tensors, whatever is asked of them."""
    for x in (query, key, value):
        if x.is_nested or x.layout is not torch.strided:
            return "nested or sparse tensors"
    for given in (query, key, value, attn_mask):
        if type(given) is not torch.Tensor and type(given).__name__ == "DTensor":
            return "distributed tensors (DTensor)"
    return TRANSFORM if is_transformed(query, key, value, attn_mask) else None


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
    for x in (query, key, value):
        if not isinstance(x, torch.Tensor):
            return NOT_TENSORS
    if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):
        return NOT_TENSORS
    if dropout_p != 0.0:
        return "dropout"
    if is_causal and attn_mask is not None:
        raise ArgumentError(  # some of PyTorch's kernels ignore one of the two
            got="attn_mask together with is_causal=True",
            needed="one of the two",
            do="merge the causal mask into attn_mask",
        )
    tensors = (query, key, value)
    reason = foreign(*tensors, attn_mask)
    if reason is not None:
        return reason
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
    if attn_mask is not None and not isinstance(attn_mask, CausalBias):
        attn_mask = lowered(attn_mask, dtype)
    query, key, value = (lowered(x, dtype) for x in (query, key, value))
    return query, key, value, attn_mask


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
    if not 2 <= mask.dim() <= len(full):
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
