"""Hostile problems: a dozen small numbers and words whose ``repr`` rebuilds the arrays.

Where `adaattn_core.testing.strategies` draws what models produce and what dtypes hold, this
module draws what breaks bounds: squares that underflow, products that overflow, hidden keys far
larger than visible ones, masks filled with the lowest finite number, windows beyond integers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.mask import CausalAlignment, Mask
from adaattn_core.testing.hostile.choices import choices, mostly
from adaattn_core.testing.hostile.definition import MaskFacts, spans, visibility
from adaattn_core.testing.hostile.values import (
    BIASES,
    EXPONENTS,
    FILLS,
    HIDDEN,
    Fill,
    Shape,
    bias_values,
    fill_values,
    overwrite_hidden,
)

SINKS = {
    "": (),
    "usual": (0.5, -2.0, 3.0),
    "none": (-np.inf,),
    "mixed": (-np.inf, 0.0, 30.0),
    "wide": (80.0, -80.0, -1e4, 700.0),
}
"""Sinks of the heads, in turn; none for the empty name."""
POISONS = ("query", "key", "value", "bias")
"""Which array holds one NaN or Inf that may be seen; a bias only where there is one."""

WINDOWS = (0, 1, 2, 5, 2**31 - 1, 2**31, 2**62, sys.maxsize - 8, sys.maxsize, 2**63, 10**30)


@dataclass(frozen=True, slots=True)
class HostileMask:
    """Masks of a problem.

    Attributes
    ----------
    window : tuple of (left, right) or None
    alignment : {"top_left", "bottom_right"}
    lengths : {"full", "lengths", "ragged"}
    boolean : bool
        Whether there is a boolean mask.
    bias : str
        A kind out of `BIASES`, or "" for none.
    bias_dtype : {"f64", "f32", "f16"}
    hide : float
        Share of the entries that the arrays hide.
    blind : float
        Share of the rows from which the arrays hide every key.
    axes : tuple of bool
        Which of (batch, head, query, key) the arrays are broadcast along.
    """

    window: tuple[int | None, int | None] | None = None
    alignment: CausalAlignment = "top_left"
    lengths: str = "full"
    boolean: bool = False
    bias: str = ""
    bias_dtype: str = "f32"
    hide: float = 0.0
    blind: float = 0.0
    axes: tuple[bool, bool, bool, bool] = (True, True, False, False)


@dataclass(frozen=True, slots=True)
class HostileProblem:
    """Everything needed to build one problem, and nothing else.

    Attributes
    ----------
    batch : int
        Batch entries, or packed sequences where ``mask.lengths == "ragged"``.
    heads_kv, group, len_q, len_kv, dim_qk, dim_v : int
    dtype : {"f64", "f32", "f16", "bf16"}
    query, key, value : Fill
    hidden : str
        One of `HIDDEN`.
    poison : tuple of (str, str) or None
        One of `POISONS`, and "nan", "inf" or "-inf".
    scale : float or None
    softcap : float or None
    sinks : str
        A name in `SINKS`.
    mask : HostileMask
    layout : {"bhsd", "bshd"}
    seed : int
    """

    batch: int = 1
    heads_kv: int = 1
    group: int = 1
    len_q: int = 8
    len_kv: int = 8
    dim_qk: int = 4
    dim_v: int = 4
    dtype: str = "f32"
    query: Fill = field(default_factory=Fill)
    key: Fill = field(default_factory=Fill)
    value: Fill = field(default_factory=Fill)
    hidden: str = "same"
    poison: tuple[str, str] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: str = ""
    mask: HostileMask = field(default_factory=HostileMask)
    layout: str = "bhsd"
    seed: int = 0

    @property
    def heads_q(self) -> int:
        """Query heads."""
        return self.heads_kv * self.group

    def sinks_of_heads(self) -> NDArray[np.float32] | None:
        """Return the sinks, shape (heads_q,), or None."""
        values = SINKS[self.sinks]
        return np.resize(np.array(values, np.float32), self.heads_q) if values else None

    def build(self) -> HostileArrays:
        """Build the arrays; always the same for the same spec."""
        rng = np.random.default_rng(self.seed)
        batch = 1 if self.mask.lengths == "ragged" else self.batch
        shapes = (
            (batch, self.heads_q, self.len_q, self.dim_qk),
            (batch, self.heads_kv, self.len_kv, self.dim_qk),
            (batch, self.heads_kv, self.len_kv, self.dim_v),
        )
        direction = rng.normal(size=self.dim_qk)
        fills = (self.query, self.key, self.value)
        query, key, value = (
            fill_values(rng, fill, shape, self.dtype, direction)
            for fill, shape in zip(fills, shapes, strict=True)
        )
        mask = self._mask(rng, (batch, self.heads_q, self.len_q, self.len_kv))
        if self.poison is not None:
            name, what = self.poison
            target = {"query": query, "key": key, "value": value, "bias": mask.bias}[name]
            if target is not None and target.size:
                target.flat[int(rng.integers(target.size))] = float(what)
        hidden = ~keys_seen(mask, query.shape, key.shape)
        # Last: nothing else depends on it.
        overwrite_hidden(rng, self.hidden, hidden, key, value)
        return HostileArrays(query, key, value, mask, hidden)

    def _mask(self, rng: np.random.Generator, full: Shape) -> Mask:
        spec, mask = self.mask, Mask.none()
        if spec.window is not None:
            mask &= Mask.sliding_window(*spec.window, alignment=spec.alignment)
        if spec.lengths == "lengths":
            lengths = rng.integers(0, self.len_kv + 1, full[0])
            mask &= Mask.key_lengths(lengths.tolist())
        elif spec.lengths == "ragged":
            cuts = (_cuts(rng, n, max(self.batch, 1)) for n in (self.len_q, self.len_kv))
            mask &= Mask.ragged(*cuts)
        shape = tuple(1 if b else n for b, n in zip(spec.axes, full, strict=True))
        blind = rng.random((*shape[:3], 1)) < spec.blind
        hide = (rng.random(shape) < spec.hide) | blind
        if spec.boolean:
            mask &= Mask.boolean(~hide)
        if spec.bias:
            bias = bias_values(rng, spec.bias, shape, spec.bias_dtype)
            if not spec.boolean:
                bias = np.where(hide, bias.dtype.type(-np.inf), bias)
            mask &= Mask.additive(bias)
        return mask


@dataclass(frozen=True, slots=True, eq=False)
class HostileArrays:
    """What a `HostileProblem` builds, in (batch, heads, len, dim) order.

    Attributes
    ----------
    query, key, value : ndarray
    mask : Mask
    hidden : ndarray of bool, shape (batch, heads_kv, len_kv)
        Keys that no row of the head group sees.
    """

    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    mask: Mask
    hidden: NDArray[np.bool_]

    def content(self) -> bytes:
        """Every byte of the arrays: what a call may not change."""
        masks = (self.mask.allowed, self.mask.bias)
        arrays = (self.query, self.key, self.value, *(m for m in masks if m is not None))
        return b"".join(x.tobytes() for x in arrays)


def keys_seen(mask: Mask, query: Shape, key: Shape) -> NDArray[np.bool_]:
    """Keys that at least one row of their head group sees, shape (batch, heads_kv, len_kv)."""
    facts = MaskFacts.of(mask)
    seen = np.zeros(key[:3], bool)
    group = query[1] // key[1]
    full = (*query[:3], key[2])
    for span in spans(facts, query[0], query[2], key[2]):
        for head in range(query[1]):
            keys = seen[span.batch, head // group, span.k0 : span.k1]
            keys |= visibility(facts, span, head, full).any(axis=0)
    return seen


def _cuts(rng: np.random.Generator, total: int, parts: int) -> list[int]:
    inner = np.sort(rng.integers(0, total + 1, parts - 1))
    return [0, *inner.tolist(), total]


# -- strategies -------------------------------------------------------------------------------
@lru_cache
def fills(dtype: str) -> st.SearchStrategy[Fill]:
    """Draw values: ordinary ones half of the time."""
    hostile = [
        Fill(kind, exponent) for kind in FILLS for exponent in mostly(0, EXPONENTS[dtype], 1)
    ]
    return st.sampled_from(mostly(Fill(), hostile, 1))


_SIDES = (0, 1, 2, 5, 39, None, None, *WINDOWS)
_LENGTH_KINDS = mostly("full", ("lengths", "ragged"), 2)
_POSITIONS = choices(
    kind=(0, 0, 1, 1, 2, 0),
    left=_SIDES,
    right=_SIDES,
    alignment=("top_left", "bottom_right"),
    lengths=_LENGTH_KINDS,
    boolean=(False, False, False, True),
    bias=mostly("", BIASES, 2),
)
_ARRAYS = choices(
    bias_dtype=("f32", "f64", "f16"),
    hide=(0.0, 0.3, 0.8),
    blind=(0.0, 0.0, 0.3, 0.9, 1.0),
    axes=(
        (True, True, False, False),
        (False, False, False, False),
        (True, True, True, False),
        (True, True, False, True),
        (False, True, True, False),
    ),
)


@st.composite
def hostile_masks(draw: st.DrawFn) -> HostileMask:
    """Draw masks of every kind."""
    chosen = draw(_POSITIONS)
    kind, left, right = (chosen.pop(name) for name in ("kind", "left", "right"))
    window: tuple[int | None, int | None] | None = (None, 0) if kind == 1 else None
    if kind == 2 and (left, right) != (None, None):
        window = left, right
    arrays = draw(_ARRAYS) if chosen["boolean"] or chosen["bias"] else {}
    return HostileMask(window=window, **chosen, **arrays)


LENGTHS = (*range(1, 13), *range(1, 13), *range(41))
_SCALES = (1e-300, 5e-324, 1e-40, 1e-20, 1e-4, 10.0, 1e4, 1e10, 1e18, 1e30, 1e38, 1e300)
_RULES = choices(
    softcap=mostly(None, (50.0, 1.0, 0.01, 1e-30, 1e30), 4),
    sinks=mostly("", tuple(name for name in SINKS if name), 4),
)
_DIMS = (4, 8, 1, 2, 3, 7, 16)
_HEADS = choices(
    batch=(1, 1, 1, 2, 2, 3, 0),
    heads_kv=(1, 1, 2),
    group=(1, 1, 2, 3),
    dim_qk=_DIMS,
    dim_v=_DIMS,
    layout=("bhsd", "bhsd", "bhsd", "bhsd", "bshd"),
)


def hostile_problems(
    *,
    dtypes: Sequence[str] = ("f32", "f64", "bf16", "f16"),
    poison: bool = True,
    masks: st.SearchStrategy[HostileMask] | None = None,
    lengths: Sequence[int] = LENGTHS,
    values: st.SearchStrategy[Fill] | None = None,
    scales: Sequence[float | None] = _SCALES,
) -> st.SearchStrategy[HostileProblem]:
    """Draw a problem of at most 40 rows and keys and 16 channels: a few milliseconds' work.

    Parameters
    ----------
    dtypes : sequence of str
        Input formats to choose from.
    poison : bool
        Whether a visible number may be NaN or Inf.
    masks : strategy of HostileMask, optional
        Default: every kind.
    lengths : sequence of int
        len_q and len_kv to choose from; default 0 to 40, short ones more often.
    values : strategy of Fill, optional
        Of the three arrays; default `fills` of the dtype.
    scales : sequence of float or None
        Scales besides the default one.
    """
    places = [(name, what) for name in POISONS for what in ("nan", "inf", "-inf")]
    poisons = st.sampled_from(mostly(None, places, 7) if poison else [None])
    plain = choices(
        dtype=dtypes,
        len_q=lengths,
        len_kv=lengths,
        hidden=mostly("same", HIDDEN[1:], 1),
        scale=mostly(None, scales, 4),
    )
    seeds = st.integers(0, 2**32 - 1)
    masks = hostile_masks() if masks is None else masks

    @st.composite
    def problems(draw: st.DrawFn) -> HostileProblem:
        chosen = draw(plain)
        fill = fills(chosen["dtype"]) if values is None else values
        return HostileProblem(
            **chosen,
            **draw(_HEADS),
            **draw(_RULES),
            query=draw(fill),
            key=draw(fill),
            value=draw(fill),
            poison=draw(poisons),
            mask=draw(masks),
            seed=draw(seeds),
        )

    return problems()
