"""Exact attention of a few rows, and how far returned rows are from it.

Exact rows are computed in float32 where the theorem's bound on their own error is small beside
the errors that they show, else in float64. Where rows see prefixes of the keys, those of all
heads go through together, sorted, a stretch of rows at a time; products over 512 keys are
added in float64. Exponents are taken relative to the log-sum-exp that was returned, which the
product of queries and keys takes off in one more component, as the values' product sums the
weights in another: a wrong one costs nothing but range, and what leaves it is taken again in
float64.
"""

from __future__ import annotations

import math
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

OWN_SHARE = 0.2
"""Exact rows are computed in float32 where the theorem's bound on their own error is below this
share of the errors that they show (of their 90% quantile), or below what the caller says."""
SUM_KEYS = 512
"""Keys of one product P·V; products are added in float64."""
STRETCHES = 6
"""Stretches of sorted rows; each is computed over the keys that its last row sees."""
CHUNK_KEYS = 8 * SUM_KEYS
"""Keys whose weights are held at once: few enough for caches."""

_SMALLEST = 1e-30
"""Of a norm that something is divided by."""

Chosen = Mapping[int, NDArray[np.int64]]


def row_errors(
    sequence: Sequence,
    rows: Chosen,
    out: torch.Tensor,
    lse: torch.Tensor,
    little: Mapping[int, float],
) -> dict[int, RowErrors]:
    """Errors of some returned rows of some heads of a sequence.

    Parameters
    ----------
    rows : mapping of int to ndarray of int64
        Rows of the sequence, by head.
    out : Tensor, shape (batch, heads_q, len_q, dim_v)
        As returned.
    lse : Tensor, shape (batch, heads_q, len_q)
        As returned.
    little : mapping of int to float
        Errors of exact rows of each head that do not matter.
    """
    rows = {head: np.sort(np.asarray(chosen, np.int64)) for head, chosen in rows.items()}
    facts, found = input_facts(sequence), {}
    for head, (exact, shifted) in _prefix_rows(sequence, rows, facts, lse).items():
        returned = _returned(sequence, head, rows, out)
        errors = _compare(sequence, shifted, returned, exact, "f32")
        with np.errstate(invalid="ignore"):  # NaN where rows are not finite: float64 then
            typical = float(np.quantile(errors.error, 0.9)) if len(rows[head]) else 0.0
        if errors.oracle_upper <= max(OWN_SHARE * typical, little[head]):
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


def _prefix_rows(
    sequence: Sequence, rows: Chosen, facts: dict[int, RunFacts], lse: torch.Tensor
) -> dict[int, tuple[torch.Tensor, RunFacts]]:
    """Exact rows in float32 of sound heads where masks are prefixes of the keys.

    Returns
    -------
    dict of int to (Tensor, RunFacts)
        Rows in float64, and facts of what was multiplied to get them.
    """
    mask, whole = sequence.mask, sequence.operands(torch.float32)
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
    span, device = sequence.span, sequence.query.device
    owners: dict[int, list[int]] = {}
    for head in heads:
        owners.setdefault(head // whole.group_size, []).append(head)
    edges = np.linspace(0, counts.pop(), STRETCHES + 1).astype(int)
    found = {}
    for owner, members in owners.items():
        size = max(facts[members[0]].key_norm_upper, _SMALLEST)
        picked = np.stack([rows[head] for head in members])
        index = torch.from_numpy(picked).to(device)
        at = torch.tensor(members, device=device)[:, None]
        shift = lse[span.batch, at, span.q_start + index].float()
        shift = torch.where(torch.isfinite(shift), shift, 0.0)
        query = whole.query[at, index] * whole.scale
        query = torch.cat([query, -shift[..., None] / size], dim=2)
        pad = torch.nn.functional.pad
        key = pad(whole.key[owner], (0, 1), value=size)
        value = pad(whole.value[owner], (0, 1, 0, -whole.len_kv % SUM_KEYS), value=1.0)
        parts = [
            _prefix_attention(
                query[:, a:b].flatten(0, 1), key, value, mask.stop[picked[:, a:b]]
            )
            for a, b in pairwise(edges)
            if a < b
        ]
        exact = torch.cat([part.unflatten(0, (len(members), -1)) for part in parts], dim=1)
        largest = shift.abs().amax(dim=1).tolist()
        for n, head in enumerate(members):
            if not bool(torch.isfinite(exact[n]).all()):
                continue
            known = facts[head]
            shifted = replace(
                known,
                query_norm_upper=math.hypot(
                    known.query_norm_upper, largest[n] / size / whole.scale
                ),
                key_norm_upper=math.hypot(size, size),
            )
            found[head] = exact[n], shifted
    return found


def _prefix_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stop: NDArray[np.int64]
) -> torch.Tensor:
    """Attention of rows over keys 0..stop-1 of each, in float64; zeros where there are none.

    Parameters
    ----------
    query : Tensor, shape (rows, dim_qk + 1)
        Scaled, and what is taken off the scores.
    key : Tensor, shape (len_kv, dim_qk + 1)
    value : Tensor, shape (len_kv up to whole sums, dim_v + 1)
        The last component 1.
    """
    stop = stop.ravel()
    least, most = int(stop.min()), int(stop.max())
    last = torch.from_numpy(stop).to(query.device)[:, None]
    sums = value.new_zeros((len(query), value.shape[1]), dtype=torch.float64)
    for first in range(0, most, CHUNK_KEYS):
        end = min(first + CHUNK_KEYS, most)
        whole = -(-(end - first) // SUM_KEYS) * SUM_KEYS
        weights = query.new_empty((len(query), whole))
        torch.mm(query, key[first:end].T, out=weights[:, : end - first])
        if first + whole > least:
            from_ = max(least - first, 0)
            columns = torch.arange(first + from_, first + whole, device=query.device)
            weights[:, from_:].masked_fill_(columns >= last, -torch.inf)
        parts = weights.exp_().unflatten(1, (-1, SUM_KEYS)).transpose(0, 1)
        values = value[first : first + whole].unflatten(0, (-1, SUM_KEYS))
        sums += torch.bmm(parts, values).sum(dim=0, dtype=torch.float64)
    total = sums[:, -1:]
    return sums[:, :-1] / torch.where(total > 0, total, 1.0)


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
        dim_qk=sequence.query.shape[2] + (name == "f32"),
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
