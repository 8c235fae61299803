"""Hypothesis strategies for attention problems.

What is drawn is a `ProblemSpec`: a dozen small numbers and words whose ``repr`` rebuilds the
problem by copy and paste. The arrays themselves come from a seeded generator, so drawing is
fast and shrinking acts on shapes, masks and kinds of values instead of on single floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import array_api_compat
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.arrays import move_axis_layout
from adaattn_core.formats import FORMATS
from adaattn_core.mask import CausalAlignment, Mask
from adaattn_core.problem import AttentionProblem

Send = Callable[[NDArray[Any]], Any]
"""Moves a NumPy array to where the backend under test wants it."""

VALUES = (
    "normal",
    "tiny",
    "huge",
    "constant",
    "zero_channels",
    "denormal",
    "outliers",
    "needles",
)
"""Kinds of values; `_fill` says what each one is."""

STORAGES = ("contiguous", "strided_len", "padded_dim", "bshd", "broadcast_batch")
"""How the arrays lie in memory; the last axis always has stride 1."""

MASK_KINDS = ("causal", "window", "lengths", "ragged", "boolean", "additive")
"""Names in ``Capabilities.masks``."""

_MAGNITUDES = dict.fromkeys(("f64", "f32", "bf16"), (1e-30, 1e30)) | {"f16": (1e-4, 1e4)}


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """What masks a problem has.

    Attributes
    ----------
    window : tuple of (left, right) or None
        ``(None, 0)`` is causal.
    alignment : {"top_left", "bottom_right", None}
    lengths : {"full", "lengths", "ragged"}
    arrays : tuple of str
        Any of "boolean", "additive".
    axes : tuple of bool
        Which of the axes (batch, head, query, key) of the mask arrays are broadcast.
    blind_rows : bool
        Whether the mask arrays hide every key from some rows.
    """

    window: tuple[int | None, int | None] | None = None
    alignment: CausalAlignment | None = None
    lengths: str = "full"
    arrays: tuple[str, ...] = ()
    axes: tuple[bool, bool, bool, bool] = (False, False, False, False)
    blind_rows: bool = False

    def kinds(self) -> set[str]:
        """Names in ``Capabilities.masks`` that a backend needs for this mask."""
        names = set(self.arrays)
        if self.window is not None:
            names.add("causal" if self.window == (None, 0) else "window")
        if self.lengths != "full":
            names.add(self.lengths)
        return names


@dataclass(frozen=True, slots=True)
class ProblemSpec:
    """Everything needed to build one problem, and nothing else.

    Attributes
    ----------
    batch : int
        Batch entries, or packed sequences where ``mask.lengths == "ragged"``.
    heads_kv, group : int
        Key/value heads, and query heads per key/value head.
    len_q, len_kv, dim_qk, dim_v : int
    dtype : {"f64", "f32", "f16", "bf16"}
    values : str
        One of `VALUES`.
    storage : str
        One of `STORAGES`.
    scale : float or None
    mask : MaskSpec
    poison : bool
        Whether keys that no row of the head group sees are NaN or Inf. Not with
        ``broadcast_batch``: batch entries may hide different keys.
    seed : int
    """

    batch: int = 1
    heads_kv: int = 1
    group: int = 1
    len_q: int = 8
    len_kv: int = 8
    dim_qk: int = 8
    dim_v: int = 8
    dtype: str = "f32"
    values: str = "normal"
    storage: str = "contiguous"
    scale: float | None = None
    mask: MaskSpec = field(default_factory=MaskSpec)
    poison: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.poison and self.storage == "broadcast_batch":
            raise ValueError("poison needs memory of its own for every batch entry")

    def build(self, send: Send = lambda x: x) -> AttentionProblem:
        """Build the problem; `send` moves each array before views are taken of it."""
        rng = np.random.default_rng(self.seed)
        ragged = self.mask.lengths == "ragged"
        batch = 1 if ragged else self.batch
        heads_q = self.heads_kv * self.group
        query = _fill(rng, self, (batch, heads_q, self.len_q, self.dim_qk))
        key = _fill(rng, self, (batch, self.heads_kv, self.len_kv, self.dim_qk))
        value = _fill(rng, self, (batch, self.heads_kv, self.len_kv, self.dim_v))
        if self.values == "needles" and key.size and query.size:
            _plant_needles(rng, query, key, value)
        if self.storage == "broadcast_batch":
            query, key, value = (np.broadcast_to(x[:1], x.shape) for x in (query, key, value))
        mask = self._mask(rng, (batch, heads_q, self.len_q, self.len_kv))
        arrays = [x.astype(FORMATS[self.dtype].dtype) for x in (query, key, value)]
        if self.poison:
            hidden = ~_keys_seen(AttentionProblem.from_arrays(*arrays, mask=mask))
            for x in arrays[1:]:
                x[hidden] = rng.choice([np.nan, np.inf, -np.inf], int(hidden.sum()))[:, None]
        placed = [_store(x, self.storage, send) for x in arrays]
        sent = replace(
            mask,
            allowed=None if mask.allowed is None else send(mask.allowed),
            bias=None if mask.bias is None else send(mask.bias),
        )
        return AttentionProblem.from_arrays(*placed, mask=sent, scale=self.scale)

    def _mask(self, rng: np.random.Generator, full: tuple[int, int, int, int]) -> Mask:
        spec = self.mask
        mask = Mask.none()
        if spec.window == (None, 0):
            mask &= Mask.causal(spec.alignment)
        elif spec.window is not None:
            mask &= Mask.sliding_window(*spec.window, alignment=spec.alignment)
        if spec.lengths == "lengths":
            lengths = rng.integers(0, self.len_kv + 1, self.batch)
            mask &= Mask.key_lengths(lengths.tolist())
        elif spec.lengths == "ragged":
            cuts = (_cuts(rng, n, self.batch) for n in (self.len_q, self.len_kv))
            mask &= Mask.ragged(*cuts)
        shape = tuple(1 if b else n for b, n in zip(spec.axes, full, strict=True))
        blind = rng.random((*shape[:3], 1)) < (0.2 if spec.blind_rows else 0.0)
        if "boolean" in spec.arrays:
            mask &= Mask.boolean((rng.random(shape) < 0.7) & ~blind)
        if "additive" in spec.arrays:
            bias = rng.normal(size=shape).astype(np.float32)
            hide = (rng.random(shape) < 0.2) | blind
            mask &= Mask.additive(np.where(hide, np.float32(-np.inf), bias))
        return mask


def _cuts(rng: np.random.Generator, total: int, parts: int) -> list[int]:
    inner = np.sort(rng.integers(0, total + 1, parts - 1))
    return [0, *inner.tolist(), total]


def _fill(
    rng: np.random.Generator, spec: ProblemSpec, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    x = rng.normal(size=shape)
    low, high = _MAGNITUDES[spec.dtype]
    channels = rng.random(shape[-1]) < 0.3
    if spec.values == "tiny":
        x *= low
    elif spec.values == "huge":
        x *= high / 10
    elif spec.values == "constant":
        x[:] = rng.normal(size=shape[-1])
    elif spec.values == "zero_channels":
        x[..., channels] = 0.0
    elif spec.values == "denormal":
        info = FORMATS[spec.dtype]
        x[..., channels] *= info.smallest_normal / 16
    elif spec.values == "outliers":  # N(0,1) + N(0,100) * Bernoulli(0.001), at least one
        hits = rng.random(shape) < 0.001
        if x.size:
            hits.flat[int(rng.integers(x.size))] = True
        x += hits * rng.normal(scale=10.0, size=shape)
    return x


def _plant_needles(rng: np.random.Generator, query: Any, key: Any, value: Any) -> None:
    """Give some queries one key that takes nearly all their mass, with a value of its own."""
    batch, heads_q, len_q, dim = query.shape
    group = heads_q // key.shape[1]
    for _ in range(3):
        b, h, i = (int(rng.integers(n)) for n in (batch, heads_q, len_q))
        j = int(rng.integers(key.shape[2]))
        length = np.sqrt(np.sum(query[b, h, i] ** 2)) + 1e-3
        key[b, h // group, j] = query[b, h, i] * (10.0 * np.sqrt(dim) / length**2)
        value[b, h // group, j] = 4.0 * rng.normal(size=value.shape[-1])


def _keys_seen(problem: AttentionProblem) -> NDArray[np.bool_]:
    """Keys that at least one row sees, shape (batch, heads_kv, len_kv)."""
    seen = np.zeros((problem.batch, problem.heads_kv, problem.len_kv), bool)
    full = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
    allowed = np.ones(full, bool)
    if problem.mask.allowed is not None:
        allowed = allowed & problem.mask.allowed
    if problem.mask.bias is not None:
        allowed = allowed & (problem.mask.bias != -np.inf)
    for sequence, head in problem.heads():
        span = problem.sequences[sequence]
        start, stop = problem.intervals(sequence)
        keys = np.arange(span.len_kv)
        inside = (keys >= start[:, None]) & (keys < stop[:, None])
        rows, columns = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
        inside &= allowed[span.batch, head, rows, columns]
        seen[span.batch, head // problem.group_size, columns] |= inside.any(axis=0)
    return seen


def _store(x: NDArray[Any], storage: str, send: Send) -> Any:
    """Return `x` with the wished memory layout, through basic slicing of a sent array."""
    batch, heads, length, dim = x.shape
    if storage == "strided_len":
        base = np.full((batch, heads, 2 * length, dim), 7, x.dtype)
        base[:, :, ::2] = x
        return send(base)[:, :, ::2]
    if storage == "padded_dim":
        base = np.full((batch, heads, length, dim + 8), 7, x.dtype)
        base[..., :dim] = x
        return send(base)[..., :dim]
    if storage == "bshd":
        return move_axis_layout(send(np.ascontiguousarray(x.transpose(0, 2, 1, 3))), "bshd")
    if storage == "broadcast_batch":
        one = send(np.ascontiguousarray(x[:1]))
        return array_api_compat.array_namespace(one).broadcast_to(one, x.shape)
    return send(np.ascontiguousarray(x))


# -- strategies -------------------------------------------------------------------------------
_SMALL = st.one_of(st.sampled_from((0, 1, 2, 3)), st.integers(4, 96))
_DIMS = st.one_of(st.sampled_from((1, 2, 3, 7, 8, 16)), st.integers(1, 40))


@st.composite
def mask_specs(draw: st.DrawFn, kinds: Sequence[str] = MASK_KINDS) -> MaskSpec:
    """Draw masks made of the given kinds (names in ``Capabilities.masks``)."""
    windows: list[st.SearchStrategy[Any]] = [st.none()]
    if "causal" in kinds:
        windows.append(st.just((None, 0)))
    if "window" in kinds:
        side = st.one_of(st.none(), st.integers(0, 40))
        sides = st.tuples(side, side)
        windows.append(sides.filter(lambda w: w not in ((None, 0), (None, None))))
    window = draw(st.one_of(windows))
    named: tuple[CausalAlignment, ...] = ("top_left", "bottom_right")
    arrays = [k for k in ("boolean", "additive") if k in kinds]
    chosen = draw(st.sets(st.sampled_from(arrays))) if arrays else set()
    lengths = ["full", *(k for k in ("lengths", "ragged") if k in kinds)]
    return MaskSpec(
        window=window,
        alignment=draw(st.sampled_from(named)) if window else None,
        lengths=draw(st.sampled_from(lengths)),
        arrays=tuple(sorted(chosen)),
        axes=draw(st.tuples(*[st.booleans()] * 4)) if chosen else (False,) * 4,
        blind_rows=bool(chosen) and draw(st.booleans()),
    )


@st.composite
def problem_specs(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("f64", "f32", "f16", "bf16"),
    values: Sequence[str] = VALUES,
    storages: Sequence[str] = STORAGES,
    masks: st.SearchStrategy[MaskSpec] | None = None,
    lengths: st.SearchStrategy[int] = _SMALL,
    dims: st.SearchStrategy[int] = _DIMS,
    poison: st.SearchStrategy[bool] | None = None,
) -> ProblemSpec:
    """Draw a problem.

    Parameters
    ----------
    dtypes, values, storages : sequence of str
        What to choose from.
    masks : strategy of MaskSpec, optional
        Default: every kind.
    lengths : strategy of int
        len_q and len_kv; 0 and 1 are drawn often by default.
    dims : strategy of int
        dim_qk and dim_v; odd ones by default too.
    poison : strategy of bool, optional
        Whether invisible keys hold NaN or Inf; default both.
    """
    batch, heads_kv, group = (draw(st.integers(1, most)) for most in (2, 2, 3))
    poisoned = draw(st.booleans() if poison is None else poison)
    kept = [s for s in storages if not (poisoned and s == "broadcast_batch")]
    return ProblemSpec(
        batch=batch,
        heads_kv=heads_kv,
        group=group,
        len_q=draw(lengths),
        len_kv=draw(lengths),
        dim_qk=draw(dims),
        dim_v=draw(dims),
        dtype=draw(st.sampled_from(dtypes)),
        values=draw(st.sampled_from(values)),
        storage=draw(st.sampled_from(kept)),
        scale=draw(st.one_of(st.none(), st.floats(0.01, 2.0))),
        mask=draw(mask_specs() if masks is None else masks),
        poison=poisoned,
        seed=draw(st.integers(0, 2**32 - 1)),
    )
