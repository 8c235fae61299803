"""Masks: which keys a query row may see.

Every structural mask (causal, window, key lengths, ragged batches) lets a row see one
*interval* of keys, so executors work with two integers per row. Boolean and additive masks are
kept as arrays with broadcast strides and are read tile by tile.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adaattn_core.checks import is_truth, shown
from adaattn_core.errors import ArgumentError, ShapeError

CausalAlignment = Literal["top_left", "bottom_right"]


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """What each query row may attend to; built by the class methods, combined with ``&``.

    Attributes
    ----------
    alignment : {"top_left", "bottom_right", "equal", None}
        How query positions map to key positions for causal and window masks. ``"equal"``
        demands ``len_q == len_kv``; nothing is guessed otherwise.
    left, right : int or None
        Row at aligned position p sees keys ``p - left .. p + right``; None means unlimited.
        Causal is ``right = 0``.
    lengths : tuple of int or None
        Number of valid keys of each batch entry.
    cu_seqlens_q, cu_seqlens_kv : tuple of int or None
        Ragged batch: sequence b owns rows ``cu[b]:cu[b+1]`` of a batch-1 packed array.
    allowed : array or None
        Boolean, True = may attend, broadcastable to (batch, heads_q, len_q, len_kv).
    bias : array or None
        Added to the scaled scores, same broadcasting; -inf masks.
    """

    alignment: str | None = None
    left: int | None = None
    right: int | None = None
    lengths: tuple[int, ...] | None = None
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_kv: tuple[int, ...] | None = None
    allowed: Any = field(default=None, repr=False)
    bias: Any = field(default=None, repr=False)

    # -- constructors -------------------------------------------------------------------------
    @classmethod
    def none(cls) -> Mask:
        """Every row sees every key."""
        return cls()

    @classmethod
    def causal(cls, alignment: CausalAlignment | None = None) -> Mask:
        """Causal mask.

        Parameters
        ----------
        alignment : {"top_left", "bottom_right"}, optional
            ``"top_left"``: row i sees keys 0..i. ``"bottom_right"``: row i sees keys
            0..i + len_kv - len_q (len_kv is the sequence's own key length where lengths are
            given). May be left out only when len_q == len_kv.
        """
        return cls(alignment=_alignment(alignment), right=0)

    @classmethod
    def sliding_window(
        cls, left: int | None, right: int | None = 0, alignment: CausalAlignment | None = None
    ) -> Mask:
        """Window mask: a row at aligned position p sees keys ``p - left .. p + right``."""
        for name, value in (("left", left), ("right", right)):
            is_whole = isinstance(value, Integral) and not isinstance(value, bool)
            if value is not None and (not is_whole or value < 0):
                raise ArgumentError(
                    got=f"{name}={shown(value)}",
                    needed="a whole number of at least 0, or None for unlimited",
                    do="count the keys to each side, the row's own position not included",
                )
        left, right = (None if n is None else int(n) for n in (left, right))
        return cls(alignment=_alignment(alignment), left=left, right=right)

    @classmethod
    def key_lengths(cls, lengths: Sequence[int]) -> Mask:
        """Keys at or beyond ``lengths[b]`` of batch entry b are padding."""
        return cls(lengths=_whole_numbers("lengths", lengths))

    @classmethod
    def ragged(cls, cu_seqlens_q: Sequence[int], cu_seqlens_kv: Sequence[int]) -> Mask:
        """Packed sequences of different lengths: arrays of batch 1, rows back to back."""
        cu_q = _whole_numbers("cu_seqlens_q", cu_seqlens_q)
        cu_kv = _whole_numbers("cu_seqlens_kv", cu_seqlens_kv)
        for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_kv", cu_kv)):
            if len(cu) < 2 or cu[0] != 0 or any(b < a for a, b in itertools.pairwise(cu)):
                raise ShapeError(
                    got=f"{name}={shown(cu)}",
                    needed="a nondecreasing sequence from 0, one entry more than sequences",
                    do="pass the exclusive prefix sum of the sequence lengths",
                )
        if len(cu_q) != len(cu_kv):
            raise ShapeError(
                got=f"{len(cu_q) - 1} query sequences and {len(cu_kv) - 1} key sequences",
                needed="the same number of both",
                do="pass one entry per sequence in both, empty sequences included",
            )
        return cls(cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)

    @classmethod
    def boolean(cls, allowed: Any) -> Mask:
        """Boolean mask, True = may attend, broadcastable to (batch, heads_q, len_q, len_kv)."""
        return cls(allowed=allowed)

    @classmethod
    def additive(cls, bias: Any) -> Mask:
        """Additive mask: added to the scaled scores; -inf masks a key."""
        return cls(bias=bias)

    def __and__(self, other: Mask) -> Mask:
        """Combine two masks; each kind may come from one side only."""
        if not isinstance(other, Mask):
            raise ArgumentError(
                got=f"a mask & {shown(other)}",
                needed="two masks",
                do="wrap an array: Mask.boolean(x) (True = may attend) or Mask.additive(x)",
            )
        merged: dict[str, Any] = {}
        groups = (
            ("alignment", "left", "right"),
            ("lengths",),
            ("cu_seqlens_q", "cu_seqlens_kv"),
            ("allowed",),
            ("bias",),
        )
        for group in groups:
            mine = [getattr(self, name) is not None for name in group]
            theirs = [getattr(other, name) is not None for name in group]
            if any(mine) and any(theirs):
                raise ArgumentError(
                    got=f"two masks that both state {' and '.join(group)}",
                    needed="each kind of mask at most once",
                    do="merge them yourself, for example into one boolean mask",
                )
            source = other if any(theirs) else self
            merged.update({name: getattr(source, name) for name in group})
        return replace(self, **merged)

    # -- facts --------------------------------------------------------------------------------
    @property
    def is_causal(self) -> bool:
        """Whether rows see no key after their own aligned position."""
        return self.right == 0 and self.left is None

    @property
    def has_window(self) -> bool:
        """Whether visibility depends on positions at all."""
        return self.left is not None or self.right is not None

    @property
    def is_structural(self) -> bool:
        """Whether visibility is an interval per row (no boolean or additive array)."""
        return self.allowed is None and self.bias is None

    def intervals(self, len_q: int, len_kv: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and one-past-last visible key of each row, for one sequence.

        Parameters
        ----------
        len_q, len_kv : int
            Length of this sequence's queries and of its *valid* keys.

        Returns
        -------
        start, stop : ndarray of int64, shape (len_q,)
            ``start <= stop``; equal where the row sees nothing.
        """
        rows = np.arange(len_q, dtype=np.int64)
        if not self.has_window:
            return np.zeros(len_q, np.int64), np.full(len_q, len_kv, np.int64)
        position = rows + (len_kv - len_q if self.alignment == "bottom_right" else 0)
        left, right = self.reach(len_q, len_kv)
        start = np.zeros(len_q, np.int64) if left is None else position - left
        stop = np.full(len_q, len_kv) if right is None else position + right + 1
        start = np.clip(start, 0, len_kv)
        return start, np.maximum(np.clip(stop, 0, len_kv), start)

    def sees_prefixes(self, len_q: int, len_kv: int) -> bool:
        """Whether every row sees the first keys up to a last one, and no others."""
        if not self.is_structural:
            return False
        offset = len_kv - len_q if self.alignment == "bottom_right" else 0
        return self.left is None or len_q - 1 + offset <= self.left

    def reach(self, len_q: int, len_kv: int) -> tuple[int | None, int | None]:
        """`left` and `right`, no larger than these lengths can tell apart.

        Positions may be added to them without overflow, however wide the window is.
        """
        most = len_q + len_kv
        left, right = self.left, self.right
        return (
            None if left is None else min(left, most),
            None if right is None else min(right, most),
        )

    def extent(self, len_q: int, len_kv: int) -> tuple[int, int]:
        """Scores that one sequence's intervals leave in all, and most of them in one row."""
        return _extent(self.alignment, self.left, self.right, len_q, len_kv)

    def describe(self) -> str:
        """One short phrase for tables and error messages."""
        parts = []
        if self.is_causal:
            parts.append(f"causal ({self.alignment})")
        elif self.has_window:
            parts.append(f"window {self.left}/{self.right} ({self.alignment})")
        if self.lengths is not None:
            parts.append("key lengths")
        if self.cu_seqlens_q is not None:
            parts.append("ragged")
        if self.allowed is not None:
            parts.append("boolean")
        if self.bias is not None:
            parts.append("additive")
        return " & ".join(parts) or "none"


@lru_cache(maxsize=4096)
def _extent(
    alignment: CausalAlignment, left: int | None, right: int | None, len_q: int, len_kv: int
) -> tuple[int, int]:
    start, stop = Mask(alignment=alignment, left=left, right=right).intervals(len_q, len_kv)
    counts = stop - start
    return int(counts.sum()), int(counts.max(initial=0))


def _whole_numbers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Integers of any library as ints; nothing is rounded to become one."""
    try:
        if any(map(is_truth, values)):
            raise TypeError("a truth value is no number")
        return tuple(operator.index(n) for n in values)
    except (TypeError, ValueError, RuntimeError):  # of whatever library the numbers are
        raise ArgumentError(
            got=f"{name}={shown(values)}",
            needed="a sequence of whole numbers",
            do="pass a list of integers, e.g. lengths.tolist()",
        ) from None


def _alignment(alignment: str | None) -> str:
    known = alignment is None or isinstance(alignment, str)
    if not known or alignment not in (None, "top_left", "bottom_right"):
        raise ArgumentError(
            got=f"alignment={shown(alignment)}",
            needed='"top_left" or "bottom_right"',
            do="top_left is PyTorch's is_causal; bottom_right is FlashAttention's causal",
        )
    return alignment or "equal"
