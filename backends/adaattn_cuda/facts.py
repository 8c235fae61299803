"""Facts of a dense run, measured on the device when, and only when, somebody reads them.

A launch stays asynchronous: nothing here runs until a certificate is asked for. Every figure is
an upper bound (`output_rms`: a lower one); the names and meanings are those of
`adaattn_core.backend.RunFacts`.

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
from typing import Any

import array_api_compat

from adaattn_core.backend import RunFacts
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem, HeadIndex

__all__ = ["LazyFacts"]

_TRUNCATION = 2.0**-22
_SPLIT = 2.0**-21
_EXPONENTIAL = 2.0**-21
_NORM_SLACK = 1.0 + 2.0**-12
"""Covers the rounding of a float32 norm of at most 256 elements, and of everything after it."""
_SUBNORMAL = 2.0**-126
"""Covers what becomes of numbers below the smallest normal one, flushed or rounded."""
_SIGNIFICAND_BITS = {"tf32": 11, "f16": 11, "bf16": 8}
_F16_MAX = 65504.0
_EXPONENT_MAX = 126  # 2^126 and 2^-126 are both normal in float32


class LazyFacts(MutableMapping[HeadIndex, RunFacts]):
    """Facts of every head of a run; the first one read measures them all.

    Parameters
    ----------
    problem : AttentionProblem
    out : array
        The run's output, in the caller's library.
    plans : mapping of (sequence, head) to HeadPlan
    """

    def __init__(
        self, problem: AttentionProblem, out: Any, plans: Mapping[HeadIndex, HeadPlan]
    ) -> None:
        self._problem, self._out, self._plans = problem, out, plans
        self._known: dict[HeadIndex, RunFacts] = {}

    def replan(self, plans: Mapping[HeadIndex, HeadPlan]) -> None:
        """Forget some heads, which were computed again under other plans."""
        self._plans = {**self._plans, **plans}
        for index in plans:
            self._known.pop(index, None)

    def __getitem__(self, index: HeadIndex) -> RunFacts:
        if index not in self._plans:
            raise KeyError(index)
        if index not in self._known:
            missing = {i: p for i, p in self._plans.items() if i not in self._known}
            self._known.update(_measure(self._problem, self._out, missing))
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


def _measure(
    problem: AttentionProblem, out: Any, plans: Mapping[HeadIndex, HeadPlan]
) -> dict[HeadIndex, RunFacts]:
    xp = array_api_compat.array_namespace(problem.query)
    found: dict[HeadIndex, RunFacts] = {}
    for index, plan in plans.items():
        sequence, head = index
        span = problem.sequences[sequence]
        start, stop = problem.intervals(sequence)
        keys_max = int((stop - start).max(initial=0))
        if keys_max == 0:
            found[index] = RunFacts()  # every row is 0, exactly
            continue
        rows, keys = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
        head_kv = head // problem.group_size
        query = _Vectors(xp, problem.query[span.batch, head, rows], plan.qk)
        key = _Vectors(xp, problem.key[span.batch, head_kv, keys], plan.qk)
        value = _Vectors(xp, problem.value[span.batch, head_kv, keys], plan.pv)
        size, nonfinite = _output_size(xp, out[span.batch, head, rows])
        found[index] = RunFacts(
            query_norm_upper=query.norm,
            key_norm_upper=key.norm,
            value_norm_upper=value.norm,
            query_residual_upper=query.residual,
            key_residual_upper=key.residual + key.norm * _score_error(problem.dim_qk, plan.qk),
            value_residual_upper=value.residual + value.norm * _sum_error(keys_max, plan.pv),
            value_diameter_upper=value.diameter(),
            score_residual_upper=_EXPONENTIAL,
            bias_max_abs=_bias_max_abs(xp, problem.mask.bias),
            keys_max=keys_max,
            output_rms=size,
            nonfinite=nonfinite,
        )
    return found


def _score_error(dim_qk: int, qk: str) -> float:
    return (dim_qk / 8 + 8) * _TRUNCATION + (_SPLIT if qk == "f32" else 0.0)


def _sum_error(keys: int, pv: str) -> float:
    if pv in ("bf16", "f16"):
        return (keys / 8 + 16) * _TRUNCATION
    return (32 + keys / 256) * _TRUNCATION + (_SPLIT if pv == "f32" else 0.0)


class _Vectors:
    """Norm and rounding residual of the finite vectors of one head, as upper bounds.

    Vectors that hold NaN or Inf are left out: if a row saw one, its output is not finite, and
    the certificate says so on that ground.
    """

    def __init__(self, xp: Any, vectors: Any, format_name: str) -> None:
        self._xp = xp
        wide = xp.astype(vectors, xp.float32)
        finite = xp.all(xp.isfinite(wide), axis=-1, keepdims=True)
        self._vectors = xp.where(finite, wide, xp.zeros_like(wide))
        self._finite = finite
        residual = self._vectors - _rounded(xp, self._vectors, format_name)
        self.norm = _largest_norm(xp, self._vectors)
        self.residual = _largest_norm(xp, residual)
        if self.norm > 0:
            self.residual += _SUBNORMAL * math.sqrt(vectors.shape[-1])

    def diameter(self) -> float:
        """Upper bound of the largest distance between two of the vectors."""
        xp = self._xp
        scaled, unit = _scaled(xp, self._vectors)
        weight = xp.astype(self._finite, xp.float32)
        centre = xp.sum(scaled, axis=0, keepdims=True) / max(float(xp.sum(weight)), 1.0)
        return 2 * _largest_norm(xp, (scaled - centre) * weight) * unit


def _scaled(xp: Any, vectors: Any) -> tuple[Any, float]:
    """Return vectors with a largest element near 1, and the unit that they were divided by.

    By multiplication with a power of two, which is exact: a division by a tiny number would
    become the product with its reciprocal on a GPU, and that overflows.
    """
    peak = float(xp.max(xp.abs(vectors)))
    exponent = math.frexp(peak)[1] if math.isfinite(peak) else 0
    exponent = min(max(exponent, -_EXPONENT_MAX), _EXPONENT_MAX)
    return vectors * 2.0**-exponent, 2.0**exponent


def _largest_norm(xp: Any, vectors: Any) -> float:
    """Largest Euclidean norm, rounded up; scaled first, so that squares stay in range."""
    scaled, unit = _scaled(xp, vectors)
    return math.sqrt(float(xp.max(xp.sum(scaled * scaled, axis=-1)))) * unit * _NORM_SLACK


def _rounded(xp: Any, x: Any, format_name: str) -> Any:
    """`x` (float32) as the kernel's operand holds it."""
    if format_name == "f32":
        return x
    if format_name == "f16":
        return xp.astype(xp.astype(xp.clip(x, -_F16_MAX, _F16_MAX), xp.float16), xp.float32)
    # Veltkamp's splitting rounds to the leading bits; large numbers are scaled against
    # overflow.
    bits = _SIGNIFICAND_BITS[format_name]
    large = xp.abs(x) > 2.0**96
    small = xp.where(large, x * 2.0**-32, x)
    product = small * (2.0 ** (24 - bits) + 1.0)
    high = product - (product - small)
    return xp.where(large, high * 2.0**32, high)


def _output_size(xp: Any, rows: Any) -> tuple[float, bool]:
    """Root mean square norm of the rows, rounded down, and whether any is not finite."""
    wide = xp.astype(rows, xp.float32)
    if not bool(xp.all(xp.isfinite(wide))):
        return 0.0, True
    scaled, unit = _scaled(xp, wide)
    mean = float(xp.mean(xp.sum(scaled * scaled, axis=-1)))
    return math.sqrt(mean) * unit * (1 - 1e-4), False


def _bias_max_abs(xp: Any, bias: Any) -> float:
    if bias is None:
        return 0.0
    wide = xp.astype(bias, xp.float32)
    return float(xp.max(xp.abs(xp.where(xp.isfinite(wide), wide, xp.zeros_like(wide)))))
