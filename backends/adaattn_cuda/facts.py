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
keys / (2 step). 2^x errs by 2^-22 relatively. A row that had to be repaired (NaN in a key that
it does not see) is computed anew in steps of 32 keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaattn_core.facts import Arithmetic, RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_cuda.kernels.smxx_operand_norms import SLOTS
from adaattn_cuda.mask_sizes import MaskSizes

__all__ = ["LazyFacts", "Records", "kernel_arithmetic"]

_TRUNCATION = 2.0**-22
_SPLIT = 2.0**-21
_EXPONENTIAL = 2.0**-22
REPAIR_STEP_KEYS = 32
"""Keys of a step of a repaired row (``attn/repair_row.cuh``): a warp's lanes."""
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
    step_keys : int
        Fewest keys of a step of the streaming softmax, of all launches.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        records: Records,
        plans: Mapping[HeadIndex, HeadPlan],
        step_keys: int,
    ) -> None:
        self._plans = plans
        self._step_keys = min(step_keys, REPAIR_STEP_KEYS)
        self._records = records
        self._known: dict[HeadIndex, RunFacts] = {}
        self._dims = problem.dim_qk, problem.dim_v
        self._group_size = problem.group_size
        self._len_q = [span.len_q for span in problem.sequences]
        extent = problem.mask.extent
        self._keys_max = [extent(span.len_q, span.len_kv)[1] for span in problem.sequences]
        self._mask_sizes = MaskSizes(problem.mask, problem.scale)
        self._read: list[NDArray[np.float64]] | None = None

    def replan(
        self, records: Records, plans: Mapping[HeadIndex, HeadPlan], step_keys: int
    ) -> None:
        """Forget some heads, which were computed again under other plans."""
        self._step_keys = min(step_keys, self._step_keys)
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
            return RunFacts.of_nothing()
        dim_qk, dim_v = self._dims
        head_kv = head // self._group_size
        query, key = read[0][sequence, head], read[1][sequence, head_kv]
        value, out = read[2][sequence, head_kv], read[3][sequence, head]
        key_norm, value_norm = _root(key, "norm"), _root(value, "norm")
        total = float(out[SLOTS.index("norm")])
        finite = math.isfinite(total)
        mean = total / max(self._len_q[sequence], 1) if finite else 0.0
        return RunFacts(
            query_norm_upper=_root(query, "norm"),
            key_norm_upper=key_norm,
            value_norm_upper=value_norm,
            query_residual_upper=_residual(query, plan.qk, dim_qk),
            key_residual_upper=_residual(key, plan.qk, dim_qk),
            value_residual_upper=_residual(value, plan.pv, dim_v),
            value_diameter_upper=2 * _root(value, "distance"),
            score_residual_upper=0.0,
            dropped_mass_upper=0.0,
            bias_max_abs=self._mask_sizes.largest(_root(query, "norm"), key_norm, value_norm),
            keys_max=keys_max,
            arithmetic=kernel_arithmetic(plan, dim_qk, keys_max, self._step_keys),
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


def kernel_arithmetic(plan: HeadPlan, dim_qk: int, keys_max: int, step_keys: int) -> Arithmetic:
    """State what the dense kernels charge; the module's text derives the numbers."""
    score = (dim_qk / 8 + 8) * _TRUNCATION + (_SPLIT if plan.qk == "f32" else 0.0)
    if plan.pv in ("bf16", "f16"):
        sums = (keys_max / 8 + 16) * _TRUNCATION
    else:
        sums = (32 + keys_max / (2 * step_keys)) * _TRUNCATION
        sums += _SPLIT if plan.pv == "f32" else 0.0
    return Arithmetic(
        step_keys=step_keys,
        score_rel_upper=score,
        sum_rel_upper=sums,
        exp_rel_upper=_EXPONENTIAL,
    )
