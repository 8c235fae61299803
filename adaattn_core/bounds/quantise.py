"""Theorems 2 and 3: rounded queries and keys, rounded weights, rounded values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from adaattn_core.bounds.rounding import Real, add_up, div_up, mul_up, sub_down
from adaattn_core.formats import get_format


def score_error(
    scale: ArrayLike,
    query_norm: ArrayLike,
    key_norm: ArrayLike,
    query_residual: ArrayLike,
    key_residual: ArrayLike,
) -> Real:
    """Upper bound of ``|scale (q.k - q'.k')|`` for rounded operands ``q'`` and ``k'``.

    Parameters
    ----------
    scale : array_like
        Factor on the scores, > 0.
    query_norm, key_norm : array_like
        Euclidean norms, either all before or all after rounding, or one of each: the bound
        holds for every such reading.
    query_residual, key_residual : array_like
        ``|q - q'|`` and ``|k - k'|``.

    Returns
    -------
    float or ndarray
        ``scale (|q| |dk| + |dq| |k| + |dq| |dk|)``, broadcast.

    References
    ----------
    This project, docs/math/02-quantised-operands.md, theorem 2.
    """
    return mul_up(
        scale,
        add_up(
            mul_up(query_norm, key_residual),
            mul_up(query_residual, key_norm),
            mul_up(query_residual, key_residual),
        ),
    )


@dataclass(frozen=True, slots=True)
class WeightRounding:
    """How far rounding moves a weight ``w`` in [0, 1]: at most ``relative * w + absolute``."""

    relative: float
    absolute: float


@lru_cache(maxsize=256)
def weight_rounding(format_name: str, p_scale: float = 1.0) -> WeightRounding:
    """Upper bounds of the rounding error of a softmax weight stored in a format.

    Parameters
    ----------
    format_name : str
        A name in `adaattn_core.formats.FORMATS`.
    p_scale : float
        Factor, > 0, on the weight before it is rounded (and divided out afterwards); only 8-bit
        formats are scaled.

    Returns
    -------
    WeightRounding
        The relative part covers normal numbers and saturation (where `p_scale` exceeds the
        format's maximum), the absolute part subnormal numbers and uniform steps.

    References
    ----------
    This project, docs/math/03-rounded-weights.md, lemma 3.1.
    """
    info = get_format(format_name)
    factor = p_scale if info.is_quantised else 1.0
    saturation = max(0.0, float(sub_down(1.0, info.max_finite / factor)))
    if saturation > 0:
        saturation = float(add_up(saturation, 2.0**-50))
    if info.is_float:
        unit, step_half = info.unit_roundoff, info.smallest_normal * info.unit_roundoff
    else:
        unit, step_half = 0.0, 0.5
    # Scaling and unscaling in float32 round twice more.
    scaling = 2.0**-22 if factor != 1 else 0.0
    return WeightRounding(
        float(add_up(max(unit, saturation), scaling)), float(div_up(step_half, factor))
    )


def rounded_weights_error(
    rounding: WeightRounding, keys: ArrayLike, value_norm: ArrayLike
) -> Real:
    """Upper bound of the output row's error from rounding the weights.

    Parameters
    ----------
    rounding : WeightRounding
        From `weight_rounding`.
    keys : array_like
        Visible keys of the row.
    value_norm : array_like
        Largest norm of a visible value (as multiplied).

    Returns
    -------
    float or ndarray
        ``(rho + 2 n eta) / (1 - rho - n eta) |v|``, inf where the denominator is not positive.
        It holds whether the normaliser sums the rounded or the unrounded weights.

    Notes
    -----
    The weights are relative to the row's (running) maximum, so that their sum is at least 1.

    References
    ----------
    This project, docs/math/03-rounded-weights.md, theorem 3.
    """
    absolute = mul_up(keys, rounding.absolute)
    moved = add_up(rounding.relative, mul_up(2.0, absolute))
    kept = sub_down(1.0, add_up(rounding.relative, absolute))
    return mul_up(div_up(moved, kept), value_norm)


def rounded_values_error(
    value_residual: ArrayLike = 0.0, unit_roundoff: ArrayLike = 0.0, value_norm: ArrayLike = 0.0
) -> Real:
    """Upper bound of the output row's error from rounding the values.

    Either the exact residual norm is known (`value_residual`), or the values were rounded with
    a relative error of at most `unit_roundoff`; both may be given and add.

    References
    ----------
    This project, docs/math/03-rounded-weights.md, theorem 3 (ii).
    """
    return add_up(value_residual, mul_up(unit_roundoff, value_norm))


def storing_error(format_name: str, row_norm: ArrayLike, dim: int) -> Real:
    """Upper bound of the error of rounding an output row of `dim` numbers to a format.

    ``u |x| + sqrt(dim) * (half the smallest spacing)``; overflow is not covered (the output
    then holds infinities and is reported as such).
    """
    info = get_format(format_name)
    floor = info.smallest_normal * info.unit_roundoff
    relative = mul_up(info.unit_roundoff, row_norm)
    return add_up(relative, mul_up(float(np.sqrt(dim)) * (1 + 2.0**-50), floor))
