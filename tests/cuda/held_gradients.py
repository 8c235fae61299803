"""Gradients on a device, held to float64 ones: at most twice the naive same-format error."""

from __future__ import annotations

import math
from typing import Any

import torch

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device.library import TorchLibrary

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
FLOOR = {"bf16": 2.0**-9, "f16": 2.0**-12, "f32": 4e-6}
"""Relative Frobenius error granted besides; f32 is three tf32 products."""


def visible(p: AttentionProblem) -> torch.Tensor:
    """Which key each row sees, (batch, heads_q, len_q, len_kv)."""
    shape = (p.batch, p.heads_q, p.len_q, p.len_kv)
    found = torch.zeros(shape, dtype=torch.bool)
    for s in p.sequences:
        start, stop = (torch.as_tensor(x)[:, None] for x in p.intervals(s.index))
        keys = torch.arange(s.len_kv)[None]
        seen = (keys >= start) & (keys < stop)
        found[s.batch, :, s.q_start : s.q_stop, s.kv_start : s.kv_stop] = seen
    found = found.cuda()
    if p.mask.allowed is not None:
        found = found & p.mask.allowed
    if p.mask.bias is not None:
        found = found & (p.mask.bias != -math.inf)
    return found


NAMES = ("query", "key", "value", "bias", "sinks")


def plain_gradients(
    p: AttentionProblem, grads: Any, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Autograd through the formula with tensors of `dtype`, by `NAMES`."""
    sees = visible(p)
    rows, keys = sees.any(-1, keepdim=True), sees.any(-2).unsqueeze(-1)
    keys = keys.view(p.batch, p.heads_kv, p.group_size, p.len_kv, 1).any(2)
    given = [
        torch.where(rows, p.query, 0), torch.where(keys, p.key, 0),
        torch.where(keys, p.value, 0),
    ]  # fmt: skip
    given += [p.mask.bias, p.sinks]
    named = {
        name: x.detach().to(dtype).requires_grad_()
        for name, x in zip(NAMES, given, strict=True)
        if x is not None
    }
    leaves = list(named.values())
    q, k, v = leaves[0], *(x.repeat_interleave(p.group_size, 1) for x in leaves[1:3])
    scores = (q @ k.mT) * p.scale
    if p.mask.bias is not None:
        scores = scores + named["bias"]
    scores = torch.where(sees, scores, -math.inf)
    if p.sinks is None:
        scores = torch.where(rows, scores, 0)
    else:  # finite ones: then every row has a sum
        column = named["sinks"][None, :, None, None].expand(*scores.shape[:3], 1)
        scores, rows = torch.cat([scores, column], -1), torch.ones_like(rows)
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(sees, torch.softmax(scores, -1)[..., : p.len_kv], 0)
    outs, weight = [weights @ v], [torch.where(sees.any(-1, True), grads[0], 0).to(dtype)]
    if len(grads) > 1:
        outs.append(lse)
        weight.append(torch.where(rows[..., 0], grads[1], 0).to(dtype))
    return dict(zip(named, torch.autograd.grad(outs, leaves, weight), strict=True))


def check(backend: Any, p: AttentionProblem, *, lse: bool = False, **more: Any) -> None:
    """Run it twice into poisoned memory and hold it to the rule."""
    dtype = p.query.dtype
    grads = [torch.randn((p.batch, p.heads_q, p.len_q, p.dim_v), device="cuda").to(dtype)]
    if lse:
        grads.append(torch.randn((p.batch, p.heads_q, p.len_q), device="cuda"))
    g_lse = grads[1] if lse else None
    arrays = (p.query, p.key, p.value, grads[0])
    need = p.mask.bias is not None
    given = {"mask": p.mask, "scale": p.scale, "grad_lse": g_lse, "need_bias": need, **more}
    given["sinks"] = p.sinks
    with torch.no_grad():
        found = [poisoned(lambda: backend.backward(*arrays, **given)) for _ in range(2)]
        out, row_lse = backend.forward(*arrays[:3], mask=p.mask, scale=p.scale, sinks=p.sinks)
        found.append(poisoned(lambda: backend.backward(*arrays, out=out, lse=row_lse, **given)))
    truth = plain_gradients(p, grads, torch.float64)
    usual = plain_gradients(p, grads, dtype)
    name = {v: k for k, v in DTYPES.items()}[dtype]
    for gradients in found:
        for what, exact in truth.items():
            got, naive = getattr(gradients, what), usual[what]
            assert got.shape == exact.shape
            assert torch.isfinite(got).all(), what
            # Terms that cancel have a size too: the gradient of a row's own constant is 0.
            size = max(float(exact.norm()), float(grads[0].double().norm()))
            error, known = (float((x.double() - exact).norm()) / size for x in (got, naive))
            assert error <= 2 * known + FLOOR[name], f"d_{what}: {error:.3g}, naive {known:.3g}"
    if more.get("deterministic"):
        for one, other in zip(*found[:2], strict=True):
            assert one is None or torch.equal(one, other)


def poisoned(call: Any) -> Any:
    """Call with every array that the library allocates full of NaN."""
    plain = TorchLibrary.empty

    def empty(self: Any, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return plain(self, shape, dtype, like).fill_(math.nan)

    TorchLibrary.empty = empty  # type: ignore[method-assign]
    try:
        return call()
    finally:
        TorchLibrary.empty = plain  # type: ignore[method-assign]


def problem_of(
    dtype: str,
    batch: int,
    heads: tuple[int, int],
    lens: tuple[int, int],
    dims: tuple[int, int],
    mask: Mask | None = None,
    layout: str = "bhsd",
    sinks: tuple[float, ...] | None = None,
) -> AttentionProblem:
    """Return a random problem; heads and dims are (query or key, key/value or value)."""
    shapes = (
        (batch, heads[0], lens[0], dims[0]),
        (batch, heads[1], lens[1], dims[0]),
        (batch, heads[1], lens[1], dims[1]),
    )
    arrays = [torch.randn(shape, device="cuda").to(DTYPES[dtype]) for shape in shapes]
    if layout == "bshd":
        arrays = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]
    column = None if sinks is None else torch.tensor(sinks, device="cuda")
    return AttentionProblem.from_arrays(*arrays, mask=mask, sinks=column)
