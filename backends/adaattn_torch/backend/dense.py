"""Exact attention of the heads of one sequence: by a fused kernel, or spelled out.

The fused kernels see finite numbers whose scores cannot overflow. Anything else (NaN, Inf,
scores that might leave the range, a kernel that is missing) is spelled out in chunks of rows:
hidden scores are replaced, not added to, so that what a row does not see never reaches it.
"""

from __future__ import annotations

import math

import torch

from adaattn_torch.backend import halves, kernels
from adaattn_torch.backend.masking import SequenceMask
from adaattn_torch.backend.operands import Operands
from adaattn_torch.backend.tensors import row_contiguous

CHUNK_ROWS = 1024
"""Rows whose masks are written out at once for a fused kernel."""
PLAIN_SCORES = 1 << 24
"""Scores that are spelled out at once."""


def attend(
    operands: Operands,
    mask: SequenceMask,
    kernel: str | None = None,
    whole: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
    """Attention of regular heads: finite inputs whose scores cannot overflow.

    Parameters
    ----------
    operands : Operands
    mask : SequenceMask
    kernel : str, optional
        `kernels.PLAIN` spells it out.
    whole : int, optional
        Key/value heads whose query heads are not taken in halves (`halves.causal`).

    Returns
    -------
    out : Tensor, shape (heads, len_q, dim_v)
    lse : Tensor, shape (heads, len_q)
        Without what `mask` took off the rows; -inf where a row sees nothing.
    used : set of str
        Names of the kernels.
    """
    heads, len_q = operands.query.shape[:2]
    dim_v = operands.value.shape[2]
    if not (heads and len_q and operands.len_kv and mask.visible):
        out = operands.query.new_zeros((heads, len_q, dim_v))
        return out, _nothing(out), set()
    if mask.causal_square or (mask.structural and mask.visible == len_q * operands.len_kv):
        name = kernel or kernels.kernel_for(operands.query, dim_v, masked=False)
        if name != kernels.PLAIN:
            given = grouped(operands.query, operands.key, operands.value)
            if mask.causal_square and len_q > 1:
                out, lse, name = halves.causal(*given, operands.scale, whole)
            else:
                out, lse = kernels.fused(*given, operands.scale)
            return out.flatten(0, 1), lse.flatten(0, 1), {name}
    name = kernel or kernels.kernel_for(operands.query, dim_v, masked=True)
    if name == kernels.PLAIN:
        out, lse = spelled_out(operands, mask)
    else:
        out, lse = _by_rows(operands, mask)
    return out, lse, {name}


def grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring (heads, len, dim) to (heads_kv, group, len, dim) without copying keys."""
    shared, size = len(key), len(query) // len(key)
    query = row_contiguous(query).unflatten(0, (shared, size))
    key, value = (
        row_contiguous(x)[:, None].expand(shared, size, *x.shape[1:]) for x in (key, value)
    )
    return query, key, value


def _nothing(out: torch.Tensor) -> torch.Tensor:
    """Log-sum-exps of rows that see nothing."""
    return torch.full(out.shape[:2], -math.inf, dtype=_wide(out.dtype), device=out.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _by_rows(operands: Operands, mask: SequenceMask) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by a fused kernel, a chunk of rows at a time, its mask written out."""
    rows_of = operands.query
    if mask.bias is not None and bool(mask.known.absorbed.any()):
        rows_of = torch.where(mask.known.absorbed[..., None], 0, rows_of)
    query, key, value = grouped(rows_of, operands.key, operands.value)
    shared, size, len_q = query.shape[:3]
    heads = shared * size
    out = query.new_zeros((heads, len_q, value.shape[-1]))
    lse = _nothing(out)
    step = max(min(CHUNK_ROWS, PLAIN_SCORES // operands.len_kv), 1)
    for first in range(0, len_q, step):
        rows = slice(first, min(first + step, len_q))
        seen = mask.stop[rows] > mask.start[rows]
        if not seen.any():
            continue
        low, high = int(mask.start[rows][seen].min()), int(mask.stop[rows][seen].max())
        added = mask.addend(rows, low, high, _wide(query.dtype))
        if added is not None:
            added = added.unflatten(0, (shared, size)) if len(added) > 1 else added[None]
        part, part_lse = kernels.fused(
            query[:, :, rows], key[:, :, low:high], value[:, :, low:high], operands.scale,
            mask=added,
        )  # fmt: skip
        if added is None:
            blind = torch.from_numpy(~seen).to(out.device).expand(heads, len(seen))
        else:
            blind = (added == -math.inf).all(dim=-1).flatten(0, 1).expand(heads, len(seen))
        out[:, rows] = part.flatten(0, 1).masked_fill(blind[..., None], 0)
        lse[:, rows] = part_lse.flatten(0, 1).masked_fill(blind, -math.inf)
    return out, lse


def spelled_out(
    operands: Operands, mask: SequenceMask, *, careful: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in matrix products and a softmax, whatever numbers there are.

    Products and sums are those of the operands' dtype, 16-bit ones taken as float32.

    Parameters
    ----------
    careful : bool
        Whether NaN, Inf and overflow may occur: they then reach exactly the rows that see them.
    """
    dtype = _wide(operands.query.dtype)
    stored, wide = operands.query.dtype, operands.to(dtype)
    shared, size = len(wide.key), wide.group_size
    heads, len_q = wide.query.shape[:2]
    out = wide.query.new_zeros((heads, len_q, wide.value.shape[2]))
    lse = _nothing(out)
    bad = good = None
    value = wide.value
    if careful:
        good = torch.isfinite(wide.key).all(dim=2)
        bad = torch.nonzero(~torch.isfinite(value).all(dim=2).all(dim=0)).flatten()
        if len(bad):
            value = value.clone()
            value[:, bad] = 0
    step = max(PLAIN_SCORES // max(heads * operands.len_kv, 1), 1)
    for first in range(0, len_q, step):
        rows = slice(first, min(first + step, len_q))
        seen = mask.stop[rows] > mask.start[rows]
        if not seen.any():
            continue
        low, high = int(mask.start[rows][seen].min()), int(mask.stop[rows][seen].max())
        query = wide.query[:, rows].unflatten(0, (shared, size))
        query = query.flatten(1, 2) * operands.scale
        scores = torch.matmul(query, wide.key[:, low:high].transpose(1, 2))
        scores = scores.view(heads, -1, high - low)
        overflown = None
        if careful and good is not None:
            sound = torch.isfinite(wide.query[:, rows]).all(dim=2)
            known = good[:, low:high].repeat_interleave(size, dim=0)
            overflown = torch.isinf(scores) & known[:, None] & sound[..., None]
        added = mask.addend(rows, low, high, dtype)
        if mask.bias is not None:
            absorbed = mask.known.absorbed[:, rows, None]
            scores = torch.where(absorbed, scores * 0, scores)
        if added is not None:
            scores = scores + added
        if overflown is not None:
            scores = torch.where(overflown, math.nan, scores)
        if added is not None:
            scores = torch.where(added == -math.inf, -math.inf, scores)
        top = scores.amax(dim=2)
        alive = (
            torch.from_numpy(seen).to(out.device).expand(heads, len(seen))
            if added is None
            else (added != -math.inf).any(dim=2).expand(heads, len(seen))
        )
        shift = torch.where(top == -math.inf, 0.0, top)
        weights = torch.exp(scores - shift[..., None])
        total = weights.sum(dim=2)
        sums = torch.matmul(weights.view(shared, -1, high - low), value[:, low:high]).view(
            heads, -1, value.shape[2]
        )
        if bad is not None and len(bad):
            sums = _with_bad_values(sums, weights, added, mask, rows, low, high, bad, wide)
        part = sums / total[..., None]
        part_lse = torch.log(total) + shift
        if careful:  # scores that Inf makes -inf are seen, all the same
            lost = alive & ~torch.isfinite(part_lse)
            part = part.masked_fill(lost[..., None], math.nan)
            part_lse = part_lse.masked_fill(lost, math.nan)
        out[:, rows] = part.masked_fill(~alive[..., None], 0)
        lse[:, rows] = part_lse.masked_fill(~alive, -math.inf)
    return out.to(stored) if stored != dtype else out, lse


def _with_bad_values(
    sums: torch.Tensor,
    weights: torch.Tensor,
    added: torch.Tensor | None,
    mask: SequenceMask,
    rows: slice,
    low: int,
    high: int,
    bad: torch.Tensor,
    wide: Operands,
) -> torch.Tensor:
    """Add values that hold NaN or Inf to the rows that see their keys, and to no others."""
    for key in bad.tolist():
        if not low <= key < high:
            continue
        value = wide.value[:, key].repeat_interleave(wide.group_size, dim=0)[:, None]
        term = weights[:, :, key - low, None] * value
        if added is not None:
            sees = (added[:, :, key - low] != -math.inf)[..., None]
            term = torch.where(sees, term, torch.zeros_like(term))
        sums = sums + term
    return sums
