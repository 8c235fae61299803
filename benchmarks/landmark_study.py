"""What a budget lets landmarks leave out: rows that certify, margins, tiles filled up.

    python benchmarks/capture_qkv.py TEXT.txt --tokens 8192 --layers 1,9,17,25 --out qkv/
    python benchmarks/landmark_study.py qkv/*.npz

The device's planner in PyTorch, in float32 and tile by tile: sampled rows, mass codes,
landmarks, pools and their biases. Two tiles of a head are judged; sixteen others stand for the
head. For each way of certifying it prints the share of the scores that is computed in the
mean: what is kept, 1 for a head without a level, and what is computed again where the
certificate would miss the budget (30 draws a head).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.bounds import order_statistic

TAUS = (0.3, 0.15, 0.07, 0.03, 0.012, 0.005, 0.002, 8e-4)
TILE, POOL, BAND = 128, 64, 256
DRAWS, OPERANDS = 30, 0.0018
"""Certificates drawn a head; what 16-bit operands add to every row's error."""


@dataclass(frozen=True)
class Judged:
    """Errors of rows, norms of exact rows, landmarks over far keys, of the tiles of a head."""

    errors: NDArray[Any]  # (tiles, levels, rows)
    norms: NDArray[Any]  # (tiles, rows)
    shares: NDArray[Any]  # (tiles, levels)


