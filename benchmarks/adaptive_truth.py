"""The truth for gpu_adaptive.py: exact rows in float64, and errors against them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adaptive_peers import Heads

CELLS_MAX = 1 << 27
"""Scores held at once (float64: 1 GiB)."""


@dataclass
class Truth:
    """Exact attention of some rows, all heads.

    Attributes
    ----------
    rows : tensor of int64, shape (rows,)
        Drawn without replacement, independently of any certificate's; all rows where there are
        no more than four times as many as were asked for.
    out : tensor of float64, shape (heads_q, rows, dim)
    """

    rows: torch.Tensor
    out: torch.Tensor


def exact_rows(heads: Heads, rows: torch.Tensor) -> torch.Tensor:
    """Causal attention of single rows in float64, shape (heads_q, len(rows), dim)."""
    length, dim = heads.length, heads.q.shape[3]
    group = heads.count // heads.k.shape[1]
    places = torch.arange(length, device=rows.device)
    step = max(1, CELLS_MAX // length)
    out = torch.empty(
        heads.count, len(rows), heads.v.shape[3], dtype=torch.float64, device=rows.device
    )
    for head in range(heads.count):
        key, value = (x[0, head // group].double() for x in (heads.k, heads.v))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            scores = heads.q[0, head, some].double() @ key.T
            scores.mul_(1.0 / math.sqrt(dim))
            scores.masked_fill_(places[None, :] > some[:, None], -math.inf)
            scores.sub_(scores.amax(-1, keepdim=True)).exp_()
            total = scores.sum(-1, keepdim=True)
            out[head, start : start + step] = scores @ value / total
    return out


def draw(heads: Heads, count: int, generator: torch.Generator) -> Truth:
    """Compute the truth of `count` rows."""
    length = heads.length
    if length <= 4 * count:
        rows = torch.arange(length)
    else:
        rows = torch.randperm(length, generator=generator)[:count].sort().values
    rows = rows.to(heads.q.device)
    return Truth(rows=rows, out=exact_rows(heads, rows))


def joined(truths: list[Truth]) -> Truth:
    """Heads of several problems side by side; all must speak of the same rows."""
    assert all(torch.equal(t.rows, truths[0].rows) for t in truths)
    return Truth(rows=truths[0].rows, out=torch.cat([t.out for t in truths]))


def errors(out: torch.Tensor, truth: Truth, share: float = 0.95) -> dict[str, list[float]]:
    """Errors of each head of an output, shape (1, heads_q, len, dim).

    Returns
    -------
    dict
        ``rows``: least e such that a share `share` of the rows errs by at most e times the
        root-mean-square row of the head's whole output; ``worst``: the same for every row;
        ``frobenius``: of the drawn rows, relative to their exact values.
    """
    wide = out[0].double()
    rms = wide.square().sum(-1).mean(-1).sqrt()
    off = (wide[:, truth.rows] - truth.out).square().sum(-1).sqrt()
    off = off.nan_to_num(nan=math.inf, posinf=math.inf).sort(dim=-1).values
    rank = max(1, math.ceil(share * off.shape[1] * (1 - 1e-12)))
    exact = truth.out.square().sum((-1, -2)).sqrt()
    return {
        "rows": _ratio(off[:, rank - 1], rms),
        "worst": _ratio(off[:, -1], rms),
        "frobenius": _ratio(off.square().sum(-1).sqrt(), exact),
    }


def _ratio(value: torch.Tensor, unit: torch.Tensor) -> list[float]:
    """Return quotients, with 0/0 = 0 and a non-finite unit = inf."""
    quotient = torch.where(value == 0, torch.zeros_like(value), value / unit)
    return [float(x) for x in quotient.nan_to_num(nan=math.inf, posinf=math.inf)]
