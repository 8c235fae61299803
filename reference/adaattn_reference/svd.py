"""Exact spectral facts: the best feature rank of Q·Kᵀ, its optimum error, and the rank of P.

Q·Kᵀ is never formed. With Q = U_q R_q and K = U_k R_k (R the triangular root of the Gram
matrix, found by QR so as not to square the condition number), Q·Kᵀ = U_q (R_q R_kᵀ) U_kᵀ has
the singular values of a matrix of size dim x dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds import (
    gamma_nearest,
    largest_norm_upper,
    projected_score_error,
    row_norms_estimate,
)
from adaattn_core.bounds.rounding import add_up, mul_up
from adaattn_core.errors import ArgumentError
from adaattn_reference.linalg import singular_values, solve, svd

F64_UNIT = 2.0**-53
RIDGE = 1e-7
"""Relative size of the ridge under a Gram root: keeps the change of basis invertible, and moves
the optimum's squared error by a relative 1e-14 of the scores' energy at most."""


@dataclass(frozen=True, slots=True)
class ScoreFactors:
    """A rank-r factorisation of Q·Kᵀ and what it leaves out.

    Attributes
    ----------
    query_r : ndarray of float64, shape (len_q, rank)
    key_r : ndarray of float64, shape (len_kv, rank)
        ``query_r @ key_r.T`` is the best rank-r approximation of Q·Kᵀ in every unitarily
        invariant norm (to working accuracy).
    query_residual_upper, key_residual_upper : float
        Upper bounds of the residuals' norms in the coordinates of theorem 6.
    score_residual_upper : float
        Upper bound of every entry of ``|Q·Kᵀ - query_r @ key_r.T|``, before the softmax scale.
        Rigorous for the factors as returned: the rounding of their computation is included.
    """

    query_r: NDArray[np.float64]
    key_r: NDArray[np.float64]
    query_residual_upper: float
    key_residual_upper: float
    score_residual_upper: float


def score_singular_values(query: NDArray[Any], key: NDArray[Any]) -> NDArray[np.float64]:
    """Return the singular values of Q·Kᵀ, largest first.

    Parameters
    ----------
    query : ndarray, shape (len_q, dim)
    key : ndarray, shape (len_kv, dim)

    Returns
    -------
    ndarray of float64, shape (min(len_q, len_kv, dim),)

    References
    ----------
    This project, docs/math/06-low-rank.md, lemma 6.2.
    """
    q, q_unit = _normalised(query)
    k, k_unit = _normalised(key)
    root_q = np.asarray(np.linalg.qr(q, mode="r"))
    root_k = np.asarray(np.linalg.qr(k, mode="r"))
    inner = root_q @ root_k.T
    values = _singular_values(inner)
    return np.asarray(values * (q_unit * k_unit), dtype=np.float64)


def best_score_error(query: NDArray[Any], key: NDArray[Any], rank: int) -> tuple[float, float]:
    """Return the least Frobenius and spectral errors of a rank-r approximation of Q·Kᵀ.

    References
    ----------
    C. Eckart and G. Young, The approximation of one matrix by another of lower rank,
    Psychometrika 1 (1936); L. Mirsky (1960); this project, docs/math/06-low-rank.md, theorem 6
    (iii).
    """
    tail = score_singular_values(query, key)[rank:]
    if tail.size == 0:
        return 0.0, 0.0
    return float(row_norms_estimate(tail)), float(tail[0])


def score_factors(query: NDArray[Any], key: NDArray[Any], rank: int) -> ScoreFactors:
    """Return the best rank-r factorisation of Q·Kᵀ with an entrywise bound of its error.

    Parameters
    ----------
    query : ndarray, shape (len_q, dim)
    key : ndarray, shape (len_kv, dim)
        The visible keys. A NaN or Inf anywhere makes the residual inf and spreads to the
        factors.
    rank : int
        At least 1; from `dim` on the operands themselves are returned, with residual 0.

    Raises
    ------
    ArgumentError
        If the rank is less than 1.

    References
    ----------
    This project, docs/math/06-low-rank.md, theorem 6 (ii) and (iii).
    """
    if rank < 1:
        raise ArgumentError(
            got=f"rank={rank}", needed="a rank of at least 1", do="use rank=1 or a dense plan"
        )
    q, q_unit = _normalised(query)
    k, k_unit = _normalised(key)
    dim = q.shape[1]
    if rank >= dim:
        return ScoreFactors(q * q_unit, k * k_unit, 0.0, 0.0, 0.0)
    if not (np.isfinite(q).all() and np.isfinite(k).all()):
        keep = np.eye(dim, rank)
        with np.errstate(invalid="ignore"):
            q_kept, k_kept = q @ keep * q_unit, k @ keep * k_unit
        return ScoreFactors(q_kept, k_kept, math.inf, math.inf, math.inf)
    to_query, to_key = _balancing_basis(q, k)
    q_basis, k_basis = q @ to_query, k @ to_key
    q_left, k_left = (
        largest_norm_upper(q_basis[:, rank:]),
        largest_norm_upper(k_basis[:, rank:]),
    )

    # Rounding: the computed coordinates, and a change of basis that is inverse only nearly.
    q_norm, k_norm = largest_norm_upper(q), largest_norm_upper(k)
    gamma = gamma_nearest(dim + 2, F64_UNIT)
    q_slip = mul_up(gamma, q_norm, _frobenius_upper(to_query))
    k_slip = mul_up(gamma, k_norm, _frobenius_upper(to_key))
    mismatch = add_up(
        _frobenius_upper(np.eye(dim) - to_query @ to_key.T),
        mul_up(2.0 * gamma, add_up(1.0, _frobenius_upper(to_query)), _frobenius_upper(to_key)),
        2.0 * gamma,
    )
    kept = add_up(
        mul_up(q_slip, add_up(largest_norm_upper(k_basis[:, :rank]), k_slip)),
        mul_up(largest_norm_upper(q_basis[:, :rank]), k_slip),
    )
    q_residual, k_residual = add_up(q_left, q_slip), add_up(k_left, k_slip)
    left = projected_score_error(1.0, q_residual, k_residual)
    entry = add_up(left, kept, mul_up(q_norm, mismatch, k_norm))
    return ScoreFactors(
        q_basis[:, :rank] * q_unit,
        k_basis[:, :rank] * k_unit,
        float(mul_up(q_residual, q_unit)),
        float(mul_up(k_residual, k_unit)),
        float(mul_up(entry, q_unit, k_unit)),
    )


def epsilon_rank(matrix: NDArray[Any], epsilon: float, norm: str = "frobenius") -> int:
    """Return the least rank that approximates a matrix to a relative error.

    Parameters
    ----------
    matrix : ndarray, shape (rows, columns)
    epsilon : float
        Relative error, >= 0.
    norm : {"frobenius", "spectral"}

    Raises
    ------
    ArgumentError
        If the norm is another word, `epsilon` is negative, or the matrix is not finite.

    Examples
    --------
    >>> epsilon_rank(np.diag([1.0, 0.5, 0.01]), 0.05)
    2
    """
    if norm not in ("frobenius", "spectral") or not epsilon >= 0:
        raise ArgumentError(
            got=f"norm={norm!r}, epsilon={epsilon}",
            needed='norm "frobenius" or "spectral", epsilon >= 0',
            do="correct the arguments",
        )
    values = _singular_values(np.asarray(matrix, dtype=np.float64))
    if values.size == 0 or values[0] == 0:
        return 0
    values = values / values[0]
    if norm == "spectral":
        return int(np.sum(values > epsilon))
    tails = np.append(np.hypot.accumulate(values[::-1])[::-1], 0.0)
    return int(np.argmax(tails <= epsilon * tails[0]))


def _singular_values(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Singular values, largest first."""
    found = singular_values(a)
    if found is None:
        raise ArgumentError(
            got="a matrix with NaN or Inf, or one that no driver decomposes",
            needed="a finite matrix",
            do="leave non-finite rows out",
        )
    return found


