"""Small factorisations that end no call: another driver, then None, where LAPACK gives up.

LAPACK's fast drivers fail now and then to converge on ordinary finite matrices, most often on
rank-deficient ones. What is factored here only steers choices, or is bounded afterwards for
whatever basis came out, so every caller says what it does instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]
F64 = NDArray[np.float64]


def svd(a: Float) -> tuple[F64, F64, F64] | None:
    """Reduced singular value decomposition ``(u, s, vt)``, values largest first.

    None if the matrix holds NaN or Inf, or neither it, its transpose nor its triangular factor
    converges.
    """
    wide = np.asarray(a, np.float64)

    def transposed() -> tuple[F64, F64, F64]:
        u, s, vt = np.linalg.svd(wide.T, full_matrices=False)
        return vt.T, s, u.T

    def triangular() -> tuple[F64, F64, F64]:
        q, r = np.linalg.qr(wide)
        u, s, vt = np.linalg.svd(r.T, full_matrices=False)
        return q @ vt.T, s, u.T

    def direct() -> tuple[F64, F64, F64]:
        return np.linalg.svd(wide, full_matrices=False)

    found: tuple[F64, F64, F64] | None = _first(wide, (direct, transposed, triangular))
    return found


def singular_values(a: Float) -> F64 | None:
    """Singular values, largest first; None as for `svd`."""
    wide = np.asarray(a, np.float64)

    def direct() -> Any:
        return np.linalg.svd(wide, compute_uv=False)

    def transposed() -> Any:
        return np.linalg.svd(wide.T, compute_uv=False)

    def triangular() -> Any:
        return np.linalg.svd(np.asarray(np.linalg.qr(wide, mode="r")).T, compute_uv=False)

    found: F64 | None = _first(wide, (direct, transposed, triangular))
    return found


def eigh(a: Float) -> tuple[F64, F64] | None:
    """Eigenvalues (rising) and vectors (columns) of a symmetric matrix, in float64.

    None if the matrix holds NaN or Inf, or neither it nor its mirror image converges.
    """
    wide = np.asarray(a, np.float64)

    def mirrored() -> tuple[F64, F64]:
        values, vectors = np.linalg.eigh(wide[::-1, ::-1])
        return values, vectors[::-1]

    found: tuple[F64, F64] | None = _first(wide, (lambda: np.linalg.eigh(wide), mirrored))
    return found


def solve(a: Float, b: Float) -> F64 | None:
    """Solution x of ``a x = b``; None if `a` is singular to LAPACK, or not finite."""
    wide = np.asarray(a, np.float64)
    found: F64 | None = _first(wide, (lambda: np.linalg.solve(wide, b),))
    return found


def gram(x: Float) -> F64:
    """``XᵀX`` of the rows over their largest magnitude, about their mean.

    Directions and ratios of eigenvalues are those of `x` itself; nothing overflows or
    underflows that matters beside the largest entry.
    """
    largest = float(np.max(np.abs(x), initial=0.0))
    if not largest:
        return np.zeros((x.shape[1], x.shape[1]))
    scaled = x / x.dtype.type(largest)
    scaled -= scaled.mean(axis=0)
    return np.asarray(scaled.T @ scaled, np.float64)


def principal_directions(x: Float, rank: int) -> F64:
    """Return the `rank` directions (columns) in which the rows of `x` differ most.

    The first coordinate axes where they cannot be found.
    """
    found = eigh(gram(x))
    return np.eye(x.shape[1], rank) if found is None else found[1][:, -rank:]


def _first(a: F64, drivers: Iterable[Callable[[], Any]]) -> Any:
    if not np.isfinite(a).all():
        return None
    for driver in drivers:
        try:
            return driver()
        except np.linalg.LinAlgError:
            continue
    return None
