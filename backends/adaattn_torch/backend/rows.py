"""Exact attention of a few rows, and how far returned rows are from it.

Exact rows are computed in float32 where the theorem's bound on their own error is small beside
the errors that they show, else in float64. Where rows see prefixes of the keys, those of all
heads go through together, sorted, a stretch of rows at a time; products over 512 keys are
added in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.bounds import row_norms_estimate
from adaattn_core.certificates.theorem import theorem_certificate
from adaattn_core.facts import Arithmetic, RowErrors, RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_torch.backend.dense import spelled_out
from adaattn_torch.backend.facts import input_facts
from adaattn_torch.backend.operands import Operands, float32_is_exact
from adaattn_torch.backend.sequences import Sequence

ORACLE_SHARE = 0.2
"""Exact rows are computed in float32 where the theorem's bound on their own error is below this
share of the errors that they show (of their 90% quantile), else in float64."""
SUM_KEYS = 512
"""Keys of one product P·V; products are added in float64."""
STRETCHES = 8
"""Stretches of sorted rows; each is computed over the keys that its last row sees."""

Chosen = Mapping[int, NDArray[np.int64]]


def row_errors(sequence: Sequence, rows: Chosen, out: torch.Tensor) -> dict[int, RowErrors]:
    """Errors of some returned rows of some heads of a sequence.

    Parameters
    ----------
    rows : mapping of int to ndarray of int64
        Rows of the sequence, by head.
    out : Tensor, shape (batch, heads_q, len_q, dim_v)
        As returned.
    """
    rows = {head: np.sort(np.asarray(chosen, np.int64)) for head, chosen in rows.items()}
    facts, found = input_facts(sequence), {}
    for head, exact in _prefix_rows(sequence, rows).items():
        errors = _compare(
            sequence, facts[head], _returned(sequence, head, rows, out), exact, "f32"
        )
        typical = float(np.quantile(errors.error, 0.9)) if len(rows[head]) else 0.0
        if errors.oracle_upper <= ORACLE_SHARE * typical:
            found[head] = errors
    for head, chosen in rows.items():
        if head not in found:
            exact = _any_rows(sequence, head, chosen)
            returned = _returned(sequence, head, rows, out)
            found[head] = _compare(sequence, facts[head], returned, exact, "f64")
    return found


def _returned(
    sequence: Sequence, head: int, rows: Chosen, out: torch.Tensor
) -> NDArray[np.float64]:
    index = torch.from_numpy(rows[head]).to(out.device)
    span = sequence.span
    picked = out[span.batch, head, span.q_start + index].double()
    return np.asarray(picked.cpu().numpy(), np.float64)


def _prefix_rows(sequence: Sequence, rows: Chosen) -> dict[int, torch.Tensor]:
    """Exact rows in float32 of sound heads, where masks are prefixes of the keys."""
    mask = sequence.mask
    heads = [h for h, chosen in rows.items() if sequence.regular[h] and len(chosen)]
    counts = {len(rows[head]) for head in heads}
    if (
        not float32_is_exact()
        or not mask.structural
        or mask.start.any()
        or sequence.dtype == "f64"
        or len(counts) != 1
    ):
        return {}
    whole, device = sequence.operands(torch.float32), sequence.query.device
    pad = (0, 0, 0, -whole.len_kv % SUM_KEYS)
    exact: dict[int, list[torch.Tensor]] = {head: [] for head in heads}
    owners: dict[int, list[int]] = {}
    for head in heads:
        owners.setdefault(head // whole.group_size, []).append(head)
    edges = np.linspace(0, counts.pop(), STRETCHES + 1).astype(int)
    for owner, members in owners.items():
        key, value = (torch.nn.functional.pad(x[owner], pad) for x in (whole.key, whole.value))
        for first, last in pairwise(edges):
            if first == last:
                continue
            picked = np.stack([rows[head][first:last] for head in members])
            index = torch.from_numpy(picked).to(device)
            at = torch.tensor(members, device=device)[:, None]
            query = (whole.query[at, index] * whole.scale).flatten(0, 1)
            stop = mask.stop[picked].ravel()
            part = _prefix_attention(query, key, value, stop)
            for head, block in zip(members, part.unflatten(0, picked.shape), strict=True):
                exact[head].append(block)
    return {head: torch.cat(parts) for head, parts in exact.items()}


def _prefix_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stop: NDArray[np.int64]
) -> torch.Tensor:
    """Attention of scaled queries (rows, dim) over keys 0..stop-1 of each row, in float64."""
    least, most = int(stop.min()), -(-int(stop.max()) // SUM_KEYS) * SUM_KEYS
    if not most:
        return value.new_zeros((len(query), value.shape[1]), dtype=torch.float64)
    scores = query @ key[:most].T
    last = torch.from_numpy(stop).to(query.device)[:, None]
    columns = torch.arange(least, most, device=query.device)
    scores[:, least:].masked_fill_(columns >= last, -torch.inf)
    top = scores.amax(dim=1, keepdim=True)
    weights = scores.sub_(torch.where(top == -torch.inf, 0.0, top)).exp_()
    parts = weights.unflatten(1, (-1, SUM_KEYS))
    sums = torch.bmm(parts.transpose(0, 1), value[:most].unflatten(0, (-1, SUM_KEYS)))
    total = parts.sum(dim=2).sum(dim=1, dtype=torch.float64)
    seen = total > 0
    return sums.sum(dim=0, dtype=torch.float64) / torch.where(seen, total, 1.0)[:, None]


def _any_rows(sequence: Sequence, head: int, chosen: NDArray[np.int64]) -> torch.Tensor:
    """Exact rows in float64, whatever the mask and the numbers."""
    mask = sequence.mask.heads([head]).rows(chosen)
    whole = sequence.operands(torch.float64)
    shared = head // whole.group_size
    index = torch.from_numpy(chosen).to(whole.query.device)
    operands = Operands(
        whole.query[head : head + 1, index], whole.key[shared : shared + 1],
        whole.value[shared : shared + 1], whole.scale,
    )  # fmt: skip
    return spelled_out(operands, mask, careful=not sequence.regular[head])[0][0]


def _compare(
    sequence: Sequence,
    facts: RunFacts,
    returned: NDArray[np.float64],
    exact: torch.Tensor,
    name: str,
) -> RowErrors:
    """Compare rows with exact ones that were computed in f32 (by prefixes) or f64."""
    keys = SUM_KEYS if name == "f32" else 0
    arithmetic = Arithmetic(step_keys=max(sequence.mask.len_kv, 1), sum_keys_max=keys)
    true = exact.double().cpu().numpy()
    oracle = theorem_certificate(
        replace(facts, output_rms=1.0, arithmetic=arithmetic),
        HeadPlan(qk=name, pv=name),
        dim_qk=sequence.query.shape[2],
        dim_v=sequence.value.shape[2],
        scale=sequence.scale,
        dtype=name,
        len_q=max(len(true), 1),
    )
    with np.errstate(over="ignore", invalid="ignore"):  # of rows that are not finite
        missed = returned - true
    return RowErrors(
        error=row_norms_estimate(missed),
        exact_norm=row_norms_estimate(true),
        oracle_upper=oracle.upper,
    )
