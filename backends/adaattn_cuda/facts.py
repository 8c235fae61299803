"""Facts of a dense run: measured on the device behind the run, read when somebody asks.

Nothing waits: a kernel (`adaattn_cuda.kernels.smxx_operand_norms`) is enqueued with the run,
and its figures come to the host when a certificate is looked at. Every figure is an upper
bound (`output_rms`: a lower one); the names and meanings are those of
`adaattn_core.facts.RunFacts`.

The kernels' own arithmetic is stated in `RunFacts.arithmetic`. With n = dim_qk / 8 + 8, a score
is computed from products that the tensor core sums with truncation: it errs by n 2^-22 of
scale |q| |k|. An f32 product is three tf32 products of a two-term split: 2^-21 more. P V is
summed in the same way: n' 2^-22 of sum p |v|, with n' = keys / 8 + 16 in 16-bit formats; 32-bit
ones add each step's short sum, and rescale what they have, with rounding to nearest: n' = 32 +
keys / (2 step). 2^x errs by 2^-22 relatively. Sums of i8 codes are exact; what they are
multiplied by, and the origin that they are counted from (``softmax/scaled.cuh``), err by less
than a unit of their product, of which the largest score has 127^2: 2^-14. A row that had to be
repaired (NaN in a key that it does not see) is computed anew in steps of 32 keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from adaattn_core.facts import Arithmetic, FactsTable, RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_cuda.kernels.listed import Kept
from adaattn_cuda.kernels.smxx_operand_norms import SLOTS
from adaattn_cuda.mask_sizes import MaskSizes
from adaattn_cuda.quantised import QuantisedRun, i8_norm, i8_residual, value_residual

__all__ = ["LazyFacts", "Records", "kernel_arithmetic"]

_TRUNCATION = 2.0**-22
_SPLIT = 2.0**-21
_CODE_SUM = 2.0**-14
_EXPONENTIAL = 2.0**-22
_TANH = 2.0**-21
"""Of ``tanh_approx`` in softmax/score_rule.cuh; wider operands take the library's."""
REPAIR_STEP_KEYS = 32
"""Keys of a step of a repaired row (``attn/repair_row.cuh``): a warp's lanes."""
_SLACK = 1.0 + 2.0**-40
"""Covers the rounding of a float64 sum of 256 squares, of its root, and of what follows."""
_SUBNORMAL = 2.0**-126
"""Covers what becomes of numbers below the smallest normal one, flushed or rounded."""


