"""Shapes and masks that ``sm90_attn_fwd_f16`` must get right, and the fp64 oracle for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sm90_direct import DTYPES, Kernel, Launch

from adaattn_core.problem import SequenceSpan
from adaattn_cuda.kernels.sm90_attn_fwd_f16 import LaunchPlan, plan_launch
from adaattn_cuda.work.geometry import Geometry
from adaattn_cuda.work.records import GATHERED, MASK_NONE, WorkList


def sequence(batch: int, q_start: int, len_q: int, kv_start: int, len_kv: int) -> SequenceSpan:
    """One sequence by its first rows and lengths."""
    return SequenceSpan(batch, batch, q_start, q_start + len_q, kv_start, kv_start + len_kv)


@dataclass(frozen=True)
class Case:
    """One problem: spans in (batch, heads, len, dim) arrays and a mask."""

    name: str
    spans: tuple[SequenceSpan, ...]
    batch: int
    len_q: int
    len_kv: int
    heads_q: int = 4
    heads_kv: int = 2
    dim_qk: int = 0  # 0: the tile's
    dim_v: int = 0
    bottom_right: bool = False
    left: int | None = None
    right: int | None = None
    layout: str = "bhsd"
    poison: bool = False


def cases() -> Iterator[Case]:
    """Shapes and masks that every specialisation must get right."""
    two = (sequence(0, 0, 384, 0, 512), sequence(1, 0, 384, 0, 512))
    yield Case("full", two, 2, 384, 512)
    yield Case("full bshd", two, 2, 384, 512, layout="bshd")
    yield Case("causal top-left", two, 2, 384, 512, right=0)
    yield Case("causal bottom-right", two, 2, 384, 512, right=0, bottom_right=True)
    yield Case(
        "causal, more queries than keys",
        (sequence(0, 0, 700, 0, 300),),
        1,
        700,
        300,
        right=0,
        bottom_right=True,
    )
    yield Case("window", two, 2, 384, 512, left=100, right=30, bottom_right=True)
    yield Case(
        "odd lengths", (sequence(0, 0, 333, 0, 777),), 1, 333, 777, right=0, bottom_right=True
    )
    yield Case("one query, one key", (sequence(0, 0, 1, 0, 1),), 1, 1, 1)
    yield Case(
        "key lengths",
        (sequence(0, 0, 200, 0, 0), sequence(1, 0, 200, 0, 1), sequence(2, 0, 200, 0, 450)),
        3,
        200,
        512,
        poison=True,
    )
    ragged = (
        sequence(0, 0, 5, 0, 70),
        sequence(0, 5, 300, 70, 300),
        sequence(0, 305, 0, 370, 10),
        sequence(0, 305, 257, 380, 512),
    )
    yield Case("ragged", ragged, 1, 562, 892, poison=True)
    yield Case("ragged causal", ragged, 1, 562, 892, right=0, bottom_right=True, poison=True)
    yield Case("dims less 8", two, 2, 384, 512, dim_qk=-8, dim_v=-24, right=0)
    yield Case(
        "causal, poisoned future",
        (sequence(0, 0, 600, 0, 600),),
        1,
        600,
        600,
        right=0,
        poison=True,
    )
    yield Case(
        "long", (sequence(0, 0, 2048, 0, 2048),), 1, 2048, 2048, heads_q=2, heads_kv=1, right=0
    )


def visible(case: Case, span: SequenceSpan) -> torch.Tensor:
    """Boolean mask of one span, (len_q, len_kv), written from the definition."""
    row = torch.arange(span.len_q, device="cuda")[:, None]
    column = torch.arange(span.len_kv, device="cuda")[None]
    aligned = row + (span.len_kv - span.len_q if case.bottom_right else 0)
    seen = torch.ones(span.len_q, span.len_kv, dtype=torch.bool, device="cuda")
    if case.left is not None:
        seen &= column >= aligned - case.left
    if case.right is not None:
        seen &= column <= aligned + case.right
    return seen


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    """Return out and lse in f64, and out with probabilities and result rounded to 16 bits."""
    if 0 in (q.shape[1], k.shape[1]):
        nothing = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64, device="cuda")
        return (
            nothing,
            torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device="cuda"),
            nothing,
        )
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = (q.double() @ k.double().mT) * scale
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    inverse = torch.where(total > 0, 1 / total, 0.0)
    out = (p @ v.double()) * inverse
    rounded = ((p.to(q.dtype).double() @ v.double()) * inverse).to(q.dtype).double()
    return out, lse, rounded


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of a - b over that of b; NaN never passes."""
    norm = float(b.norm())
    return float((a - b).norm()) / norm if norm > 0 else float(a.norm())


def tensor(case: Case, heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Random (batch, heads, len, dim) view in the case's layout."""
    shape = (
        (case.batch, heads, length, dim)
        if case.layout == "bhsd"
        else (case.batch, length, heads, dim)
    )
    x = torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)
    return x if case.layout == "bhsd" else x.transpose(1, 2)


