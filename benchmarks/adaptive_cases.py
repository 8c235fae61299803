"""Hard inputs for gpu_adaptive.py: where structure does not pay, or could go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from adaattn_bench.truth import Truth, exact_rows
from adaattn_core import FixedPolicy, Mask, ScoreSkip, attention
from adaptive_peers import Heads, ours

HEADS = 8
NEEDLE_LOGIT = 30.0
"""Score of a row's own key where every row has one: far above ln(len) + the others' spread."""
NEEDLE_MARGIN = 6.0
"""Logit of a planted key above the log-sum-exp of its row: about 99.8% of the row's mass."""
RETRIEVED = 0.1
"""A needle is retrieved if its row errs by less than this share of the rms row."""
TAIL = 128
"""Last rows, which must retrieve whatever they look for."""

Draw = Callable[..., torch.Tensor]


def _normal(draw: Draw, length: int, dim: int) -> Heads:
    q, k, v = (draw(1, HEADS, length, dim) for _ in range(3))
    return Heads(q, k, v)


def _uniform(draw: Draw, length: int, dim: int) -> Heads:
    """Weights equal to a thousandth."""
    heads = _normal(draw, length, dim)
    return Heads(heads.q * 0.01, heads.k * 0.01, heads.v)


def _equal(draw: Draw, length: int, dim: int) -> Heads:
    heads = _normal(draw, length, dim)
    return Heads(torch.zeros_like(heads.q), heads.k, heads.v)


def _zero_values(draw: Draw, length: int, dim: int) -> Heads:
    heads = _normal(draw, length, dim)
    return Heads(heads.q, heads.k, torch.zeros_like(heads.v))


def _one_hot(draw: Draw, length: int, dim: int) -> Heads:
    """Every row looks for one key of its own, anywhere before it."""
    heads = _normal(draw, length, dim)
    rows = torch.arange(length, device=heads.k.device)
    place = (torch.rand(length, device=heads.k.device) * (rows + 1)).long()
    wanted = heads.k[:, :, place].float()
    factor = NEEDLE_LOGIT * math.sqrt(dim) / wanted.square().sum(-1, keepdim=True)
    return Heads((wanted * factor).to(heads.q.dtype), heads.k, heads.v)


def _rare(draw: Draw, length: int, dim: int) -> Heads:
    """One row in a thousand looks for a key of its own; the others attend to all alike."""
    heads, sharp = _uniform(draw, length, dim), _one_hot(draw, length, dim)
    rare = torch.rand(length, 1, device=heads.q.device) < 0.001
    return Heads(torch.where(rare, sharp.q, heads.q), sharp.k, heads.v)


def _huge(draw: Draw, length: int, dim: int) -> Heads:
    """One head's values a hundred million times the others', its scores four times."""
    heads = _normal(draw, length, dim)
    size = torch.full((HEADS, 1, 1), 1e-4, device=heads.v.device)
    size[0] = 1e4
    spread = torch.ones_like(size)
    spread[0] = 4.0
    dtype = heads.v.dtype
    return Heads((heads.q * spread).to(dtype), heads.k, (heads.v * size).to(dtype))


def _sink(draw: Draw, length: int, dim: int) -> Heads:
    """Every row gives most of its mass to the first key: the easiest head there is."""
    heads = _normal(draw, length, dim)
    direction = draw(1, HEADS, 1, dim)
    heads.k[:, :, :1] = direction * 4
    return Heads(heads.q + direction, heads.k, heads.v)


CASES: dict[str, tuple[Callable[[Draw, int, int], Heads], tuple[int, ...], tuple[int, ...]]] = {
    # name: maker, dims, lengths as multiples of the unit (16k)
    "N(0, 1)": (_normal, (64, 128), (1, 2, 8)),
    "uniform attention": (_uniform, (64, 128), (1, 2, 8)),
    "one key a row, anywhere": (_one_hot, (64,), (1, 2, 8)),
    "one key for a few rows": (_rare, (64,), (1, 8)),
    "all scores equal": (_equal, (64,), (1, 2)),
    "values zero": (_zero_values, (64,), (1, 2)),
    "one huge head": (_huge, (64,), (1, 2)),
    "one sink": (_sink, (64, 128), (1, 8)),
}