Partial = Mapping[HeadIndex, Callable[[HeadIndex], Kept]]


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
    step_keys : int
        Fewest keys of a step of the streaming softmax, of all launches.
    quantised : mapping of (sequence, head) to QuantisedRun
        Where the steps of heads with 8-bit operands are.
    partial : mapping of (sequence, head) to callable
        Of heads that are not dense: what returns what was left of each.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        records: Records,
        plans: Mapping[HeadIndex, HeadPlan],
        step_keys: int,
        quantised: Mapping[HeadIndex, QuantisedRun] = MappingProxyType({}),
        partial: Partial = MappingProxyType({}),
    ) -> None:
        self._plans = plans
        self._quantised = dict(quantised)
        self._partial = dict(partial)
        self._step_keys = min(step_keys, REPAIR_STEP_KEYS)
        self._records = records
        self._told: dict[HeadIndex, RunFacts] = {}
        self._dims = problem.dim_qk, problem.dim_v
        self._group_size = problem.group_size
        self._len_q = [span.len_q for span in problem.sequences]
        extent = problem.mask.extent
        self._keys_max = [extent(span.len_q, span.len_kv)[1] for span in problem.sequences]
        self._mask_sizes = MaskSizes(problem.mask, problem.scale)
        self._has_bias = problem.mask.bias is not None
        self._sinks = _magnitudes(problem.sinks)
        self._softcap = problem.softcap is not None
        self._figures: list[NDArray[np.float64]] | None = None
        self._whole: FactsTable | None = None

    def replan(
        self,
        records: Records,
        plans: Mapping[HeadIndex, HeadPlan],
        step_keys: int,
        quantised: Mapping[HeadIndex, QuantisedRun] = MappingProxyType({}),
        partial: Partial = MappingProxyType({}),
    ) -> None:
        """Forget some heads, which were computed again under other plans."""
        kept = {index: run for index, run in self._quantised.items() if index not in plans}
        self._quantised = kept | dict(quantised)
        left = {index: said for index, said in self._partial.items() if index not in plans}
        self._partial = left | dict(partial)
        self._step_keys = min(step_keys, self._step_keys)
        self._plans = {**self._plans, **plans}
        self._records, self._figures, self._whole = records, None, None
        for index in plans:
            self._told.pop(index, None)

    def table(self, heads: Sequence[HeadIndex]) -> FactsTable:
        """Return facts of some heads as arrays; waits for the device."""
        if self._told:
            return FactsTable.of({index: self[index] for index in heads}, heads)
        return self._measured(tuple(heads))

    def __getitem__(self, index: HeadIndex) -> RunFacts:
        if index in self._told:
            return self._told[index]
        if index not in self._plans:
            raise KeyError(index)
        if self._whole is None:
            self._whole = self._measured(tuple(self._plans))
        return self._whole.row(self._whole.index.index(index))

    def __setitem__(self, index: HeadIndex, facts: RunFacts) -> None:
        self._told[index] = facts

    def __delitem__(self, index: HeadIndex) -> None:
        self._plans = {i: p for i, p in self._plans.items() if i != index}
        self._told.pop(index, None)
        self._whole = None

    def __iter__(self) -> Iterator[HeadIndex]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def _measured(self, index: tuple[HeadIndex, ...]) -> FactsTable:
        if self._figures is None:
            self._figures = self._records.read()
        sequence, head = np.array(index, np.int64).reshape(-1, 2).T
        of_query, of_kv = (sequence, head), (sequence, head // self._group_size)
        query, key, value, out = (
            figures[where]
            for figures, where in zip(
                self._figures, (of_query, of_kv, of_kv, of_query), strict=True
            )
        )
        plans = [self._plans[i] for i in index]
        qk, pv = [plan.qk for plan in plans], [plan.pv for plan in plans]
        dim_qk, dim_v = self._dims
        keys_max = np.array(self._keys_max, np.int64)[sequence]
        total = out[:, SLOTS.index("norm")]
        finite = np.isfinite(total)
        rows = np.maximum(np.array(self._len_q), 1)[sequence]
        norms = [_root(x, "norm") for x in (query, key, value)]
        nothing, zero = keys_max == 0, np.zeros(len(index))
        columns = {
            "query_norm_upper": norms[0],
            "key_norm_upper": norms[1],
            "value_norm_upper": norms[2],
            "query_residual_upper": _residual(query, qk, dim_qk),
            "key_residual_upper": _residual(key, qk, dim_qk),
            "value_residual_upper": _residual(value, pv, dim_v),
            "value_diameter_upper": 2 * _root(value, "distance"),
            "score_residual_upper": zero,
            "query_step_upper": zero.copy(),
            "key_step_upper": zero.copy(),
            "dropped_mass_upper": zero,
            "bias_max_abs": self._bias(norms),
            "output_rms": np.sqrt(np.where(finite, total, 0.0) / rows) / _SLACK**2,
        }
        columns["sink_abs"] = zero
        if self._sinks is not None:
            columns["sink_abs"] = np.array([float(x) for x in self._sinks])[head]
        self._add_steps(columns, index)
        columns = {name: np.where(nothing, 0.0, column) for name, column in columns.items()}
        columns |= {
            "keys_max": keys_max,
            "share": np.ones(len(index)),
            "rank": np.zeros(len(index), np.int64),
            "nonfinite": ~finite & ~nothing,
        }
        for row, head_index in enumerate(index):
            if head_index in self._partial and not nothing[row]:
                left = self._partial[head_index](head_index)
                columns["share"][row], columns["rank"][row] = left.share, left.rank
                columns["dropped_mass_upper"][row] = 0.0 if left.complete else math.inf
        arithmetic = tuple(
            kernel_arithmetic(*formats, dim_qk, keys, self._step_keys, self._softcap)
            for *formats, keys in zip(qk, pv, keys_max.tolist(), strict=True)
        )
        return FactsTable(index, columns, arithmetic)

    def _add_steps(
        self, columns: dict[str, NDArray[np.float64]], index: tuple[HeadIndex, ...]
    ) -> None:
        """Say of heads with 8-bit operands what follows from their steps."""
        dim_qk, dim_v = self._dims
        for row, (sequence, head) in enumerate(index):
            run = self._quantised.get((sequence, head))
            if run is None:
                continue
            plan, steps = self._plans[sequence, head], run.steps()
            group = head // self._group_size
            if plan.qk == "i8":
                for name, step in (
                    ("query", steps.query[sequence, head]),
                    ("key", steps.key[sequence, group]),
                ):
                    columns[f"{name}_residual_upper"][row] = i8_residual(step, dim_qk)
                    columns[f"{name}_step_upper"][row] = step
                if plan.smooth_k:
                    columns["key_norm_upper"][row] = i8_norm(steps.key[sequence, group], dim_qk)
            if plan.pv == "e4m3":
                columns["value_residual_upper"][row] = value_residual(
                    steps.value[sequence, group], columns["value_norm_upper"][row], dim_v
                )

    def _bias(self, norms: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        if not self._has_bias:
            return np.zeros(len(norms[0]))
        sizes = [
            self._mask_sizes.largest(*map(float, three)) for three in zip(*norms, strict=True)
        ]
        return np.array(sizes, np.float64)


def _magnitudes(sinks: Any) -> Any:
    """Magnitudes of sinks as they are now, on the device; 0 where one is none."""
    if sinks is None:
        return None
    xp = array_api_compat.array_namespace(sinks)
    return xp.abs(xp.where(xp.isfinite(sinks), sinks, xp.zeros_like(sinks)))


def _root(records: NDArray[np.float64], slot: str) -> NDArray[np.float64]:
    """Root of a squared figure (heads, slots), rounded up."""
    return np.asarray(np.sqrt(records[:, SLOTS.index(slot)]) * _SLACK)


def _residual(
    records: NDArray[np.float64], formats: Sequence[str], dim: int
) -> NDArray[np.float64]:
    """Largest distance between a vector and what its operand holds."""
    kept = np.where(records[:, 0] > 0, _SUBNORMAL * math.sqrt(dim), 0.0)
    for name in set(formats) & set(SLOTS):
        rows = np.array([other == name for other in formats])
        kept = np.where(rows, kept + _root(records, name), kept)
    return kept


@lru_cache(maxsize=1024)
def kernel_arithmetic(
    qk: str, pv: str, dim_qk: int, keys_max: int, step_keys: int, softcap: bool = False
) -> Arithmetic:
    """State what the dense kernels charge; the module's text derives the numbers."""
    score = (dim_qk / 8 + 8) * _TRUNCATION + (_SPLIT if qk == "f32" else 0.0)
    sums: float | None
    if qk == "i8":
        score = _CODE_SUM
    if pv == "e4m3":
        sums = None  # as core bounds any such sum that is flushed as the plan says
    elif pv in ("bf16", "f16"):
        sums = (keys_max / 8 + 16) * _TRUNCATION
    else:
        sums = (32 + keys_max / (2 * step_keys)) * _TRUNCATION
        sums += _SPLIT if pv == "f32" else 0.0
    return Arithmetic(
        step_keys=step_keys,
        score_rel_upper=score,
        sum_rel_upper=sums,
        exp_rel_upper=_EXPONENTIAL,
        tanh_upper=_TANH if softcap and qk in ("bf16", "f16") else None,
    )
