"""Theorem 6: scores from a projection of the feature space."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaattn_core.bounds.norms import row_norms_upper
from adaattn_core.bounds.rounding import Real, add_up, mul_up


def projected_score_error(
    scale: ArrayLike, query_residual: ArrayLike, key_residual: ArrayLike
) -> Real:
    """Upper bound of ``|scale (q.k - Pq.Pk)|`` for an orthogonal projector ``P``.

    Parameters
    ----------
    scale : array_like
        Factor on the scores, > 0.
    query_residual, key_residual : array_like
        ``|q - Pq|`` and ``|k - Pk|``, in any coordinates in which the scores are inner
        products.

    Returns
    -------
    float or ndarray
        ``scale |q - Pq| |k - Pk|``; no spectral gap is needed.

    References
    ----------
    This project, docs/math/06-low-rank.md, theorem 6.
    """
    return mul_up(scale, query_residual, key_residual)


def residual_norm(vectors: NDArray[np.floating], basis: NDArray[np.floating]) -> Real:
    """Upper bound of the largest ``|x - P x|`` over the rows of `vectors`.

    Parameters
    ----------
    vectors : ndarray, shape (len, dim)
        One vector per row.
    basis : ndarray, shape (dim, rank)
        Orthonormal columns (to working accuracy); ``P = basis @ basis.T``.

    Notes
    -----
    Computed in float64 from the difference itself, so the rounding of the projection enters as
    ``4 (dim + rank) 2^-53 (1 + |basis|_F^2) |x|``, which is added.
    """
    x = np.asarray(vectors, dtype=np.float64)
    b = np.asarray(basis, dtype=np.float64)
    if x.shape[0] == 0:
        return 0.0
    residual = x - (x @ b) @ b.T
    units = 4.0 * (sum(b.shape) + 1) * 2.0**-53
    growth = 1.0 + float(np.sum(b * b))
    rounding = mul_up(units * growth, row_norms_upper(x))
    return float(np.max(add_up(row_norms_upper(residual), rounding)))
