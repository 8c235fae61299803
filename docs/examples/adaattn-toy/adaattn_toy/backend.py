"""Dense attention in plain NumPy, one head at a time, f32 and f64."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import to_numpy
from adaattn_core.backend import Capabilities
from adaattn_core.bounds import largest_norm_upper, rms_norm_lower
from adaattn_core.errors import UnsupportedError
from adaattn_core.facts import RawResult, RunFacts
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem, HeadIndex

DTYPES: dict[str, type[np.floating[Any]]] = {"f32": np.float32, "f64": np.float64}


class ToyBackend:
    """The least that a backend must do: run dense plans exactly as they say, or refuse."""

    name = "toy"

    def capabilities(self) -> Capabilities:
        """Return what is offered; everything else must raise UnsupportedError."""
        return Capabilities(
            qk_formats=tuple(DTYPES),
            pv_formats=tuple(DTYPES),
            structures=("dense",),
            array_devices=("cpu",),
            target="cpu",
        )

    def provenance(self) -> dict[str, str]:
        """Return what computed the result."""
        return {"backend": self.name, "numpy": np.__version__}

    def run(
        self,
        problem: AttentionProblem,
        plan: Plan,
        *,
        workspace: Any = None,
        heads: Collection[HeadIndex] | None = None,
        into: RawResult | None = None,
    ) -> RawResult:
        """Compute all heads, or only `heads` of an earlier result."""
        plan.check_fits(problem)
        for head in plan.heads.values():
            _check(head)
        q, k, v = (to_numpy(x) for x in (problem.query, problem.key, problem.value))
        if into is None:
            out = np.zeros((*q.shape[:3], problem.dim_v), q.dtype)
            into = RawResult(out, np.full(q.shape[:3], -np.inf, np.float32))
        for sequence, head in problem.heads() if heads is None else heads:
            span = problem.sequences[sequence]
            rows, keys = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
            kv = (span.batch, head // problem.group_size, keys)
            here = (span.batch, head, rows)
            out, lse, facts = _attend(
                q[here],
                k[kv],
                v[kv],
                _bias(problem, sequence, head),
                problem.scale,
                plan[sequence, head],
            )
            into.out[here], into.lse[here] = out, lse
            into.facts[sequence, head] = facts
        return into


def _check(head: HeadPlan) -> None:
    if head.structure.kind != "dense":
        raise _unsupported(f"structure {head.structure.kind}", "structure dense")
    for operand, name in (("qk", head.qk), ("pv", head.pv)):
        if name not in DTYPES:
            raise _unsupported(f"{operand}={name}", f"formats {', '.join(DTYPES)}")


def _unsupported(got: str, needed: str) -> UnsupportedError:
    return UnsupportedError(
        got=f"{got} on the toy backend", needed=needed, do='use backend="numpy"'
    )


def _bias(problem: AttentionProblem, sequence: int, head: int) -> NDArray[np.float64]:
    """All masks of one head as numbers to add to the scores: -inf hides a key."""
    span = problem.sequences[sequence]
    start, stop = problem.intervals(sequence)
    keys = np.arange(span.len_kv)
    hidden = (keys < start[:, None]) | (keys >= stop[:, None])
    full = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
    rows, columns = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
    tile = span.batch, head, rows, columns
    bias = np.zeros(hidden.shape)
    if problem.mask.bias is not None:
        bias += np.broadcast_to(to_numpy(problem.mask.bias), full)[tile]
    if problem.mask.allowed is not None:
        hidden |= ~np.broadcast_to(to_numpy(problem.mask.allowed), full)[tile]
    return np.where(hidden, -np.inf, bias)


def _attend(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    bias: NDArray[np.float64],
    scale: float,
    plan: HeadPlan,
) -> tuple[NDArray[Any], NDArray[np.float32], RunFacts]:
    """One head: output in the input's dtype, lse, and what the certificate needs to know."""
    visible = bias != -np.inf
    sees, seen = visible.any(axis=1), visible.any(axis=0)
    # Rows and keys without a partner may hold NaN, and 0 * NaN is not 0: blank them out.
    query, key, value = (
        np.where(kept[:, None], x, np.zeros((), x.dtype))
        for kept, x in ((sees, query), (seen, key), (seen, value))
    )
    with np.errstate(all="ignore"):  # NaN, Inf and overflow are reported by `facts.nonfinite`
        q, k = query.astype(DTYPES[plan.qk]), key.astype(DTYPES[plan.qk])
        v = value.astype(DTYPES[plan.pv])
        scores = (q @ k.T) * q.dtype.type(scale) + bias.astype(q.dtype)
        top = np.max(np.where(visible, scores, -np.inf), axis=1, initial=-np.inf, keepdims=True)
        top = np.where(sees[:, None], top, 0).astype(q.dtype)
        weights = np.where(visible, np.exp(scores - top), 0)
        total = np.where(sees[:, None], weights.sum(axis=1, keepdims=True), 1)
        bad = ~np.isfinite(v).all(axis=1)
        out = weights.astype(v.dtype) @ np.where(bad[:, None], 0, v) / total
        out[visible[:, bad].any(axis=1)] = np.nan
        out = out.astype(query.dtype)
        lse = np.where(sees, (top + np.log(total))[:, 0], -np.inf).astype(np.float32)
        facts = RunFacts(
            query_norm_upper=largest_norm_upper(q),
            key_norm_upper=largest_norm_upper(k),
            value_norm_upper=largest_norm_upper(v),
            query_residual_upper=largest_norm_upper(query.astype(np.float64) - q),
            key_residual_upper=largest_norm_upper(key.astype(np.float64) - k),
            value_residual_upper=largest_norm_upper(value.astype(np.float64) - v),
            value_diameter_upper=2 * largest_norm_upper(v),
            score_residual_upper=0.0,
            dropped_mass_upper=0.0,
            bias_max_abs=float(np.abs(bias[visible]).max(initial=0.0)),
            keys_max=int(visible.sum(axis=1).max(initial=0)),
            output_rms=rms_norm_lower(out),
            nonfinite=not bool(np.isfinite(out.astype(np.float64)).all()),
        )
    return out, lse, facts
