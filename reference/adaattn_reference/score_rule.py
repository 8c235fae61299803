"""Softcap and sinks, as `adaattn_core.scores` defines them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]


def cap(scores: Float, softcap: float) -> Float:
    """Cap scaled scores in place: ``softcap * tanh(score / softcap)``; 0 is no cap."""
    if softcap:
        limit = scores.dtype.type(softcap)
        scores /= limit
        np.tanh(scores, out=scores)
        scores *= limit
    return scores


def with_sink(lse: Float, sink: float) -> tuple[Float, Float]:
    """Count a sink in rows of which only the keys were counted so far.

    Parameters
    ----------
    lse : ndarray, shape (rows,)
        Log-sum-exp over the keys; -inf where a row sees none.
    sink : float
        -inf is none; +inf and NaN leave nothing known.

    Returns
    -------
    share : ndarray of float64, shape (rows,)
        What is left for the keys of each row: a factor on its output.
    lse : ndarray of float64, shape (rows,)
        With the sink.
    """
    wide = lse.astype(np.float64)
    if sink == -np.inf:
        return np.ones_like(wide), wide
    if not sink < np.inf:
        return np.full_like(wide, np.nan), np.full_like(wide, np.nan)
    both = np.logaddexp(wide, sink)
    return np.exp(wide - both), both