def check(kernel: Kernel, dtype: str, case: Case, blocks: int) -> dict[str, Any]:
    """Errors of one case."""
    tile = kernel.tile
    dim_qk = case.dim_qk if case.dim_qk > 0 else tile.dim_qk + case.dim_qk
    dim_v = case.dim_v if case.dim_v > 0 else tile.dim_v + case.dim_v
    kind = DTYPES[dtype]
    q = tensor(case, case.heads_q, case.len_q, dim_qk, kind)
    k = tensor(case, case.heads_kv, case.len_kv, dim_qk, kind)
    v = tensor(case, case.heads_kv, case.len_kv, dim_v, kind)
    scale = 1.3 / math.sqrt(dim_qk)
    geometry = Geometry(
        case.spans,
        case.heads_q,
        case.heads_kv,
        dim_qk,
        dim_v,
        case.bottom_right,
        case.left,
        case.right,
    )
    dirty_k, dirty_v, dirty_rows = k.clone(), v.clone(), {}
    if case.poison:  # NaN wherever no row, or only some rows, of a sequence may look
        used = torch.zeros(case.batch, case.len_kv, dtype=torch.bool, device="cuda")
        for index, span in enumerate(case.spans):
            used[span.batch, span.kv_start : span.kv_start + span.len_kv] = True
            if case.right is not None and span.len_kv > 40:
                at = span.len_kv - 20
                dirty_v[span.batch, :, span.kv_start + at] = math.inf
                dirty_k[span.batch, :, span.kv_start + at] = math.nan
                dirty_rows[index] = visible(case, span)[:, at]
        for x in (dirty_k, dirty_v):
            x.masked_fill_(~used[:, None, :, None], math.nan)
    launch = Launch.prepare(
        kernel, plan_launch(geometry, dtype, blocks, tile), q, [dirty_k], [dirty_v], scale
    )
    launch()
    torch.cuda.synchronize()
    worst = {"out": 0.0, "limit": 0.0, "lse": 0.0}
    passed = True
    for index, span in enumerate(case.spans):
        rows = slice(span.q_start, span.q_start + span.len_q)
        cols = slice(span.kv_start, span.kv_start + span.len_kv)
        out, lse, rounded = oracle(
            q[span.batch, :, rows],
            k[span.batch, :, cols],
            v[span.batch, :, cols],
            visible(case, span),
            scale,
        )
        got = launch.out[span.batch, :, rows].double()
        got_lse = launch.lse[span.batch, :, rows].double()
        if index in dirty_rows:
            dirty = dirty_rows[index]
            passed &= bool(got[:, dirty].isnan().all())
            clean = ~dirty
            out, lse, rounded, got, got_lse = (
                out[:, clean],
                lse[:, clean],
                rounded[:, clean],
                got[:, clean],
                got_lse[:, clean],
            )
        error, limit = relative(got, out), 2 * relative(rounded, out) + 1e-5
        finite = lse.isfinite()
        lse_error = float((got_lse - lse)[finite].abs().max()) if finite.any() else 0.0
        passed &= (
            error <= limit and lse_error <= 1e-4 and bool((got_lse[~finite] == -math.inf).all())
        )
        worst = {
            "out": max(worst["out"], error),
            "limit": max(worst["limit"], limit),
            "lse": max(worst["lse"], lse_error),
        }
    return {"passed": passed, **worst}


def check_sources(kernel: Kernel, dtype: str) -> dict[str, Any]:
    """Check several sources with biases.

    Two runs of keys of two tensors, the second unmasked, must act as their concatenation.
    """
    tile, kind = kernel.tile, DTYPES[dtype]
    lens, parts = (300, 77), []
    q = torch.randn(1, 2, 128, tile.dim_qk, device="cuda").to(kind)
    for n in lens:
        parts.append(
            tuple(
                torch.randn(1, 2, n, d, device="cuda").to(kind)
                for d in (tile.dim_qk, tile.dim_v)
            )
        )
    bias = torch.randn(sum(lens), device="cuda")
    scale = 1 / math.sqrt(tile.dim_qk)
    plan = plan_launch(
        Geometry((sequence(0, 0, 128, 0, lens[0]),), 2, 2, tile.dim_qk, tile.dim_v),
        dtype,
        132,
        tile,
    )
    items = plan.work.items.copy()
    table = np.repeat(plan.work.sources, 2)  # two sources an item, side by side
    table["first_bias"][0::2] = 0
    second = table[1::2]
    second["tensor"], second["keys"] = GATHERED, lens[1]
    second["mask"], second["first_bias"] = MASK_NONE, lens[0]
    table[1::2] = second
    items["first_source"] *= 2
    items["sources"] = np.where(items["rows"] > 0, 2, 0)
    items["tiles"] += -(-lens[1] // tile.tile_n)
    plan = LaunchPlan(tile, dtype, WorkList(items, table))
    launch = Launch.prepare(
        kernel, plan, q, [p[0] for p in parts], [p[1] for p in parts], scale, bias
    )
    launch()
    torch.cuda.synchronize()
    k, v = (torch.cat([p[i] for p in parts], 2) for i in (0, 1))
    scores = (q.double() @ k.double().mT) * scale + bias.double()
    out = torch.softmax(scores, -1) @ v.double()
    error = relative(launch.out.double(), out)
    return {
        "passed": error < 0.008,
        "out": error,
        "limit": 0.008,
        "lse": float((launch.lse.double() - scores.logsumexp(-1)).abs().max()),
    }
