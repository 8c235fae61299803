"""Hopper's 16-bit kernel on a device, against float64: every specialisation, many masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from adaattn_core.problem import SequenceSpan
from adaattn_cuda.device.launch import upload
from adaattn_cuda.device.views import view
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.kernels.task import Task, addresses
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import Tile, candidates
from adaattn_cuda.work.geometry import Geometry
from adaattn_cuda.work.records import GATHERED, MASK_NONE, WorkList, work_list

torch = pytest.importorskip("torch")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper(), reason="needs a GPU of compute capability 9.0"),
]


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


def visible(case: Case, span: SequenceSpan) -> Any:
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


def oracle(q: Any, k: Any, v: Any, seen: Any, scale: float) -> tuple[Any, ...]:
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


def relative(a: Any, b: Any) -> float:
    """Frobenius norm of a - b over that of b; NaN never passes."""
    norm = float(b.norm())
    return float((a - b).norm()) / norm if norm > 0 else float(a.norm())


def tensor(case: Case, heads: int, length: int, dim: int, dtype: Any) -> Any:
    """Random (batch, heads, len, dim) view in the case's layout."""
    shape = (
        (case.batch, heads, length, dim)
        if case.layout == "bhsd"
        else (case.batch, length, heads, dim)
    )
    x = torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)
    return x if case.layout == "bhsd" else x.transpose(1, 2)


TILES = [
    tile
    for dims in ((64, 64), (128, 128), (256, 256), (192, 192), (192, 128), (64, 256), (256, 64))
    for _, tile in candidates(*dims)
] + [Tile(128, 128, 2, 128, ping_pong=True)]


def name_of(tile: Tile) -> str:
    turns = "-turns" if tile.ping_pong else ""
    return f"{tile.dim_qk}-{tile.dim_v}-{tile.consumers}x{tile.tile_n}{turns}"


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name.replace(" ", "_"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=name_of)
def test_cases(tile: Tile, dtype: str, case: Case) -> None:
    """Within twice the error of rounding weights and output; NaN only where it is seen."""
    dim_qk = case.dim_qk if case.dim_qk > 0 else tile.dim_qk + case.dim_qk
    dim_v = case.dim_v if case.dim_v > 0 else tile.dim_v + case.dim_v
    kind = DTYPES[dtype]
    q = tensor(case, case.heads_q, case.len_q, dim_qk, kind)
    k = tensor(case, case.heads_kv, case.len_kv, dim_qk, kind)
    v = tensor(case, case.heads_kv, case.len_kv, dim_v, kind)
    dirty_k, dirty_v, dirty_rows = poisoned(case, k, v) if case.poison else (k, v, {})
    scale = 1.3 / math.sqrt(dim_qk)
    out = torch.full((*q.shape[:3], dim_v), math.nan, dtype=kind, device="cuda")
    lse = torch.full(q.shape[:3], math.nan, device="cuda")
    arrays = (view(q), view(dirty_k), view(dirty_v), view(out), view(lse), None, None)
    task = Task(
        *arrays, case.spans, case.left, case.right, case.bottom_right, scale, dtype, dtype
    )
    assert sm90.refusal(task, "sm_90a") is None
    stream = torch.cuda.current_stream().cuda_stream
    sm90.launch(task, stream, tile).start(addresses(arrays), 0, stream)
    torch.cuda.synchronize()
    for index, span in enumerate(case.spans):
        rows = slice(span.q_start, span.q_start + span.len_q)
        cols = slice(span.kv_start, span.kv_start + span.len_kv)
        expected, expected_lse, rounded = oracle(
            q[span.batch, :, rows],
            k[span.batch, :, cols],
            v[span.batch, :, cols],
            visible(case, span),
            scale,
        )
        got, got_lse = out[span.batch, :, rows].double(), lse[span.batch, :, rows].double()
        if index in dirty_rows:
            dirty = dirty_rows[index]
            assert got[:, dirty].isnan().all()
            parts = (expected, expected_lse, rounded, got, got_lse)
            expected, expected_lse, rounded, got, got_lse = (x[:, ~dirty] for x in parts)
        assert relative(got, expected) <= 2 * relative(rounded, expected) + 1e-5
        finite = expected_lse.isfinite()
        assert (got_lse[~finite] == -math.inf).all()
        if finite.any():
            assert float((got_lse - expected_lse)[finite].abs().max()) <= 1e-4


