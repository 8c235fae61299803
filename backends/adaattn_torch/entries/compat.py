"""Signatures of other libraries; an argument that cannot be honoured is an error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import ArgumentError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_torch.bridge import attend

Window = tuple[int, int]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    budget: ErrorBudget | float | None = None,
) -> torch.Tensor:
    """FlashAttention's function: (batch, len, heads, dim), causal masks at the bottom right.

    Parameters
    ----------
    q : Tensor, shape (batch, len_q, heads_q, dim)
    k, v : Tensor, shape (batch, len_kv, heads_kv, dim)
    softmax_scale : float, optional
        Default 1/sqrt(dim).
    window_size : (int, int)
        Keys to the left and right of the aligned position; -1 is unlimited.
    softcap : float
        Scores become ``softcap * tanh(score / softcap)``; 0 for none.
    deterministic : bool
        Always honoured: forward and backward add in a fixed order.
    budget : ErrorBudget or float, optional
        Tolerated error; None: exact.

    Raises
    ------
    UnsupportedError
        For dropout, ALiBi and returned probabilities.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes,
            return_attn_probs=return_attn_probs)  # fmt: skip
    mask = _window(causal, window_size)
    return _bshd(q, k, v, mask, softmax_scale, budget, softcap)[0]


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | Sequence[int],
    cu_seqlens_k: torch.Tensor | Sequence[int],
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    budget: ErrorBudget | float | None = None,
) -> torch.Tensor:
    """FlashAttention's function for packed sequences, (total_len, heads, dim).

    The lengths are read on the host: on a GPU that waits for them.

    Parameters
    ----------
    q : Tensor, shape (total_q, heads_q, dim)
    k, v : Tensor, shape (total_kv, heads_kv, dim)
    cu_seqlens_q, cu_seqlens_k : Tensor or sequence of int
        Exclusive prefix sums of the sequence lengths.
    max_seqlen_q, max_seqlen_k : int
        At least the longest sequence; checked.

    Raises
    ------
    UnsupportedError
        As `flash_attn_func`; and for a block table.
    ArgumentError
        If a sequence is longer than its stated maximum.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes,
            return_attn_probs=return_attn_probs, block_table=block_table)  # fmt: skip
    cu_q, cu_k = _host(cu_seqlens_q), _host(cu_seqlens_k)
    for name, cu, most in (("q", cu_q, max_seqlen_q), ("k", cu_k, max_seqlen_k)):
        longest = max((b - a for a, b in itertools.pairwise(cu)), default=0)
        if longest > most:
            raise ArgumentError(
                got=f"max_seqlen_{name}={most} for a sequence of {longest}",
                needed="at least the longest sequence",
                do=f"pass max_seqlen_{name}={longest}",
            )
    mask = Mask.ragged(cu_q, cu_k) & _window(causal, window_size)
    return _bshd(q[None], k[None], v[None], mask, softmax_scale, budget, softcap)[0][0]


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    budget: ErrorBudget | float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """SageAttention's function.

    Parameters
    ----------
    q, k, v : Tensor
        (batch, heads, len, dim) for ``tensor_layout="HND"``, (batch, len, heads, dim) for
        ``"NHD"``.
    is_causal : bool
        Upper left, as PyTorch's.
    return_lse : bool
        Return the lse as well, float32 of shape (batch, heads_q, len_q), natural log.

    Raises
    ------
    ArgumentError
        If the layout is unknown.
    """
    if tensor_layout not in ("HND", "NHD"):
        raise ArgumentError(
            got=f"tensor_layout={tensor_layout!r}",
            needed='"HND" or "NHD"',
            do="HND is (batch, heads, len, dim)",
        )
    mask = Mask.causal("top_left") if is_causal else Mask.none()
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _bshd(q, k, v, mask, sm_scale, budget)
    if tensor_layout == "HND":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _bshd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    scale: float | None,
    budget: ErrorBudget | float | None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    attended = attend(
        query, key, value, mask=mask, scale=factor, budget=budget, want_info=False,
        softcap=None if softcap == 0 else softcap,
    )  # fmt: skip
    return attended.out.transpose(1, 2), attended.lse


def _window(causal: bool, window_size: Window) -> Mask:
    left, right = (None if n is None or n < 0 else int(n) for n in window_size)
    right = 0 if causal else right
    if left is None and right is None:
        return Mask.none()
    return Mask.sliding_window(left, right, "bottom_right")


def _host(lengths: torch.Tensor | Sequence[int]) -> list[int]:
    return lengths.tolist() if isinstance(lengths, torch.Tensor) else list(lengths)


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) or value not in (None, False, 0):
            raise UnsupportedError(
                got=f"{name} in a call of another library's signature",
                needed=f"a call without {name}: nothing is ignored",
                do="leave it out, or use that library for this call",
            )
