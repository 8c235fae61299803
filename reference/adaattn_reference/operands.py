"""Operands of a head after rounding to the plan's formats, and the rounded product P·V.

The emulation rounds what the tensor cores would be given and multiplies in float32 (float64 for
the f64 plan); only e4m3 accumulation is modelled further, because its error is not negligible:
partial sums keep 13 fraction bits and are flushed into float32 every `flush_keys` keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds import largest_norm_upper
from adaattn_core.formats import (
    SCALE_BLOCKS,
    format_spacing,
    get_format,
    round_to_format,
    stochastic_round,
)
from adaattn_core.plan import HeadPlan
from adaattn_reference import quantise
from adaattn_reference.key_values import transposed
from adaattn_reference.score_rule import cap
from adaattn_reference.scratch import scratch
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

FP8_LEAST = 2.0**-126
"""Smaller partial sums are truncated as if they had this size, the smallest normal float32."""
FP8_STEP_KEYS = 32
"""Products that Hopper's FP8 tensor core aligns and adds at once."""


@dataclass(eq=False)
class Operands:
    """Rounded operands of one head, as the working float.

    Attributes
    ----------
    query : ndarray, shape (len_q, dim_qk)
        Rounded queries times the score scale.
    key : ndarray, shape (len_kv, dim_qk)
        Rounded keys (minus the mean key where smoothing applies).
    value : ndarray, shape (len_kv, dim_v)
        Rounded values, non-finite ones zeroed.
    lse_shift : ndarray or None, shape (len_q,)
        What smoothing took from every score of a row; added back to the lse.
    score_shift : ndarray or None, shape (len_q,)
        The same where scores are capped: added back to them before.
    softcap : float
        What scores are capped to; 0 for no cap.
    plan : HeadPlan
    query_residual_upper, key_residual_upper, value_residual_upper : float
        Largest norm of what rounding took from a vector (0 where nothing was rounded).
    query_step_upper, key_step_upper : float
        Largest spacing of the 8-bit grid in the operand's units (0 for wider formats).
    """

    query: Float
    key: Float
    value: Float
    lse_shift: Float | None
    plan: HeadPlan
    query_residual_upper: float = 0.0
    key_residual_upper: float = 0.0
    value_residual_upper: float = 0.0
    query_step_upper: float = 0.0
    key_step_upper: float = 0.0
    score_shift: Float | None = None
    softcap: float = 0.0

    @cached_property
    def key_t(self) -> Float:
        """Transposed keys, see `adaattn_reference.view.transposed`."""
        return transposed(self.key)

    def scores(self, rows: slice | NDArray[np.int64], keys: slice | NDArray[np.int64]) -> Float:
        """Scaled, capped scores of some rows and keys, in this thread's buffer; no mask yet."""
        query = self.query[rows]
        key_t = self.key_t[:, keys] if isinstance(keys, slice) else self.key[keys].T
        out = scratch("scores", (len(query), key_t.shape[1]), query.dtype)
        np.matmul(query, key_t, out=out)
        if self.score_shift is not None:
            out += self.score_shift[rows, None]
        return cap(out, self.softcap)

    def weighted_sum(self, weights: Float, value: Float) -> Float:
        """Return P·V with P in [0, 1] rounded to the plan's format, valid until the next call.

        Leading axes are batches: weights (..., rows, keys) and values (..., keys, dim_v).
        """
        name = self.plan.pv
        if name in ("f32", "f64"):
            shape = (*weights.shape[:-1], value.shape[-1])
            return np.matmul(weights, value, out=scratch("product", shape, value.dtype))
        if not get_format(name).is_quantised:
            return round_to_format(weights, name) @ value
        p_scale = 127.0 if name == "i8" else self.plan.p_scale
        rounded = round_to_format(weights * np.float32(p_scale), name)
        product = (
            _fp8_product(rounded, value, self.plan.flush_keys)
            if get_format(name).accumulator_bits < 24
            else rounded @ value
        )
        return product / np.float32(p_scale)