def poisoned(case: Case, k: Any, v: Any) -> tuple[Any, Any, dict[int, Any]]:
    """NaN wherever no row of a sequence may look, or only some; and those rows, by sequence."""
    dirty_k, dirty_v, dirty_rows = k.clone(), v.clone(), {}
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
    return dirty_k, dirty_v, dirty_rows


@pytest.mark.parametrize("heads", [((0, 3), (1, 0)), ((1, 1),), ()])
def test_only_the_asked_heads_are_written(heads: tuple[tuple[int, int], ...]) -> None:
    q, k, v = (torch.randn(2, n, 300, 64, device="cuda").bfloat16() for n in (4, 2, 2))
    out = torch.full_like(q, 7.0)
    lse = torch.full(q.shape[:3], 7.0, device="cuda")
    arrays = (*(view(x) for x in (q, k, v, out, lse)), None, None)
    spans = tuple(sequence(b, 0, 300, 0, 300) for b in range(2))
    task = Task(*arrays, spans, None, 0, False, 0.125, "bf16", "bf16", heads)
    stream = torch.cuda.current_stream().cuda_stream
    sm90.launch(task, stream).start(addresses(arrays), 0, stream)
    causal = torch.ones(300, 300, dtype=torch.bool, device="cuda").tril()
    for b in range(2):
        for h in range(4):
            if (b, h) not in heads:
                assert (out[b, h] == 7).all()
                assert (lse[b, h] == 7).all()
                continue
            group = slice(h // 2, h // 2 + 1)
            expected, _, rounded = oracle(
                q[b, h : h + 1], k[b, group], v[b, group], causal, 0.125
            )
            limit = 2 * relative(rounded, expected) + 1e-5
            assert relative(out[b, h].double()[None], expected) <= limit


def test_two_sources_act_as_their_concatenation() -> None:
    """Original keys, then gathered ones of tensors of their own, which no row's mask hides."""
    tile = Tile(128, 128, 2, 128, max_sources=3)
    lens = (300, 77)
    q = torch.randn(1, 2, 128, 128, device="cuda").bfloat16()
    pairs = [
        tuple(torch.randn(1, 2, n, 128, device="cuda").bfloat16() for _ in "kv") for n in lens
    ]
    geometry = Geometry((sequence(0, 0, 128, 0, lens[0]),), 2, 2, 128, 128)
    plain = work_list(geometry, tile.tile_m, tile.tile_n, 132)
    items, table = plain.items.copy(), np.repeat(plain.sources, 2)
    for field, value in (("tensor", GATHERED), ("keys", lens[1]), ("mask", MASK_NONE)):
        table[field][1::2] = value
    items["first_source"] *= 2
    items["sources"] = np.where(items["rows"] > 0, 2, 0)
    items["tiles"] += -(-lens[1] // tile.tile_n)
    stream = torch.cuda.current_stream().cuda_stream
    work = upload(WorkList(items, table), 0, stream)
    out = torch.full_like(q, math.nan)
    lse = torch.full(q.shape[:3], math.nan, device="cuda")
    arrays = (*(view(x) for x in (q, *pairs[0], out, lse)), None, None)
    further = [(matrix(pairs[1][0]), matrix(pairs[1][1]))]
    launch = sm90.Sm90Launch(tile, arrays[:5], 128**-0.5, work, stream, further=further)
    launch.start(addresses(arrays), 0, stream)
    k, v = (torch.cat([pair[i] for pair in pairs], 2)[0] for i in (0, 1))
    seen = torch.ones(128, sum(lens), dtype=torch.bool, device="cuda")
    expected, expected_lse, rounded = oracle(q[0], k, v, seen, 128**-0.5)
    assert relative(out[0].double(), expected) <= 2 * relative(rounded, expected) + 1e-5
    assert float((lse[0].double() - expected_lse).abs().max()) <= 1e-4


def matrix(x: Any) -> sm90.DeviceMatrix:
    return sm90.DeviceMatrix.of(view(x))