def _balancing_basis(
    q: NDArray[np.float64], k: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return T_q and T_k with T_q T_kᵀ = 1 whose columns are Q·Kᵀ's singular directions.

    The coordinate axes where those cannot be found.
    """
    root_q, root_k = _ridged_root(q), _ridged_root(k)
    found = svd(root_q @ root_k.T)
    if found is not None:
        left, values, _ = found
        balance = np.sqrt(np.maximum(values, values[0] * F64_UNIT))
        to_query = solve(root_q, left * balance)
        to_key = None if to_query is None else solve(to_query, np.eye(q.shape[1]))
        if to_query is not None and to_key is not None:
            return to_query, to_key.T
    # Any basis keeps the bound, only not as tight.
    return np.eye(q.shape[1]), np.eye(q.shape[1])


def _ridged_root(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Triangular R with RᵀR = XᵀX plus a small multiple of the identity."""
    dim = x.shape[1]
    size = float(np.linalg.norm(x))
    ridge = RIDGE * (size if size > 0 else 1.0) * np.eye(dim)
    return np.asarray(np.linalg.qr(np.vstack([x, ridge]), mode="r"), dtype=np.float64)


def _normalised(x: NDArray[Any]) -> tuple[NDArray[np.float64], float]:
    """Return `x` in float64 over a power of two near its largest magnitude, and that power."""
    wide = np.asarray(x, dtype=np.float64)
    largest = float(np.max(np.abs(wide), initial=0.0))
    if not 0 < largest < math.inf:
        return wide, 1.0
    unit = 2.0 ** math.floor(math.log2(largest))
    return wide / unit, unit


def _frobenius_upper(x: NDArray[np.float64]) -> float:
    return largest_norm_upper(x.reshape(1, -1))
