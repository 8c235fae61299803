"""Theorem 1: what a perturbation of the scores does to softmax and to the output."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from adaattn_core.bounds.rounding import LIBRARY_ULPS, Real, mul_up, tanh_up, up


def total_variation(score_error: ArrayLike) -> Real:
    """Upper bound of the total-variation distance of two softmax rows.

    Parameters
    ----------
    score_error : array_like
        Upper bound of ``|s_j - s'_j - c|`` over the visible keys for some constant ``c`` of the
        row; natural-log units, >= 0, inf allowed.

    Returns
    -------
    float or ndarray
        ``tanh(score_error / 2)``, in [0, 1]; the bound is attained.

    References
    ----------
    This project, docs/math/01-softmax.md, theorem 1.

    Examples
    --------
    >>> float(total_variation(0.0)), float(total_variation(np.inf))
    (0.0, 1.0)
    """
    return tanh_up(mul_up(0.5, score_error))


def output_error(score_error: ArrayLike, value_diameter: ArrayLike) -> Real:
    """Upper bound of the output row's error caused by perturbed scores.

    Parameters
    ----------
    score_error : array_like
        As in `total_variation`.
    value_diameter : array_like
        Upper bound of ``|v_j - v_k|`` over visible keys, in the norm that the result is wanted
        in; for one channel the range (max minus min) of that channel.

    Returns
    -------
    float or ndarray
        ``tanh(score_error / 2) * value_diameter``, in the norm of `value_diameter`.

    References
    ----------
    This project, docs/math/01-softmax.md, corollary of theorem 1.
    """
    return mul_up(total_variation(score_error), value_diameter)


def weight_ratio_as_score_error(relative_error: ArrayLike) -> Real:
    """Upper bound of ``|ln(1 + e)|`` over ``|e| <= relative_error``.

    A relative error of an unnormalised softmax weight acts exactly like this perturbation of
    its score, so errors of `exp` go through theorem 1.

    Parameters
    ----------
    relative_error : array_like
        In [0, 1]; 1 gives inf.
    """
    error = np.asarray(relative_error, dtype=np.float64)
    with np.errstate(divide="ignore"):
        raised = up(-np.log1p(-np.minimum(error, 1.0)), LIBRARY_ULPS)
    return np.where(error == 0, 0.0, raised)[()]


def value_diameter(value_norm: ArrayLike, diameter: ArrayLike = np.inf) -> Real:
    """Upper bound of the values' diameter: `diameter` itself or twice the largest norm."""
    return np.minimum(mul_up(2.0, value_norm), np.asarray(diameter, dtype=np.float64))[()]
