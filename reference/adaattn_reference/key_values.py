"""Keys and values of one head, and facts that its query heads share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds import largest_norm_upper, row_norms_upper

Float = NDArray[np.floating[Any]]


@dataclass(eq=False)
class KeyValues:
    """Keys and values of one (sequence, head_kv), and facts that its query heads share.

    Attributes
    ----------
    key, value : ndarray, shapes (len_kv, dim_qk), (len_kv, dim_v)
        In the working dtype; keys that no row's interval reaches are cut off.
    """

    key: Float
    value: Float

    @cached_property
    def key_t(self) -> Float:
        """Transposed keys, see `transposed`."""
        return transposed(self.key)

    @cached_property
    def key_norm(self) -> NDArray[np.float64]:
        """Euclidean norm of every key, rounded up."""
        return row_norms_upper(self.key)

    @cached_property
    def value_norm(self) -> NDArray[np.float64]:
        """Euclidean norm of every value, rounded up."""
        return row_norms_upper(self.value)

    @cached_property
    def value_diameter_upper(self) -> float:
        """Upper bound of the distance between two values, seen or not."""
        return diameter_upper(self.clean_value)

    @cached_property
    def bad_values(self) -> NDArray[np.int64]:
        """Keys whose value vector holds NaN or Inf."""
        return np.flatnonzero(~np.isfinite(self.value).all(axis=1))

    @cached_property
    def clean_value(self) -> Float:
        """Values with non-finite vectors replaced by zeros."""
        if not len(self.bad_values):
            return self.value
        clean = self.value.copy()
        clean[self.bad_values] = 0
        return clean

    @cached_property
    def finite_key(self) -> NDArray[np.bool_]:
        """Whether each key is finite, shape (len_kv,)."""
        return np.asarray(np.isfinite(self.key).all(axis=1))

    @cached_property
    def bad(self) -> NDArray[np.bool_]:
        """Whether a key or its value holds NaN or Inf, shape (len_kv,)."""
        bad = ~self.finite_key
        bad[self.bad_values] = True
        return bad


def transposed(x: Float) -> Float:
    """Return a transposed copy for BLAS, which reads it faster than a transposed view.

    Rows are padded: at a distance of a power of two they would share a few cache sets.
    """
    out = np.empty((x.shape[1], len(x) + 16), x.dtype)[:, : len(x)]
    out[:] = x.T
    return out


def diameter_upper(x: Float) -> float:
    """Upper bound of the distance between two rows: twice the largest from their mean."""
    if not len(x):
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        centre = x.mean(axis=0)
        if not np.isfinite(centre).all():
            centre = np.zeros_like(centre)
        return 2 * largest_norm_upper(x - centre)