def problems(
    unit: int, device: str, dtype: torch.dtype
) -> Iterator[tuple[str, int, int, Callable[[], Heads]]]:
    """Yield name, dim, length and maker of every case, short ones first."""
    generator = torch.Generator(device=device).manual_seed(20)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    for multiple in (1, 2, 8):
        for name, (make, dims, multiples) in CASES.items():
            for dim in dims:
                if multiple in multiples:
                    length = unit * multiple
                    yield name, dim, length, lambda m=make, n=length, d=dim: m(draw, n, d)


# --- needles planted into real heads ----------------------------------------------------------
def plant(heads: Heads, last: bool, generator: torch.Generator) -> tuple[Heads, list[Any]]:
    """Plant one key for each key/value head; return the problem and (head, row, depth)s."""
    q, length, dim = heads.q, heads.length, heads.q.shape[3]
    k, v = heads.k.clone(), heads.v.clone()
    group = heads.count // k.shape[1]
    scale = 1.0 / math.sqrt(dim)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    planted = []
    for shared in range(k.shape[1]):
        head = shared * group + number(0, group)
        row = number(length - TAIL, length) if last else number(length // 4, length)
        depth = number(length // 64, row - length // 32)
        query = q[0, head, row].double()
        scores = k[0, shared, : row + 1].double() @ query * scale
        wanted = torch.logsumexp(scores, 0) + NEEDLE_MARGIN
        k[0, shared, depth] = (query * (wanted / (scale * query.square().sum()))).to(k.dtype)
        v[0, shared, depth] = (torch.randn(dim, generator=generator) * 3).to(v)
        planted.append((head, row, depth))
    return Heads(q, k, v), planted


def found(heads: Heads, planted: list[Any], out: torch.Tensor) -> int:
    """How many planted keys an output retrieved."""
    exact = exact_rows(heads.given, np.array([row for _, row, _ in planted]))
    right = 0
    for number, (head, row, _) in enumerate(planted):
        rms = out[0, head].double().square().sum(-1).mean().sqrt()
        off = np.linalg.norm(out[0, head, row].double().cpu().numpy() - exact[0, head, number])
        right += bool(off < RETRIEVED * float(rms))
    return right


def skipped(heads: Heads) -> Any:
    """Score-then-skip for every head, at a weight of a thousandth."""
    backend = "cuda" if heads.q.is_cuda else "numpy"
    name = "bf16" if heads.q.is_cuda else "f32"
    policy = FixedPolicy(ScoreSkip(lam=1e-3), qk=name, pv=name)
    arrays = (heads.q, heads.k, heads.v)
    return attention(*arrays, mask=Mask.causal(), policy=policy, backend=backend)


def needles(
    layers: list[Heads], rel: float, rows: int, seed: int, backend: str = "auto"
) -> dict[str, Any]:
    """Plant needles into every layer, and see who finds them."""
    generator = torch.Generator().manual_seed(seed)
    report: dict[str, Any] = {"len": layers[0].length, "rel": rel, "errors": []}
    ways = {
        "budget, last tile": (True, lambda heads: ours(heads, rel, backend=backend)()),
        "score-then-skip, anywhere": (False, skipped),
    }
    for name, (last, compute) in ways.items():
        count = right = false_certificates = 0
        for layer in layers:
            heads, planted = plant(layer, last, generator)
            try:
                result = compute(heads)
                right += found(heads, planted, result.out)
                count += len(planted)
                if last:
                    true = Truth.draw(heads.given, rows, seed=seed).errors(result.out)["rows"]
                    upper = result.certificate.upper[0]
                    false_certificates += sum(
                        int(t > u) for t, u in zip(true, upper, strict=True)
                    )
            except Exception as error:  # noted, and the other layers still count
                report["errors"].append(f"{name}: {type(error).__name__}: {error}"[:300])
        report[name] = {"planted": count, "found": right}
        if last:
            report[name]["false_certificates"] = false_certificates
    return report
