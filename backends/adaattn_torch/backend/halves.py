"""Causal squares that threads share evenly.

PyTorch's CPU kernel deals (head, block of rows) out in equal runs, one to a thread. Under a
causal mask later rows see more keys: where a head is cut between two threads, one gets a
quarter of its work, the other three. The rows of such heads are taken in halves: two causal
squares, each half over its own keys, and a rectangle, the second half over the keys of the
first, merged by their log-sum-exps.
"""

from __future__ import annotations

import torch

from adaattn_torch.backend import kernels

LEAST_ROWS = 4096
"""Fewer rows are not halved: merging costs what even threads save."""


def whole_part(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: str) -> int:
    """How many entries of the first axis of queries (n, heads, len, dim) are not halved.

    They are the most whose heads every thread gets as many of.
    """
    count, heads, rows = shape[:3]
    threads = torch.get_num_threads()
    # A logarithm in float32 is charged for, in float64 it would be most of the error.
    if device != "cpu" or rows < LEAST_ROWS or dtype != torch.float32:
        return count
    while count and count * heads % threads:
        count -= 1
    return count


def causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    whole: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Causal attention of squares by the kernel of `kernels.kernel_for`; see `kernels.fused`.

    Parameters
    ----------
    whole : int, optional
        Entries of the first axis that are not halved; default `whole_part`.

    Returns
    -------
    out : Tensor, shape (n, heads, len, dim_v)
    lse : Tensor, shape (n, heads, len)
    used : str
        Name of the kernel.
    """
    count, heads, rows = query.shape[:3]
    name = kernels.kernel_for(query, value.shape[3], masked=False)
    if whole is None:
        whole = whole_part(query.shape, query.dtype, query.device.type)
    if whole == count:
        return *kernels.fused(query, key, value, scale, causal=True), name
    like = (
        query
        if query.shape[3] == value.shape[3]
        else query.new_empty((count, heads, rows, value.shape[3]))
    )
    out = torch.empty_like(like)  # in the order of the query where that has as many numbers
    lse = query.new_empty((count, heads, rows))
    if whole:
        out[:whole], lse[:whole] = kernels.fused(
            query[:whole], key[:whole], value[:whole], scale, causal=True
        )
    for n in range(whole, count):
        _halves(query[n], key[n], value[n], scale, out[n], lse[n])
    return out, lse, kernels.HALVED


def _halves(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Causal attention of squares (heads, len, dim), written in place."""
    half = query.shape[1] // 2
    first, second, both = slice(0, half), slice(half, 2 * half), slice(0, 2 * half)

    def squares(x: torch.Tensor) -> torch.Tensor:
        return x[:, both].unflatten(1, (2, half)).transpose(0, 1)

    part, part_lse = kernels.fused(
        squares(query), squares(key), squares(value), scale, causal=True
    )
    squares(out).copy_(part)
    squares(lse).copy_(part_lse)
    over, over_lse = kernels.fused(
        query[None, :, second], key[None, :, first], value[None, :, first], scale
    )
    over_lse = over_lse.contiguous()
    for head in range(len(query)):  # several at once would be other vectors, and other bits
        merge(out[head, second], lse[head, second], over[0, head], over_lse[0, head])
    if 2 * half < query.shape[1]:  # the last of an odd number of rows
        last, last_lse = kernels.fused(
            query[None, :, 2 * half :], key[None], value[None], scale
        )
        out[:, 2 * half :], lse[:, 2 * half :] = last[0], last_lse[0]


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Merge attention over other keys into `out` and `lse`, whose rows have seen a key."""
    total = torch.logaddexp(lse, other_lse)
    out *= (lse - total).exp_()[..., None]
    out.addcmul_(other, (other_lse - total).exp_()[..., None])
    lse.copy_(total)