def far_of(row: torch.Tensor) -> torch.Tensor:
    """Far keys of the tiles that rows are in."""
    return (row // TILE * TILE - BAND).clamp_min(0) // POOL * POOL


def mass_of(code: torch.Tensor) -> torch.Tensor:
    """Middle of a code's interval, as far_field.cuh has it."""
    return torch.exp2((code + 0.5) / 8 - 26)


def threshold(code: torch.Tensor, allowed: float, fill: bool) -> int:
    """Code from which a key is a landmark, as far_select.cuh finds it."""
    counts = torch.bincount(code.long(), minlength=256).double()
    below = torch.cumsum(counts * mass_of(torch.arange(256.0)).double(), 0)
    above = torch.cat([counts.flip(0).cumsum(0).flip(0), torch.zeros(1)])
    found = int((below <= allowed).sum())
    if fill:
        room = max(-(-int(above[found]) // TILE), 1) * TILE
        found = int((above <= room).nonzero()[0])
    return found


def tile_errors(
    head: tuple[torch.Tensor, ...], scale: float, tile: int, probe: Any, fill: bool
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Errors of one tile's rows at every level."""
    q, k, v = head
    rows = torch.arange(tile * TILE, (tile + 1) * TILE)
    stop, first = (tile + 1) * TILE, int(far_of(rows[:1]))
    scores = (q[rows] @ k[:stop].T * scale).masked_fill(
        torch.arange(stop) > rows[:, None], -torch.inf
    )
    exact = torch.softmax(scores, -1) @ v[:stop]
    if first == 0:
        return torch.zeros(len(TAUS), TILE), exact.norm(dim=1), [1.0] * len(TAUS)
    samples, lse, mass = probe
    far = len(mass)
    code = ((torch.log2(mass.clamp_min(1e-30)) + 26) * 8).floor().clamp(0, 255)
    mass = mass_of(code)
    errors, shares = [], []
    for tau in TAUS:
        landmark = code >= threshold(code, tau * len(samples), fill)
        left = torch.where(landmark, 0.0, mass).view(-1, POOL)
        count, total = (~landmark).view(-1, POOL).sum(1), left.sum(1)
        even = 0.1 * total / count.clamp_min(1)
        weight = (left + even[:, None]) / (1.1 * total).clamp_min(1e-30)[:, None]
        weight = weight * ~landmark.view(-1, POOL)
        pool_k, pool_v = (
            torch.einsum("bp,bpd->bd", weight, x[:far].view(-1, POOL, x.shape[1]))
            for x in (k, v)
        )
        sees = torch.arange(far // POOL) < far_of(samples)[:, None] // POOL
        predicted = (q[samples] @ pool_k.T * scale - lse[:, None]).clamp_max(28).exp()
        predicted = (predicted * sees).sum(0).clamp_min(1e-38)
        keys = count.clamp_min(1).log()
        bias = total.clamp_min(1e-30).log() - predicted.log()
        bias = torch.maximum(torch.minimum(bias, keys + 4), keys - 4)
        bias = torch.where(count > 0, bias, -torch.inf)
        pools, chosen = first // POOL, landmark[:first].nonzero()[:, 0]
        parts = [q[rows] @ pool_k[:pools].T * scale + bias[:pools], scores[:, chosen]]
        values = torch.cat([pool_v[:pools], v[chosen], v[first:stop]])
        found = torch.softmax(torch.cat([*parts, scores[:, first:]], 1), -1) @ values
        errors.append((found - exact).norm(dim=1))
        shares.append(float(landmark.float().mean()))
    return torch.stack(errors), exact.norm(dim=1), shares


def probe_of(
    head: tuple[torch.Tensor, ...], scale: float, group: int, sizes: tuple[int, int]
) -> Any:
    """Return sampled rows of a group, their log-sum-exp, and the mass of its far keys."""
    q, k, _ = head
    rows, samples = sizes
    stop = min((group + 1) * rows, len(k))
    edges = (stop - group * rows) * torch.arange(samples + 1) // samples
    step = (torch.rand(samples) * (edges[1:] - edges[:-1])).long()
    sampled = group * rows + edges[:-1] + step
    scores = (q[sampled] @ k[:stop].T * scale).masked_fill(
        torch.arange(stop) > sampled[:, None], -torch.inf
    )
    lse = torch.logsumexp(scores, -1)
    far = int(far_of(torch.tensor(stop - 1)))
    weights = (scores[:, :far] - lse[:, None]).exp()
    weights = weights * (torch.arange(far) < far_of(sampled)[:, None])
    return sampled, lse, weights.sum(0)


def judge(
    head: tuple[torch.Tensor, ...], scale: float, sizes: tuple[int, int], fill: bool
) -> Judged:
    """Errors of the two judged tiles, then of sixteen others."""
    count = len(head[1]) // TILE
    others = sorted(torch.randperm(count)[:16].tolist())
    per_group = sizes[0] // TILE
    middle = int(0.55 * (count // per_group)) * per_group + per_group // 2
    probes: dict[int, Any] = {}
    found = []
    for tile in (count - 1, middle, *others):
        group = tile // per_group
        if group not in probes:
            probes[group] = probe_of(head, scale, group, sizes)
        found.append(tile_errors(head, scale, tile, probes[group], fill))
    errors, norms, shares = zip(*found, strict=True)
    return Judged(torch.stack(errors).numpy(), torch.stack(norms).numpy(), np.array(shares))


def outcome(
    head: Judged, rel: float, margin: float, drawn: int, confidence: float, most: float
) -> tuple[float, float, float]:
    """Share computed, whether no level was found, and how often the certificate fails."""
    order = order_statistic(drawn, 0.95, confidence)
    assert order is not None
    rng = np.random.default_rng(0)
    judged, others = head.errors[:2], head.errors[2:]
    rows = judged.transpose(1, 0, 2).reshape(len(TAUS), -1)
    spare = round(rows.shape[1] * (drawn - order) / drawn)
    error = np.sort(rows, 1)[:, -1 - spare] / np.sqrt((head.norms[:2] ** 2).mean())
    able = (error <= margin * rel) & (head.shares[:2] <= most).all(0)
    if not able.any():
        return 1.0, 1.0, 0.0
    level = int(np.flatnonzero(able)[0])
    own = others[:, level].reshape(-1) / np.sqrt((head.norms[2:] ** 2).mean())
    own = np.hypot(own, OPERANDS)
    upper = [np.sort(rng.choice(own, drawn))[order - 1] for _ in range(DRAWS)]
    failed = float(np.mean(np.array(upper) > rel))
    kept = head.shares[2:, level].mean() + 1.5 / POOL
    return min(kept, 1.0) + failed, 0.0, failed


def main() -> None:
    """Judge every other head of the files, and compare ways of certifying."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--group", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(3)
    heads: dict[bool, list[Judged]] = {False: [], True: []}
    for path in options.files:
        stored = np.load(path)
        q, k, v = (
            torch.from_numpy(stored[n].view(np.int16).copy()).view(torch.bfloat16).float()
            for n in "qkv"
        )
        for h in range(0, len(q), 2):
            kv = h // (len(q) // len(k))
            for fill, found in heads.items():
                sizes = (options.group, options.samples)
                one = (q[h], k[kv], v[kv])
                found.append(judge(one, float(stored["scale"]), sizes, fill))
    print("| budget | rows | confidence | margin | most | filled | computed | dense | failed |")
    print("|---|---|---|---|---|---|---|---|---|")
    ways = [(128, 0.975, 0.6, 0.3, False), (512, 0.975, 0.6, 0.3, False)]
    ways += [(512, 0.955, m, s, True) for s in (0.3, 0.5) for m in (0.6, 0.75, 0.9)]
    ways += [(256, 0.955, 0.75, 0.5, True), (1024, 0.955, 0.75, 0.5, True)]
    for rel in (0.1, 0.2):
        for drawn, confidence, margin, most, fill in ways:
            table = [outcome(h, rel, margin, drawn, confidence, most) for h in heads[fill]]
            share, dense, failed = np.mean(table, axis=0)
            way = f"| {rel} | {drawn} | {confidence} | {margin} | {most} | {fill} "
            print(f"{way}| {share:.3f} | {dense:.2f} | {failed:.3f} |")


if __name__ == "__main__":
    main()
