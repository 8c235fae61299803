"""The truth: exact rows in float64, drawn apart from any certificate's; errors against them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_bench.contenders import Given
from adaattn_bench.devices import torch_module
from adaattn_core.arrays import to_numpy
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import (
    exact_attention,
    relative_frobenius,
    rms_row_norm,
    row_errors,
)

CELLS_MAX = 1 << 27
"""Scores that a device holds at once (float64: 1 GiB)."""


@dataclass(frozen=True, slots=True)
class Truth:
    """Exact rows of every head.

    Attributes
    ----------
    rows : ndarray of int64
    out : ndarray of float64, shape (batch, heads_q, rows, dim)
    """

    rows: NDArray[np.int64]
    out: NDArray[np.float64]

    @classmethod
    def draw(cls, given: Given, count: int, seed: int) -> Truth:
        """Compute some rows: all, if there are no more than four times as many as asked for."""
        length = given.shape.len_q
        rows = np.arange(length)
        if length > 4 * count:
            rows = np.sort(np.random.default_rng(seed + 1).permutation(length)[:count])
        return cls(rows, exact_rows(given, rows))

    @classmethod
    def joined(cls, truths: Sequence[Truth]) -> Truth:
        """Put heads of several problems side by side; all must speak of the same rows."""
        first = truths[0].rows
        assert all(np.array_equal(truth.rows, first) for truth in truths)
        return cls(first, np.concatenate([truth.out for truth in truths], axis=1))

    def errors(self, out: Any, share: float = 0.95) -> dict[str, list[float]]:
        """Errors of every head of an output, an array or a tensor wherever it lies.

        Returns
        -------
        dict
            ``rows``: least e such that a share `share` of the drawn rows errs by at most e
            times the root-mean-square row of the head's whole output, as certificates say it;
            ``worst``: the same for all drawn rows; ``frobenius``: of the drawn rows,
            relative to their exact values.
        """
        found: dict[str, list[float]] = {"rows": [], "worst": [], "frobenius": []}
        for index in np.ndindex(*self.out.shape[:2]):
            (rows, unit), exact = _seen(out[index], self.rows), self.out[index]
            off = np.sort(row_errors(rows, exact).ravel())
            rank = max(1, math.ceil(share * off.size * (1.0 - 1e-12)))
            found["rows"].append(_ratio(off[rank - 1], unit))
            found["worst"].append(_ratio(off[-1], unit))
            found["frobenius"].append(_wrong_if_nan(relative_frobenius(rows, exact)))
        return found


def exact_rows(given: Given, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows of every head in float64: by the oracle, of tensors by the same formula on them."""
    if given.arrays is given.tensors:
        return _of_tensors(given, rows)
    checked = AttentionProblem.from_arrays(*given.arrays, mask=given.mask, scale=given.scale)
    exact = exact_attention(checked, {index: rows for index in checked.heads()})
    return np.asarray(exact.out[:, :, rows])


def _of_tensors(given: Given, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Take the softmax of some rows' visible scores, all in float64, where they lie."""
    torch, shape = torch_module(), given.shape
    query, key, value = given.torch_tensors()
    behind, group = shape.len_kv - shape.len_q, shape.heads_q // shape.heads_kv
    drawn = torch.from_numpy(rows).to(query.device)
    places = torch.arange(shape.len_kv, device=query.device)
    step = max(1, CELLS_MAX // shape.len_kv)
    out = np.empty((shape.batch, shape.heads_q, len(rows), value.shape[3]))
    for batch, head in np.ndindex(shape.batch, shape.heads_q):
        keys, values = (x[batch, head // group].double() for x in (key, value))
        for start in range(0, len(rows), step):
            some = drawn[start : start + step]
            scores = query[batch, head, some].double() @ keys.T * given.scale
            scores.masked_fill_(places[None, :] > some[:, None] + behind, -math.inf)
            weights = torch.softmax(scores, dim=-1)
            out[batch, head, start : start + step] = (weights @ values).cpu().numpy()
    return out


def _seen(head: Any, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """Drawn rows of a head's output in float64, and its root-mean-square row."""
    if hasattr(head, "detach"):
        wide = head.detach().double()
        drawn = wide[torch_module().from_numpy(rows).to(wide.device)]
        return drawn.cpu().numpy(), float(wide.square().sum(-1).mean().sqrt())
    whole = np.asarray(to_numpy(head), np.float64)
    return whole[rows], rms_row_norm(whole)


def _ratio(error: float, unit: float) -> float:
    """Return a quotient, with 0/0 = 0; NaN in an output is no small error."""
    if error == 0.0:
        return 0.0
    return _wrong_if_nan(float(error / unit)) if unit else math.inf


def _wrong_if_nan(error: float) -> float:
    return math.inf if math.isnan(error) else error
