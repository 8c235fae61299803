"""Theorem 9: scores of stochastically rounded operands."""

from __future__ import annotations

import math

import numpy as np

from adaattn_core.bounds.rounding import LIBRARY_ULPS, add_up, mul_up, sqrt_up, up
from adaattn_core.errors import ArgumentError

ROUNDING_BIAS = 2.0**-15
"""Largest mean of one rounding error, in steps. Random numbers have 24 bits (2^-24), and a
scaled operand may exceed the largest code by the rounding of its float32 scale, 2^-23 of at
most 127 steps, and is then cut off."""


def deviation_factor(pairs: int, confidence: float) -> float:
    """Upper bound of the sub-Gaussian deviations of all scores at once, in standard proxies.

    Parameters
    ----------
    pairs : int
        (row, key) pairs that the statement covers, >= 1.
    confidence : float
        In (0, 1).

    Returns
    -------
    float
        ``t = sqrt(2 ln(2 pairs / (1 - confidence)))``: two sides per pair, by a union bound.
    """
    if not 0 < confidence < 1:
        raise ArgumentError(
            got=f"confidence={confidence}",
            needed="a number strictly between 0 and 1",
            do='ask for guarantee="worst_case" if nothing may be left to chance',
        )
    inside = up(2.0 * max(pairs, 1) / (1.0 - confidence), 4)
    return float(sqrt_up(mul_up(2.0, up(np.log(inside), LIBRARY_ULPS))))


def stochastic_score_error(
    scale: float,
    query_norm: float,
    key_norm: float,
    query_step: float,
    key_step: float,
    *,
    dim: int,
    pairs: int,
    confidence: float,
) -> float:
    """Upper bound of every score's error, holding for all pairs at once with a confidence.

    Parameters
    ----------
    scale : float
        Factor on the scores, > 0.
    query_norm, key_norm : float
        Largest Euclidean norms of the operands before rounding (after the mean key is
        subtracted).
    query_step, key_step : float
        Largest distance between neighbouring representable numbers, in the operands' units.
    dim : int
        Coordinates per vector.
    pairs : int
        (row, key) pairs covered.
    confidence : float
        In (0, 1), over the random bits of the rounding alone.

    Returns
    -------
    float
        ``scale (t/2 sqrt((|q| step_k)^2 + (|k'| step_q)^2) + bias)`` with
        ``|k'| <= |k| + step_k sqrt(dim)``, which holds the second-order term, and t from
        `deviation_factor`.

    Notes
    -----
    Hypothesis: operands are rounded by `adaattn_core.formats.stochastic_round` with scales that
    depend on the data alone and without saturation (beyond the rounding of the scale). Then
    errors are independent, lie in an interval of one step and have mean zero up to
    `ROUNDING_BIAS`, which is accounted for.

    References
    ----------
    This project, docs/math/09-stochastic-rounding.md, theorem 9 (Hoeffding's lemma).
    """
    if query_step == 0 and key_step == 0:
        return 0.0
    root_dim = up(math.sqrt(dim))
    key_rounded = add_up(key_norm, mul_up(key_step, root_dim))
    first = mul_up(query_norm, key_step)
    second = mul_up(key_rounded, query_step)
    proxy = sqrt_up(add_up(mul_up(first, first), mul_up(second, second)))
    spread = mul_up(0.5, deviation_factor(pairs, confidence), proxy)
    bias = mul_up(ROUNDING_BIAS, root_dim, add_up(first, second))
    return float(mul_up(scale, add_up(spread, bias)))
