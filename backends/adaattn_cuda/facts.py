"""Facts of a dense run: measured on the device behind the run, read when somebody asks.

Nothing waits: a kernel (`adaattn_cuda.kernels.smxx_operand_norms`) is enqueued with the run,
and its figures come to the host when a certificate is looked at. Every figure is an upper
bound (`output_rms`: a lower one); the names and meanings are those of
`adaattn_core.facts.RunFacts`.

The kernels' own arithmetic is charged to the operands, where the theorems look for it. With
n = dim_qk / 8 + 8, a score is computed from products that the tensor core sums with truncation:
|error| <= n 2^-22 scale |q| |k|, as if each key had moved by n 2^-22 |k|. An f32 product is
three tf32 products of a two-term split: 2^-21 more. P V is summed in the same way: n' 2^-22
max|v| with n' = keys / 8 + 16 in 16-bit formats and 32 + keys / 256 in 32-bit ones, which add
each key tile's short sum with rounding to nearest. 2^x errs by 2^-22 relatively: 2^-21 of
score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaattn_core.facts import RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_cuda.kernels.smxx_operand_norms import SLOTS
from adaattn_cuda.mask_sizes import MaskSizes

__all__ = ["LazyFacts", "Records"]

_TRUNCATION = 2.0**-22
_SPLIT = 2.0**-21
_EXPONENTIAL = 2.0**-21
_SLACK = 1.0 + 2.0**-40
"""Covers the rounding of a float64 sum of 256 squares, of its root, and of what follows."""
_SUBNORMAL = 2.0**-126
"""Covers what becomes of numbers below the smallest normal one, flushed or rounded."""


class Records(Protocol):
    """Figures that the device has or will have."""

    def read(self) -> list[NDArray[np.float64]]:
        """Return squared figures of query, key, value, out: (sequences, heads, slots)."""
        ...


class LazyFacts(MutableMapping[HeadIndex, RunFacts]):
    """Facts of every head of a run; the first one read waits for the device.

    Parameters
    ----------
    problem : AttentionProblem
        Only its sizes are kept, and the magnitudes of an additive mask.
    records : Records
        What was enqueued behind the run.
    plans : mapping of (sequence, head) to HeadPlan
    """

    def __init__(
        self, problem: AttentionProblem, records: Records, plans: Mapping[HeadIndex, HeadPlan]
    ) -> None:
        self._plans = plans
        self._records = records
        self._known: dict[HeadIndex, RunFacts] = {}
        self._dims = problem.dim_qk, problem.dim_v
        self._group_size = problem.group_size
        self._len_q = [span.len_q for span in problem.sequences]
        extent = problem.mask.extent
        self._keys_max = [extent(span.len_q, span.len_kv)[1] for span in problem.sequences]
        self._mask_sizes = MaskSizes(problem.mask, problem.scale)
        self._read: list[NDArray[np.float64]] | None = None

    def replan(self, records: Records, plans: Mapping[HeadIndex, HeadPlan]) -> None:
        """Forget some heads, which were computed again under other plans."""
        self._plans = {**self._plans, **plans}
        self._records, self._read = records, None
        for index in plans:
            self._known.pop(index, None)

    def __getitem__(self, index: HeadIndex) -> RunFacts:
        if index not in self._plans:
            raise KeyError(index)
        if index not in self._known:
            if self._read is None:
                self._read = self._records.read()
            self._known[index] = self._facts(self._read, index)
        return self._known[index]

    def __setitem__(self, index: HeadIndex, facts: RunFacts) -> None:
        self._known[index] = facts

    def __delitem__(self, index: HeadIndex) -> None:
        self._plans = {i: p for i, p in self._plans.items() if i != index}
        self._known.pop(index, None)

    def __iter__(self) -> Iterator[HeadIndex]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def _facts(self, read: list[NDArray[np.float64]], index: HeadIndex) -> RunFacts:
        sequence, head = index
        plan, keys_max = self._plans[index], self._keys_max[sequence]
        if keys_max == 0:
            return RunFacts()  # every row is 0, exactly
        dim_qk, dim_v = self._dims
        head_kv = head // self._group_size
        query, key = read[0][sequence, head], read[1][sequence, head_kv]
        value, out = read[2][sequence, head_kv], read[3][sequence, head]
        key_norm, value_norm = _root(key, "norm"), _root(value, "norm")
        key_error, value_error = _score_error(dim_qk, plan.qk), _sum_error(keys_max, plan.pv)
        total = float(out[SLOTS.index("norm")])
        finite = math.isfinite(total)
        mean = total / max(self._len_q[sequence], 1) if finite else 0.0
        return RunFacts(
            query_norm_upper=_root(query, "norm"),
            key_norm_upper=key_norm,
            value_norm_upper=value_norm,
            query_residual_upper=_residual(query, plan.qk, dim_qk),
            key_residual_upper=_residual(key, plan.qk, dim_qk) + key_norm * key_error,
            value_residual_upper=_residual(value, plan.pv, dim_v) + value_norm * value_error,
            value_diameter_upper=2 * _root(value, "distance"),
            score_residual_upper=_EXPONENTIAL,
            bias_max_abs=self._mask_sizes.largest(_root(query, "norm"), key_norm, value_norm),
            keys_max=keys_max,
            output_rms=math.sqrt(mean) / _SLACK**2,
            nonfinite=not finite,
        )


def _root(record: NDArray[np.float64], slot: str) -> float:
    """Root of a squared figure, rounded up."""
    return math.sqrt(float(record[SLOTS.index(slot)])) * _SLACK


def _residual(record: NDArray[np.float64], format_name: str, dim: int) -> float:
    """Largest distance between a vector and what its operand holds."""
    kept = _root(record, format_name) if format_name in SLOTS else 0.0
    return kept + (_SUBNORMAL * math.sqrt(dim) if record[0] > 0 else 0.0)


def _score_error(dim_qk: int, qk: str) -> float:
    return (dim_qk / 8 + 8) * _TRUNCATION + (_SPLIT if qk == "f32" else 0.0)


def _sum_error(keys: int, pv: str) -> float:
    if pv in ("bf16", "f16"):
        return (keys / 8 + 16) * _TRUNCATION
    return (32 + keys / 256) * _TRUNCATION + (_SPLIT if pv == "f32" else 0.0)
