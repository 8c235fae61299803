"""Hostile numbers: what a kind of values, of additive masks and of hidden keys means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.formats import FORMATS

Shape = tuple[int, ...]

EXPONENTS = {
    "f64": (-320, -300, -170, -162, -80, -40, -20, -8, 8, 19, 30, 40, 80, 154, 170, 300, 307),
    "f32": (-44, -38, -30, -23, -20, -10, -4, 4, 9, 18, 19, 20, 30, 38),
    "bf16": (-40, -38, -30, -23, -20, -10, -4, 4, 9, 18, 19, 20, 30, 38),
    "f16": (-7, -6, -5, -4, -2, 2, 3, 4),
}
"""Decimal exponents of hostile magnitudes: the ends of a format, and where squares leave it."""

FILLS = ("normal", "rows", "equal", "zero", "sparse", "outlier", "largest", "aligned")
"""Kinds of values; `fill_values` says what each one is."""

HIDDEN = ("same", "larger", "largest", "nan", "inf", "mixed")
"""What keys and values that no row of the head group sees hold."""

BIASES = ("normal", "fill", "lowest", "huge", "shifts", "positive", "tiny", "spread")
"""Kinds of additive masks; `bias_values` says what each one is."""


@dataclass(frozen=True, slots=True)
class Fill:
    """Values of one array: a kind out of `FILLS`, times ``10**exponent``."""

    kind: str = "normal"
    exponent: int = 0


def _power(exponent: int) -> float:
    return float(f"1e{exponent}")  # exact rounding, and denormals, unlike 10.0**exponent


def _cast(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """To a format, saturating: what is drawn is finite."""
    info = FORMATS[dtype]
    with np.errstate(all="ignore"):
        wide = np.nan_to_num(x, nan=0.0, posinf=info.max_finite, neginf=-info.max_finite)
        return np.asarray(np.clip(wide, -info.max_finite, info.max_finite), info.dtype)


def fill_values(
    rng: np.random.Generator, fill: Fill, shape: Shape, dtype: str, direction: NDArray[Any]
) -> NDArray[Any]:
    """Return values of a kind in a format; ``"aligned"`` ones lie along `direction`."""
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


def bias_values(rng: np.random.Generator, kind: str, shape: Shape, dtype: str) -> NDArray[Any]:
    """Return an additive mask of a kind in a format, every number finite."""
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


def overwrite_hidden(
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