def prepare_operands(view: HeadView, plan: HeadPlan, seed: int) -> Operands:
    """Round the operands of a head to the plan's formats."""
    info_qk = get_format(plan.qk)
    query, key, lse_shift = view.query, view.key, None
    residuals = dict.fromkeys(
        ("query_residual_upper", "key_residual_upper", "query_step_upper", "key_step_upper"),
        0.0,
    )
    if info_qk.is_quantised:
        if plan.smooth_k and len(key):
            mean = quantise.centre(key, view.seen_keys)
            with np.errstate(invalid="ignore", over="ignore"):
                lse_shift = (query @ mean) * view.scale
            key = key - mean
        rng = np.random.default_rng((seed, 2)) if plan.rounding == "stochastic" else None
        key = _blanked(key, view)
        exact_query, exact_key = query, key
        blocks = SCALE_BLOCKS[plan.scales]
        query, query_step = _quantise(query, blocks.query_groups(len(query)), plan, rng)
        key, key_step = _quantise(key, blocks.key_groups(len(key)), plan, rng)
        residuals.update(
            query_residual_upper=largest_norm_upper(exact_query - query),
            key_residual_upper=largest_norm_upper(exact_key - key),
            query_step_upper=query_step,
            key_step_upper=key_step,
        )
    elif plan.qk not in ("f32", "f64"):
        key = _blanked(key, view)
        exact_query, exact_key = query, key
        query, key = round_to_format(query, plan.qk), round_to_format(key, plan.qk)
        residuals.update(
            query_residual_upper=largest_norm_upper(exact_query - query),
            key_residual_upper=largest_norm_upper(exact_key - key),
        )
    value = view.kv.clean_value
    value_residual = 0.0
    if plan.pv not in ("f32", "f64"):
        exact_value = _blanked(value, view)
        value = _round_values(exact_value, plan)
        value_residual = largest_norm_upper(exact_value - value)
    dtype = view.query.dtype  # wider than the formats where float32 products would overflow
    operands = Operands(
        query=query.astype(dtype, copy=False) * dtype.type(view.scale),
        key=key.astype(dtype, copy=False),
        value=value.astype(dtype, copy=False),
        lse_shift=None if view.softcap else lse_shift,
        score_shift=lse_shift if view.softcap else None,
        softcap=view.softcap,
        plan=plan,
        value_residual_upper=value_residual,
        **residuals,
    )
    if key is view.key:
        operands.key_t = view.kv.key_t  # shared by the heads of the group
    return operands


def _blanked(x: Float, view: HeadView) -> Float:
    """Keys or values of which those that no row sees are 0, and set no scale."""
    seen = view.seen_keys
    return x if seen.all() else np.where(seen[:, None], x, x.dtype.type(0))


def _quantise(
    x: Float, groups: NDArray[np.int64], plan: HeadPlan, rng: np.random.Generator | None
) -> tuple[Float, float]:
    """Scale, round and rescale vectors; also return the largest grid spacing in units of x."""
    if not len(x):
        return x, 0.0
    info = get_format(plan.qk)
    if rng is None:
        rounded, step = quantise.dequantised(x, groups, plan.qk)
    else:
        step, inverse = quantise.steps(x, groups, plan.qk)
        scaled = stochastic_round(x * inverse[groups][:, None], plan.qk, rng)
        rounded = scaled * step[groups][:, None]
    spacing = format_spacing(np.full((1, 1), info.max_finite), plan.qk) * step
    return np.asarray(rounded), float(spacing.max(initial=0.0))


def _round_values(value: Float, plan: HeadPlan) -> Float:
    """Round values: 8-bit formats with one scale per channel, or per rows of a tile."""
    if not get_format(plan.pv).is_quantised:
        return round_to_format(value, plan.pv)
    blocks = SCALE_BLOCKS[plan.scales]
    if blocks.value_rows:
        return quantise.dequantised(value, blocks.value_groups(len(value)), plan.pv)[0]
    channels = np.arange(value.shape[1])
    return quantise.dequantised(value.T, channels, plan.pv)[0].T


def _fp8_product(weights: Float, value: Float, flush_keys: int) -> Float:
    """P·V with Hopper's FP8 accumulator: 13 fraction bits, truncated, flushed to float32.

    `flush_keys` = 0 flushes at the end only.
    """
    keys = weights.shape[-1]
    flush_keys = flush_keys or max(keys, 1)
    out = np.zeros((*weights.shape[:-1], value.shape[-1]), np.float32)
    for flush in range(0, keys, flush_keys):
        partial = np.zeros_like(out)
        for first in range(flush, min(flush + flush_keys, keys), FP8_STEP_KEYS):
            last = min(first + FP8_STEP_KEYS, flush + flush_keys, keys)
            step = weights[..., first:last] @ value[..., first:last, :]
            largest = np.maximum(np.abs(step), np.abs(partial))
            quantum = np.exp2(np.floor(np.log2(np.maximum(largest, FP8_LEAST))) - 13)
            partial = np.trunc((partial + step) / quantum) * quantum
        out += partial
    return out
