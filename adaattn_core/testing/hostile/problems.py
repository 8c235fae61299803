"""Hostile problems: a dozen small numbers and words whose ``repr`` rebuilds the arrays.

Where `adaattn_core.testing.strategies` draws what models produce and what dtypes hold, this
module draws what breaks bounds: squares that underflow, products that overflow, hidden keys far
larger than visible ones, masks filled with the lowest finite number, windows beyond integers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.formats import FORMATS
from adaattn_core.mask import CausalAlignment, Mask
from adaattn_core.testing.hostile.definition import MaskFacts, spans, visibility

Shape = tuple[int, ...]

EXPONENTS = {
    "f64": (-320, -300, -170, -162, -80, -40, -20, -8, 8, 19, 30, 40, 80, 154, 170, 300, 307),
    "f32": (-44, -38, -30, -23, -20, -10, -4, 4, 9, 18, 19, 20, 30, 38),
    "bf16": (-40, -38, -30, -23, -20, -10, -4, 4, 9, 18, 19, 20, 30, 38),
    "f16": (-7, -6, -5, -4, -2, 2, 3, 4),
}
"""Decimal exponents of hostile magnitudes: the ends of a format, and where squares leave it."""

FILLS = ("normal", "rows", "equal", "zero", "sparse", "outlier", "largest", "aligned")
"""Kinds of values; `_fill` says what each one is."""

HIDDEN = ("same", "larger", "largest", "nan", "inf", "mixed")
"""What keys and values that no row of the head group sees hold."""

POISONS = ("query", "key", "value")
"""Which array holds one NaN or Inf that may be seen."""

BIASES = ("normal", "fill", "lowest", "huge", "shifts", "positive", "tiny", "spread")
"""Kinds of additive masks; `_bias` says what each one is."""

WINDOWS = (0, 1, 2, 5, 2**31 - 1, 2**31, 2**62, sys.maxsize - 8, sys.maxsize, 2**63, 10**30)


@dataclass(frozen=True, slots=True)
class Fill:
    """Values of one array: a kind out of `FILLS`, times ``10**exponent``."""

    kind: str = "normal"
    exponent: int = 0


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
    query: Fill = Fill()
    key: Fill = Fill()
    value: Fill = Fill()
    hidden: str = "same"
    poison: tuple[str, str] | None = None
    scale: float | None = None
    mask: HostileMask = field(default_factory=HostileMask)
    layout: str = "bhsd"
    seed: int = 0

    @property
    def heads_q(self) -> int:
        """Query heads."""
        return self.heads_kv * self.group

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
            _fill(rng, fill, shape, self.dtype, direction)
            for fill, shape in zip(fills, shapes, strict=True)
        )
        mask = self._mask(rng, (batch, self.heads_q, self.len_q, self.len_kv))
        if self.poison is not None:
            name, what = self.poison
            target = {"query": query, "key": key, "value": value}[name]
            if target.size:
                target.flat[int(rng.integers(target.size))] = float(what)
        hidden = ~keys_seen(mask, query.shape, key.shape)
        _overlay(rng, self.hidden, hidden, key, value)  # last: nothing else depends on it
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
            bias = _bias(rng, spec.bias, shape, spec.bias_dtype)
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


def _power(exponent: int) -> float:
    return float(f"1e{exponent}")  # exact rounding, and denormals, unlike 10.0**exponent


def _cast(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """To a format, saturating: what is drawn is finite."""
    info = FORMATS[dtype]
    with np.errstate(all="ignore"):
        wide = np.nan_to_num(x, nan=0.0, posinf=info.max_finite, neginf=-info.max_finite)
        return np.asarray(np.clip(wide, -info.max_finite, info.max_finite), info.dtype)


def _fill(
    rng: np.random.Generator, fill: Fill, shape: Shape, dtype: str, direction: NDArray[Any]
) -> NDArray[Any]:
    x = rng.normal(size=shape)
    size = _power(fill.exponent)
    if fill.kind == "rows":  # every vector has a magnitude of its own, between 1 and the wished
        x *= 10.0 ** (fill.exponent * rng.random((*shape[:3], 1)))
        size = 1.0
    elif fill.kind == "equal":
        x[:] = x[..., :1, :]
    elif fill.kind == "zero":
        x[:] = 0.0
    elif fill.kind == "sparse":
        x *= rng.random(shape) < 0.2
    elif fill.kind == "outlier":  # one number of the wished magnitude among ordinary ones
        if x.size:
            with np.errstate(over="ignore", under="ignore"):
                x.flat[int(rng.integers(x.size))] *= size
        size = 1.0
    elif fill.kind == "largest":
        x = np.copysign(FORMATS[dtype].max_finite, x)
        size = 1.0
    elif fill.kind == "aligned" and len(direction) == shape[-1]:  # scores as large as can be
        x = np.copysign(1.0, rng.normal(size=(*shape[:3], 1))) * direction + 1e-3 * x
    with np.errstate(over="ignore", under="ignore"):
        return _cast(x * size, dtype)


def _bias(rng: np.random.Generator, kind: str, shape: Shape, dtype: str) -> NDArray[Any]:
    info = FORMATS[dtype]
    x = rng.normal(size=shape)
    some = rng.random(shape) < 0.5
    lowest = -info.max_finite
    if kind == "fill":  # what model code hides keys with; some rows hide all of them
        x = np.where(some | (rng.random((*shape[:3], 1)) < 0.3), lowest, 0.0)
    elif kind == "lowest":
        x = np.full(shape, lowest)
    elif kind == "huge":
        x = x * (info.max_finite / 100)
    elif kind == "shifts":  # every row by a number of its own: changes nothing
        x = np.broadcast_to(rng.normal(size=(*shape[:3], 1)) * 1e4, shape)
    elif kind == "positive":
        x = np.where(some, -lowest / 4, 0.0)
    elif kind == "tiny":
        x = x * info.smallest_normal / 8
    elif kind == "spread":
        x = x * 10.0 ** rng.integers(-8, 8, shape)
    return _cast(x, dtype)


def _overlay(
    rng: np.random.Generator,
    kind: str,
    hidden: NDArray[np.bool_],
    key: NDArray[Any],
    value: NDArray[Any],
) -> None:
    """Overwrite what nobody may see."""
    count = int(hidden.sum())
    if kind == "same" or not count:
        return
    for x in (key, value):
        top = float(np.max(np.abs(x.astype(np.float64)), initial=0.0)) or 1.0
        with np.errstate(over="ignore"):
            wanted = np.full((count, x.shape[-1]), top * 1e6)
        info = next(f for f in FORMATS.values() if f.dtype == x.dtype)
        if kind == "largest":
            wanted[:] = info.max_finite
        elif kind == "mixed":
            wanted = rng.choice([np.nan, np.inf, -np.inf, info.max_finite, 0.0], wanted.shape)
        if kind in ("larger", "largest"):
            x[hidden] = _cast(np.copysign(wanted, rng.normal(size=wanted.shape)), info.name)
        else:
            x[hidden] = wanted if kind == "mixed" else float(kind)


# -- strategies -------------------------------------------------------------------------------
def _mostly(usual: Any, hostile: Sequence[Any], share: int = 3) -> st.SearchStrategy[Any]:
    """Draw the usual value `share` times as often as all the hostile ones together."""
    return st.integers(0, share).flatmap(
        lambda n: st.sampled_from(hostile) if n == share else st.just(usual)
    )


@st.composite
def fills(draw: st.DrawFn, dtype: str) -> Fill:
    """Draw values: ordinary ones half of the time."""
    if not draw(st.booleans()):
        return Fill()
    exponent = draw(_mostly(0, EXPONENTS[dtype], 1))
    return Fill(draw(st.sampled_from(FILLS)), exponent)


@st.composite
def hostile_masks(draw: st.DrawFn) -> HostileMask:
    """Draw masks of every kind."""
    kind = draw(st.integers(0, 5))
    side = st.one_of(st.none(), st.sampled_from(WINDOWS), st.integers(0, 40))
    window: tuple[int | None, int | None] | None = None
    if kind in (1, 2):
        window = (None, 0)
    elif kind == 3:
        window = draw(st.tuples(side, side).filter(lambda w: w != (None, None)))
    boolean = draw(_mostly(False, (True,), 3))
    bias = draw(_mostly("", BIASES, 2))
    if not (boolean or bias):
        return HostileMask(
            window=window,
            alignment=draw(st.sampled_from(("top_left", "bottom_right"))),
            lengths=draw(_mostly("full", ("lengths", "ragged"), 2)),
        )
    return HostileMask(
        window=window,
        alignment=draw(st.sampled_from(("top_left", "bottom_right"))),
        lengths=draw(_mostly("full", ("lengths", "ragged"), 3)),
        boolean=boolean,
        bias=bias,
        bias_dtype=draw(st.sampled_from(("f32", "f64", "f16"))) if bias else "f32",
        hide=draw(st.sampled_from((0.0, 0.3, 0.8))),
        blind=draw(st.sampled_from((0.0, 0.0, 0.3, 0.9, 1.0))),
        axes=draw(st.sampled_from(_AXES)),
    )


_AXES = (
    (True, True, False, False),
    (False, False, False, False),
    (True, True, True, False),
    (True, True, False, True),
    (False, True, True, False),
)
_LENGTHS = st.one_of(st.integers(1, 12), st.integers(0, 40))
_DIMS = st.sampled_from((4, 8, 1, 2, 3, 7, 16))
_SCALES = (1e-300, 5e-324, 1e-40, 1e-20, 1e-4, 10.0, 1e4, 1e10, 1e18, 1e30, 1e38, 1e300)


@st.composite
def hostile_problems(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("f32", "f64", "bf16", "f16"),
    poison: bool = True,
    masks: st.SearchStrategy[HostileMask] | None = None,
    lengths: st.SearchStrategy[int] | None = None,
    values: st.SearchStrategy[Fill] | None = None,
    scales: Sequence[float | None] = _SCALES,
) -> HostileProblem:
    """Draw a problem of at most 40 rows and keys and 16 channels: a few milliseconds' work.

    Parameters
    ----------
    dtypes : sequence of str
        Input formats to choose from.
    poison : bool
        Whether a visible number may be NaN or Inf.
    masks : strategy of HostileMask, optional
        Default: every kind.
    lengths : strategy of int, optional
        len_q and len_kv; default 0 to 40, short ones more often.
    values : strategy of Fill, optional
        Of the three arrays; default `fills` of the dtype.
    scales : sequence of float or None
        Scales besides the default one.
    """
    lengths = _LENGTHS if lengths is None else lengths
    dtype = draw(st.sampled_from(dtypes))
    mask = draw(hostile_masks() if masks is None else masks)
    values = fills(dtype) if values is None else values
    bad: tuple[str, str] | None = None
    if poison and draw(st.integers(0, 7)) == 7:
        bad = draw(st.tuples(st.sampled_from(POISONS), st.sampled_from(("nan", "inf", "-inf"))))
    return HostileProblem(
        batch=draw(st.sampled_from((1, 1, 2, 3, 0))),
        heads_kv=draw(st.sampled_from((1, 1, 2))),
        group=draw(st.sampled_from((1, 1, 2, 3))),
        len_q=draw(lengths),
        len_kv=draw(lengths),
        dim_qk=draw(_DIMS),
        dim_v=draw(_DIMS),
        dtype=dtype,
        query=draw(values),
        key=draw(values),
        value=draw(values),
        hidden=draw(_mostly("same", HIDDEN[1:], 1)),
        poison=bad,
        scale=draw(_mostly(None, scales, 4)),
        mask=mask,
        layout=draw(_mostly("bhsd", ("bshd",), 4)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
