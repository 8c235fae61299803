"""AttentionProblem: every shape, dtype and mask check, once, at the door."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import (
    INPUT_FORMATS,
    array_device,
    dtype_name,
    move_axis_layout,
)
from adaattn_core.checks import shown
from adaattn_core.errors import ArgumentError, DTypeError, ShapeError
from adaattn_core.mask import Mask
from adaattn_core.paged import PagedKV
from adaattn_core.problem_checks import (
    check_axes,
    check_mask,
    check_shapes,
    checked_mask,
    checked_scale,
)
from adaattn_core.scores import check_sinks, checked_softcap

HeadIndex = tuple[int, int]
"""(sequence, head_q): what a plan, a certificate and an escalation speak about."""


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """Where one sequence lives in the (possibly packed) arrays; rows and keys are half-open."""

    index: int
    batch: int
    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def len_q(self) -> int:
        """Number of query rows."""
        return self.q_stop - self.q_start

    @property
    def len_kv(self) -> int:
        """Number of valid keys."""
        return self.kv_stop - self.kv_start


@dataclass(frozen=True, slots=True, eq=False)
class AttentionProblem:
    """A checked attention problem; inner code trusts it.

    Attributes
    ----------
    query : array, shape (batch, heads_q, len_q, dim_qk)
    key : array, shape (batch, heads_kv, len_kv, dim_qk)
    value : array, shape (batch, heads_kv, len_kv, dim_v)
        Arrays of the caller's own library, as (possibly strided) views. None where the keys
        and values are `paged`.
    mask : Mask
    scale : float
        Factor on the scores, > 0; 1/sqrt(dim_qk) unless given.
    sequences : tuple of SequenceSpan
        One per batch entry, or one per packed sequence.
    dtype : str
        Input format: ``f64``, ``f32``, ``f16`` or ``bf16``.
    device : str
        Where the arrays live, as text.
    paged : PagedKV or None
        Keys and values as pages; lengths and left padding are then theirs, and positions count
        from a sequence's first visible key.
    softcap : float or None
        Scores become ``softcap * tanh(score / softcap)`` after scaling, before the mask.
    sinks : array or None, shape (heads_q,)
        One more logit in the denominator of each head's rows; the lse counts it.
    """

    query: Any
    key: Any
    value: Any
    mask: Mask
    scale: float
    sequences: tuple[SequenceSpan, ...]
    dtype: str
    device: str
    paged: PagedKV | None = None
    softcap: float | None = None
    sinks: Any = None

    @classmethod
    def from_arrays(
        cls,
        query: Any,
        key: Any,
        value: Any,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
        layout: str = "bhsd",
        softcap: float | None = None,
        sinks: Any = None,
    ) -> AttentionProblem:
        """Check everything and build the problem.

        Parameters
        ----------
        query, key, value : array
            Four-dimensional, in `layout` ``"bhsd"`` (batch, heads, len, dim) or ``"bshd"``.
            Or `key` is a `PagedKV`, which holds the values too, and `value` is None.
        mask : Mask, optional
            Default: every key is visible.
        scale : float, optional
            Positive and finite. Default 1/sqrt(dim_qk).
        softcap : float, optional
            Positive and finite; see `adaattn_core.scores`. Default: none.
        sinks : array, optional, shape (heads_q,)
            Floating point, on the arrays' device. Default: none.

        Raises
        ------
        ShapeError
            If shapes, head counts, lengths or the mask do not fit together.
        DTypeError
            If dtypes differ or are not floating point formats of the project.
        ArgumentError
            If layout or scale is not admissible.
        """
        if not isinstance(layout, str) or layout not in ("bhsd", "bshd"):
            raise ArgumentError(
                got=f"layout={shown(layout)}",
                needed='"bhsd" (batch, heads, len, dim) or "bshd" (batch, len, heads, dim)',
                do="name the layout of your arrays",
            )
        if isinstance(key, PagedKV):
            problem = paged_problem(
                cls, query, key, value, mask=mask, scale=scale, layout=layout
            )
            return problem._with_rules(softcap, sinks)
        named = (("query", query), ("key", key), ("value", value))
        for name, x in named:
            check_axes(name, x)
        dtypes = {name: dtype_name(x) for name, x in named}
        if len(set(dtypes.values())) != 1 or dtypes["query"] not in INPUT_FORMATS:
            raise DTypeError(
                got=", ".join(f"{n}: {d}" for n, d in dtypes.items()),
                needed=f"one common dtype out of {', '.join(INPUT_FORMATS)}",
                do="cast the three arrays to one dtype; precision is chosen per head inside",
            )
        devices = {name: array_device(x) for name, x in named}
        if len(set(devices.values())) != 1:
            raise ShapeError(
                got=", ".join(f"{n} on {d}" for n, d in devices.items()),
                needed="the three arrays on one device",
                do="move them first: nothing is copied between devices silently",
            )
        query, key, value = (move_axis_layout(x, layout) for x in (query, key, value))
        check_shapes(query.shape, key.shape, value.shape)
        scale, mask = checked_scale(scale, int(query.shape[3])), checked_mask(mask)
        sequences = _sequences(mask, query.shape, key.shape)
        lengths = [(s.len_q, s.len_kv) for s in sequences]
        check_mask(mask, query.shape, key.shape, lengths)
        problem = cls(
            query, key, value, mask, scale, sequences, dtypes["query"], devices["query"]
        )
        return problem._with_rules(softcap, sinks)

    def _with_rules(self, softcap: Any, sinks: Any) -> AttentionProblem:
        if softcap is None and sinks is None:
            return self
        check_sinks(sinks, self.heads_q, self.device)
        return replace(self, softcap=checked_softcap(softcap), sinks=sinks)

    # -- sizes --------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Batch entries of the arrays (1 for packed sequences)."""
        return int(self.query.shape[0])

    @property
    def heads_q(self) -> int:
        """Query heads."""
        return int(self.query.shape[1])

    @property
    def heads_kv(self) -> int:
        """Key/value heads; divides heads_q."""
        return self._key_shape[1]

    @property
    def len_q(self) -> int:
        """Rows of the query array (all packed sequences together)."""
        return int(self.query.shape[2])

    @property
    def len_kv(self) -> int:
        """Keys of the key array, padding included; of pages, the most that a sequence sees."""
        return self._key_shape[2]

    @property
    def dim_qk(self) -> int:
        """Length of a query or key vector."""
        return int(self.query.shape[3])

    @property
    def dim_v(self) -> int:
        """Length of a value vector."""
        return self.paged.value.dim if self.paged is not None else int(self.value.shape[3])

    @property
    def _key_shape(self) -> tuple[int, ...]:
        if self.paged is not None:
            return self.paged.key_shape
        return tuple(int(n) for n in self.key.shape)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads_q // self.heads_kv

    def heads(self) -> Iterator[HeadIndex]:
        """All (sequence, head_q) pairs, sequences first."""
        for sequence in self.sequences:
            for head in range(self.heads_q):
                yield sequence.index, head

    def intervals(self, sequence: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Visible keys of each row of one sequence, relative to the sequence's first key."""
        span = self.sequences[sequence]
        return self.mask.intervals(span.len_q, span.len_kv)

    def prefix_sequences(self) -> frozenset[int]:
        """Sequences in which every row sees the first keys up to a last one, and no others."""
        return frozenset(
            s.index for s in self.sequences if self.mask.sees_prefixes(s.len_q, s.len_kv)
        )

    def visible_scores(self, sequence: int) -> int:
        """Count the scores that the structural mask leaves in one head of the sequence."""
        span = self.sequences[sequence]
        return self.mask.extent(span.len_q, span.len_kv)[0]


def paged_problem(
    cls: type[AttentionProblem],
    query: Any,
    paged: PagedKV,
    value: Any,
    *,
    mask: Mask | None,
    scale: float | None,
    layout: str,
) -> AttentionProblem:
    """Build a problem on pages; see `AttentionProblem.from_arrays`."""
    if value is not None:
        raise ArgumentError(
            got=f"a PagedKV as key, and value of type {type(value).__name__}",
            needed="no value: the pages hold it",
            do="pass attention(query, paged)",
        )
    check_axes("query", query)
    name, device, query = (
        dtype_name(query),
        array_device(query),
        move_axis_layout(query, layout),
    )
    if name != paged.dtype:
        raise DTypeError(
            got=f"query: {name}, wide pages: {paged.dtype}",
            needed="one format",
            do="check that the cache belongs to this model: newest pages are in its format",
        )
    if device != paged.device:
        raise ShapeError(
            got=f"query on {device}, pages on {paged.device}",
            needed="one device",
            do="move them first: nothing is copied between devices silently",
        )
    try:
        check_shapes(query.shape, paged.key_shape, paged.value_shape)
    except ShapeError as error:
        do = "check that the cache belongs to this model"
        raise ShapeError(got=error.got, needed=error.needed, do=do) from None
    scale, mask = checked_scale(scale, int(query.shape[3])), checked_mask(mask)
    if mask.lengths is not None or mask.cu_seqlens_q is not None or not mask.is_structural:
        raise ArgumentError(
            got=f"a mask ({mask.describe()}) over pages",
            needed="a causal or window mask, or none: the pages state lengths and padding",
            do="leave key lengths to PagedKV; gather() the pages for mask arrays",
        )
    if mask.has_window and mask.alignment != "bottom_right":
        raise ArgumentError(
            got=f"a mask aligned {mask.alignment} over pages",
            needed='alignment="bottom_right": the rows are those of the newest keys',
            do='pass Mask.causal("bottom_right")',
        )
    mask = replace(mask, lengths=paged.visible)
    sequences = _sequences(mask, query.shape, paged.key_shape)
    return cls(query, None, None, mask, scale, sequences, name, device, paged)


def _sequences(mask: Mask, q: Any, k: Any) -> tuple[SequenceSpan, ...]:
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_kv is not None:
        cu_q, cu_kv = mask.cu_seqlens_q, mask.cu_seqlens_kv
        if q[0] != 1 or cu_q[-1] != q[2] or cu_kv[-1] != k[2]:
            raise ShapeError(
                got=f"batch {q[0]}, len_q {q[2]}, len_kv {k[2]} for cu_seqlens ending at"
                f" {cu_q[-1]} and {cu_kv[-1]}",
                needed="packed arrays of batch 1 whose lengths are the last entries",
                do="concatenate the sequences along len without padding",
            )
        return tuple(
            SequenceSpan(i, 0, cu_q[i], cu_q[i + 1], cu_kv[i], cu_kv[i + 1])
            for i in range(len(cu_q) - 1)
        )
    lengths = (int(k[2]),) * int(q[0]) if mask.lengths is None else mask.lengths
    if len(lengths) != q[0] or any(not 0 <= n <= k[2] for n in lengths):
        raise ShapeError(
            got=f"key lengths {shown(lengths)} for batch {q[0]} and len_kv {k[2]}",
            needed="one length per batch entry, each between 0 and len_kv",
            do="pass the number of valid keys of every batch entry",
        )
    return tuple(SequenceSpan(b, b, 0, int(q[2]), 0, n) for b, n in enumerate(lengths))
