"""The best feature rank of Q·Kᵀ from two small matrices, for backends that never move Q and K.

A device sums the Gram matrices QᵀQ and KᵀK (dim x dim); what follows from them is found here:
the singular values of Q·Kᵀ, what a rank leaves out, and the maps that turn queries and keys
into operands of a smaller dim for the kernel that runs them anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.checks import whole
from adaattn_core.errors import ShapeError

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FeatureMaps:
    """A factorisation of Q·Kᵀ by feature maps.

    Attributes
    ----------
    to_query, to_key : ndarray of float64, shape (dim, rank)
        ``(Q @ to_query) @ (K @ to_key).T`` is the best approximation of Q·Kᵀ by this rank in
        every unitarily invariant norm, as far as the Gram matrices resolve it.
    values : ndarray of float64, shape (dim,)
        Singular values of Q·Kᵀ, largest first.
    """

    to_query: F64
    to_key: F64
    values: F64

    @property
    def rank(self) -> int:
        """Features that are kept."""
        return int(self.to_query.shape[1])

    @property
    def error_estimate(self) -> float:
        """Relative Frobenius error of the scores; 0 where there are none."""
        whole_norm = float(np.linalg.norm(self.values))
        left = float(np.linalg.norm(self.values[self.rank :]))
        return left / whole_norm if whole_norm else 0.0

    def singular_vectors(self, query: NDArray[Any], key: NDArray[Any]) -> tuple[F64, F64, F64]:
        """Return U, Σ and V of the best approximation ``U @ diag(Σ) @ V.T``.

        Parameters
        ----------
        query : ndarray, shape (len_q, dim)
        key : ndarray, shape (len_kv, dim)
            Those whose Gram matrices made the maps.

        Returns
        -------
        ndarray, shapes (len_q, rank), (rank,), (len_kv, rank)
            Columns of U and V are orthonormal; they are 0 where Σ is.
        """
        values = self.values[: self.rank]
        root = np.sqrt(values)
        weight = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
        left = np.asarray(query, np.float64) @ self.to_query * weight
        right = np.asarray(key, np.float64) @ self.to_key * weight
        return left, values, right


def feature_maps(gram_query: Any, gram_key: Any, rank: int) -> FeatureMaps | None:
    """Return the best rank-r factorisation of Q·Kᵀ from the Gram matrices.

    Parameters
    ----------
    gram_query, gram_key : array_like, shape (dim, dim)
        QᵀQ and KᵀK; of keys from which a common vector was subtracted (which softmax does not
        notice), if the map is applied to such keys.
    rank : int
        1 .. dim.

    Returns
    -------
    FeatureMaps or None
        None where a matrix holds NaN or Inf, or LAPACK gives up: stay dense.

    Raises
    ------
    ShapeError
        If the matrices are not square and alike.
    ArgumentError
        If the rank is not in its range.

    Notes
    -----
    With A = QᵀQ, B = KᵀK and ``A^½ B^½ = X Σ Yᵀ``, the maps are ``B^½ Y Σ^-½`` and
    ``A^½ X Σ^-½``: no root is inverted. A Gram matrix squares the condition number: directions
    below √ε of the largest are noise (ε of the format that it was summed in), and so the
    scores' relative error is optimal up to about √ε. `adaattn_reference.svd` has the bound of a
    factorisation's error and, by QR, one that does not square.

    References
    ----------
    This project, docs/math/06-low-rank.md, corollary 6.3.

    Examples
    --------
    >>> query, key = np.diag([3.0, 1.0]), np.diag([2.0, 0.5])
    >>> maps = feature_maps(query.T @ query, key.T @ key, 1)
    >>> maps.values.round(12).tolist()
    [6.0, 0.5]
    >>> ((query @ maps.to_query) @ (key @ maps.to_key).T).round(12).tolist()
    [[6.0, 0.0], [0.0, 0.0]]
    """
    a, b = np.asarray(gram_query, np.float64), np.asarray(gram_key, np.float64)
    if a.ndim != 2 or a.shape != b.shape or a.shape[0] != a.shape[1]:
        raise ShapeError(
            got=f"Gram matrices of shapes {a.shape} and {b.shape}",
            needed="two square matrices of one size",
            do="pass query.T @ query and key.T @ key of one head",
        )
    rank = whole("rank", rank, 1, len(a))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    try:
        (root_a, unit_a), (root_b, unit_b) = _root(a), _root(b)
        left, values, right = np.linalg.svd(root_a @ root_b)
    except np.linalg.LinAlgError:
        return None
    noise = len(a) * 2.0**-52 * float(np.linalg.norm(root_a) * np.linalg.norm(root_b))
    values = np.where(values > noise, values, 0.0)
    kept = np.sqrt(values[:rank])
    weight = np.divide(1.0, kept, out=np.zeros_like(kept), where=kept > 0)
    # Each operand gets the root of both units: Q @ to_query and K @ to_key are of one size.
    return FeatureMaps(
        root_b @ right[:rank].T * weight * math.sqrt(unit_b / unit_a),
        root_a @ left[:, :rank] * weight * math.sqrt(unit_a / unit_b),
        values * (unit_a * unit_b),
    )


def _root(gram: F64) -> tuple[F64, float]:
    """Symmetric root of a Gram matrix over `unit` squared, and that unit, a power of two."""
    largest = float(np.max(np.abs(gram), initial=0.0))
    unit = 2.0 ** math.floor(math.log2(largest) / 2) if largest else 1.0
    scaled = gram / unit / unit  # first: the sum of two large entries might overflow
    values, vectors = np.linalg.eigh((scaled + scaled.T) / 2)
    return vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T, unit
