"""PyTorch's attention kernels that return a log-sum-exp, and what is known of each.

`fused` takes four-dimensional tensors and picks one; where there is none for the device, the
dtype or the mask, `is_fused` says so and attention is spelled out (`dense.spelled_out`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from adaattn_core.bounds import product_sum_error
from adaattn_core.certificates.charges import SPARE_ROUNDINGS
from adaattn_core.facts import Arithmetic

CPU_KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"
GPU_KERNEL = "aten::_scaled_dot_product_flash_attention"
HALVED = f"{CPU_KERNEL} (rows of some heads in halves)"
PLAIN = "matmul, softmax"
"""What provenance calls attention that is spelled out."""

EXP_U20 = 2.0**-18
"""Relative error of the CPU kernel's exponential: 20 ulp as PyTorch documents, rounded up."""
CPU_ARITHMETIC = Arithmetic(step_keys=512, exp_rel_upper=EXP_U20)
"""The CPU kernel goes through the keys in steps of 512 (all of them where there are fewer)."""
MERGE_ROUNDINGS = 4
"""What merging two parts by their log-sum-exps rounds, relative to the largest of them: it acts
as so many more roundings of a score."""
PLAIN_ARITHMETIC = Arithmetic()
_TRUNCATION = 2.0**-22

# PyTorch's own bindings, not `torch.ops`: a call through that takes longer.
_on_cpu = torch._scaled_dot_product_flash_attention_for_cpu
_on_gpu = torch._scaled_dot_product_flash_attention
GPU_DIMS = 8
"""The GPU kernel takes head dims that are multiples of this, up to 256."""


def kernel_for(query: torch.Tensor, dim_v: int, masked: bool) -> str:
    """Name the kernel that attends these queries.

    Parameters
    ----------
    query : Tensor
        For its device, dtype and last axis.
    dim_v : int
    masked : bool
        Whether there is more of a mask than a causal one over a square.
    """
    if query.device.type == "cpu":
        return CPU_KERNEL
    dim = query.shape[-1]
    narrow = query.dtype in (torch.float16, torch.bfloat16)
    fits = dim == dim_v and dim % GPU_DIMS == 0 and dim <= 256
    if query.device.type == "cuda" and narrow and fits and not masked:
        return GPU_KERNEL
    return PLAIN


def arithmetic_of(names: set[str], dim: int, keys: int) -> Arithmetic:
    """Return what is known of the arithmetic of heads that ran by some kernels.

    Tensor cores sum products with truncation, as the backend ``cuda`` charges them: n 2^-22 of
    the products' magnitude for n = terms / 8 and a few more; tiles are at least 32 keys, and
    exponentials base-2 approximations.

    Parameters
    ----------
    dim, keys : int
        Terms of a score, and of a row's sum of weighted values.
    """
    if names == {CPU_KERNEL}:
        return CPU_ARITHMETIC
    if names <= {CPU_KERNEL, HALVED}:  # of half the steps, hence twice as many: two merge
        score = product_sum_error(dim + SPARE_ROUNDINGS + MERGE_ROUNDINGS, "f32")
        return replace(CPU_ARITHMETIC, step_keys=256, score_rel_upper=score)
    if names <= {PLAIN}:
        return PLAIN_ARITHMETIC
    if GPU_KERNEL not in names:
        return Arithmetic(exp_rel_upper=EXP_U20)
    return Arithmetic(
        step_keys=32,
        score_rel_upper=(dim / 8 + 8) * _TRUNCATION,
        sum_rel_upper=(keys / 8 + 16) * _TRUNCATION,
        exp_rel_upper=2.0**-20,
    )


def fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by the kernel of `kernel_for`.

    Parameters
    ----------
    query : Tensor, shape (n, heads, len_q, dim_qk)
    key : Tensor, shape (n, heads, len_kv, dim_qk)
    value : Tensor, shape (n, heads, len_kv, dim_v)
        Of one dtype; the last axis contiguous; len_kv > 0.
    causal : bool
        Row i sees keys 0..i; len_q == len_kv.
    mask : Tensor, optional
        Added to the scaled scores, broadcastable.

    Returns
    -------
    out : Tensor, shape (n, heads, len_q, dim_v)
        Of some order of strides.
    lse : Tensor, shape (n, heads, len_q)
        Float32, or float64 of float64 inputs; not to be used where a row sees nothing.
    """
    if query.device.type != "cpu":
        out, lse, *_ = _on_gpu(query, key, value, 0.0, causal, False, scale=scale)
        return out, lse
    dim, dim_v = query.shape[-1], value.shape[-1]
    if dim != dim_v:  # the kernel wants them alike: zeros change neither scores nor sums
        pad = torch.nn.functional.pad
        if dim < dim_v:
            query, key = pad(query, (0, dim_v - dim)), pad(key, (0, dim_v - dim))
        else:
            value = pad(value, (0, dim - dim_v))
    out, lse = _on_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return (out if dim <= dim_v else out[..., :dim_v]), lse


def masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under an additive mask of finite numbers, on any device; see `fused`."""
    if query.device.type == "cpu":
        return fused(query, key, value, scale, mask=mask)
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(dim=-1)
    return torch.matmul((scores - lse[..., None]).exp_(), value), lse


def squares(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of squares (n, heads, len, dim), on any device; see `fused`."""
    if query.device.type == "cpu":
        return fused(query, key, value, scale, causal=True)
    rows = torch.arange(query.shape[2], device=query.device)
    hidden = torch.where(rows > rows[:, None], -torch.inf, 0.0).to(query.dtype)
    return masked(query, key, value, scale, hidden)
