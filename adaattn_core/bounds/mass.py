"""Theorems 4 and 5: keys left out of a row, and keys pooled into one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaattn_core.bounds.rounding import LIBRARY_ULPS, Real, down, mul_up


def skipped_mass(weight_threshold: ArrayLike, keys: ArrayLike) -> Real:
    """Upper bound of the mass share of skipped keys.

    Parameters
    ----------
    weight_threshold : array_like
        Every skipped key's score lies at least ``ln(1/weight_threshold)`` under the log-sum-exp
        of some keys that were kept (under one of their scores is enough); in (0, 1).
    keys : array_like
        Number of skipped keys.

    Returns
    -------
    float or ndarray
        ``min(1, weight_threshold * keys)``.

    References
    ----------
    This project, docs/math/04-dropped-mass.md, corollary 4.2.
    """
    return np.minimum(mul_up(weight_threshold, keys), 1.0)[()]


def dropped_mass_error(mass: ArrayLike, value_diameter: ArrayLike) -> Real:
    """Upper bound of the output row's error after dropping keys and renormalising.

    Parameters
    ----------
    mass : array_like
        Upper bound of the dropped keys' share of the row's mass; inf means that nothing is
        known, and then nothing is claimed.
    value_diameter : array_like
        Upper bound of the distance between two visible values.

    Returns
    -------
    float or ndarray
        ``min(mass, 1) * value_diameter``; inf for infinite `mass`.

    References
    ----------
    This project, docs/math/04-dropped-mass.md, theorem 4.
    """
    share = np.asarray(mass, dtype=np.float64)
    known = mul_up(np.minimum(share, 1.0), value_diameter)
    return np.where(np.isinf(share), np.inf, known)[()]


def pooled_log_mass_lower(scores_mean: ArrayLike, keys: ArrayLike) -> Real:
    """Lower bound of ``ln sum_j exp(s_j)`` over a block of keys, from its mean score alone.

    Parameters
    ----------
    scores_mean : array_like
        Mean of the block's scores: the score of the mean key.
    keys : array_like
        Keys in the block, >= 1.

    Returns
    -------
    float or ndarray
        ``scores_mean + ln(keys)``: pooling never overstates a block's mass.

    References
    ----------
    This project, docs/math/05-pooled-keys.md, theorem 5 (Jensen's inequality).
    """
    mean = np.asarray(scores_mean, dtype=np.float64)
    count_log = down(np.log(np.asarray(keys, dtype=np.float64)), LIBRARY_ULPS)
    return down(mean + np.maximum(count_log, 0.0))


def pooled_log_mass(
    scores_mean: ArrayLike, keys: ArrayLike, score_radius: ArrayLike
) -> NDArray[np.float64] | float:
    """Upper bound of ``ln sum_j exp(s_j)`` over a block whose scores lie near their mean.

    Parameters
    ----------
    scores_mean, keys : array_like
        As in `pooled_log_mass_lower`.
    score_radius : array_like
        Upper bound of ``|s_j - mean|`` over the block.

    Returns
    -------
    float or ndarray
        ``mean + ln(keys) + radius^2 / 2`` (Hoeffding's lemma).

    References
    ----------
    This project, docs/math/05-pooled-keys.md, theorem 5 (ii).
    """
    mean = np.asarray(scores_mean, dtype=np.float64)
    count_log = np.log(np.asarray(keys, dtype=np.float64))
    half_square = np.asarray(mul_up(0.5, score_radius, score_radius))
    slack = 2.0**-49 * (np.abs(mean) + count_log + half_square)
    return np.asarray(mean + count_log + half_square + slack, dtype=np.float64)[()]
