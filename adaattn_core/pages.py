"""Pages: how the keys or values of a cache are stored, in 16 bits or in 8 with scales.

A page holds `page_len` consecutive vectors of one head of one sequence. A narrow page keeps
8-bit codes and, for every channel, a centre and a reach of its own:

    vector = unit * (centre + reach * code / code_unit)

`unit` is a power of two, `centre` and `reach` are f16 numbers of at most about 1, so that a
vector is read with one rounding in float32. Channels of keys differ by much in size and hardly
change from key to key where rotary embeddings turn slowly: hence a centre, and a step per
channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import array_device, dtype_name, require_array
from adaattn_core.bounds import row_norms_upper
from adaattn_core.bounds.rounding import add_up, mul_up
from adaattn_core.checks import shown
from adaattn_core.errors import ArgumentError, DTypeError, ShapeError
from adaattn_core.formats import get_format, round_to_format

NARROW_FORMATS = ("i8", "e4m3")
"""Formats of codes."""
CODE_UNIT = {"i8": 128.0, "e4m3": 512.0}
"""Powers of two above the largest code: `reach` is then at most 1."""
_PARTS = ("unit", "centre", "reach", "residual_upper")
_F32_HALF_ULP = 2.0**-24
_LEAST_UNIT = 2.0**-100
"""Smallest unit: a page of zeros must not give 0/0, and its scales stay normal numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """A pool of pages of keys, or of values, in one format.

    Attributes
    ----------
    data : array, shape (pages, page_len, dim)
        Vectors (f64, f32, f16, bf16), or codes: int8, or e4m3 as bytes (uint8).
    format : str
        Of `data`.
    unit : array of float32, shape (pages,), or None
    centre, reach : array of float16, shape (pages, dim), or None
    residual_upper : array of float32, shape (pages,), or None
        Upper bound of ``|vector - what was stored|`` over a page's vectors. None, as the three
        before, for pages that hold the vectors themselves.
    """

    data: Any
    format: str
    unit: Any = None
    centre: Any = None
    reach: Any = None
    residual_upper: Any = None

    @classmethod
    def wide(cls, data: Any) -> Pages:
        """Pages that hold vectors as they are.

        Raises
        ------
        ShapeError, DTypeError
            If `data` is no floating point array of shape (pages, page_len, dim).
        """
        _three_axes("pages", data)
        name = dtype_name(data)
        if name == "bool":
            raise DTypeError(
                got="pages of dtype bool",
                needed="f64, f32, f16 or bf16",
                do="pass vectors, or Pages.narrow for 8-bit codes",
            )
        return cls(data, name)

    @classmethod
    def narrow(
        cls, data: Any, format: str, *, unit: Any, centre: Any, reach: Any, residual_upper: Any
    ) -> Pages:
        """Pages of 8-bit codes with their scales; see the attributes.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError
            If the format is no 8-bit one, or the parts do not fit together.
        """
        if format not in NARROW_FORMATS:
            raise ArgumentError(
                got=f"narrow pages of format {shown(format)}",
                needed=f"one of {', '.join(NARROW_FORMATS)}",
                do="keep other formats in Pages.wide",
            )
        _three_axes("pages", data)
        pages, _, dim = (int(n) for n in data.shape)
        parts = {"unit": unit, "centre": centre, "reach": reach,
                 "residual_upper": residual_upper}  # fmt: skip
        code = "int8" if format == "i8" else "uint8"
        wanted = {"data": (data, (), code), "unit": (unit, (pages,), "float32"),
                  "centre": (centre, (pages, dim), "float16"),
                  "reach": (reach, (pages, dim), "float16"),
                  "residual_upper": (residual_upper, (pages,), "float32")}  # fmt: skip
        for name, (x, shape, kind) in wanted.items():
            require_array(f"{name} of narrow pages", x)
            found = str(x.dtype).rsplit(".", 1)[-1]
            if found != kind or (shape and tuple(x.shape) != shape):
                raise ShapeError(
                    got=f"{name} of shape {tuple(x.shape)} and dtype {found}",
                    needed=f"{kind} of shape {shape or tuple(data.shape)}",
                    do="make narrow pages with quantise_pages",
                )
        devices = {array_device(x) for x in (data, *parts.values())}
        if len(devices) != 1:
            raise ShapeError(
                got=f"codes and scales on {', '.join(sorted(devices))}",
                needed="one device",
                do="move them first: nothing is copied between devices silently",
            )
        return cls(data, format, **parts)

    @property
    def is_narrow(self) -> bool:
        """Whether these are codes."""
        return self.unit is not None

    @property
    def count(self) -> int:
        """Pages in the pool."""
        return int(self.data.shape[0])

    @property
    def page_len(self) -> int:
        """Vectors of a page."""
        return int(self.data.shape[1])

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.data.shape[2])

    def arrays(self) -> Iterator[Any]:
        """Every array of the pool."""
        return (x for x in (self.data, *(getattr(self, n) for n in _PARTS)) if x is not None)

    def page_bytes(self) -> float:
        """Bytes of a page, scales and bounds included."""
        total = 0
        for x in self.arrays():
            size = 1
            for n in x.shape[1:]:
                size *= int(n)
            total += size * int(x.dtype.itemsize)
        return float(total)

    def read(self, page: int) -> NDArray[Any]:
        """Vectors of one page of host arrays, shape (page_len, dim); narrow ones as float32."""
        data = np.asarray(self.data[page])
        if not self.is_narrow:
            return data
        return dequantise(
            data, self.format, self.unit[page], self.centre[page], self.reach[page]
        )


def dequantise(
    codes: NDArray[Any], format: str, unit: Any, centre: Any, reach: Any
) -> NDArray[np.float32]:
    """Vectors that codes stand for, in float32 (one rounding), shape (..., page_len, dim)."""
    dtype = get_format(format).dtype
    assert dtype is not None
    values = (codes.view(dtype) if format == "e4m3" else codes).astype(np.float32)
    unit = np.asarray(unit, np.float32)[..., None, None]
    centre, reach = (np.asarray(x, np.float32)[..., None, :] for x in (centre, reach))
    return np.asarray(unit * (centre + reach * (values * np.float32(1 / CODE_UNIT[format]))))


def quantise_pages(vectors: NDArray[Any], format: str) -> Pages:
    """Round pages of vectors to 8 bits.

    Parameters
    ----------
    vectors : ndarray of float, shape (pages, page_len, dim)
        In host memory, finite, of magnitude below 2^100.
    format : {"i8", "e4m3"}

    Returns
    -------
    Pages
        With the exact residuals of their vectors as `residual_upper`.

    Raises
    ------
    ArgumentError
        If a vector is not finite or too large: such pages are to stay wide.
    """
    x = np.asarray(vectors)
    exact = x.astype(np.float64)
    amax = np.abs(exact).max(axis=(1, 2), initial=0.0)
    if not np.all(amax < 2.0**100):
        raise ArgumentError(
            got=f"{int(np.sum(~(amax < 2.0**100)))} pages with NaN, Inf or huge values",
            needed="finite vectors below 2^100",
            do="keep these pages in 16 bits",
        )
    narrow = exact.astype(np.float32)
    _, exponent = np.frexp(np.maximum(amax, _LEAST_UNIT).astype(np.float32))
    unit = np.ldexp(np.float32(1), exponent).astype(np.float32)
    scaled = narrow / unit[:, None, None]
    middle = np.float32(0.5) * (scaled.min(axis=1) + scaled.max(axis=1))
    centre = middle.astype(np.float16)
    moved = scaled - centre.astype(np.float32)[:, None, :]
    limit, code_unit = np.float32(get_format(format).max_finite), np.float32(CODE_UNIT[format])
    reach = _f16_up(np.abs(moved).max(axis=1) * (code_unit / limit))
    step = reach.astype(np.float32) / code_unit
    codes = round_to_format(np.clip(moved / step[:, None, :], -limit, limit), format)
    dtype = get_format(format).dtype
    assert dtype is not None
    data = codes.astype(dtype)
    data = data.view(np.uint8) if format == "e4m3" else data
    left = exact - dequantise(data, format, unit, centre, reach)
    norms = row_norms_upper(left.reshape(-1, x.shape[2])).reshape(x.shape[:2])
    # Readers that do not round as `dequantise` does are within half an ulp of the same number.
    slack = mul_up(_F32_HALF_ULP, np.sqrt(x.shape[2]) * (1 + 2.0**-40), 2.0 * unit)
    residual = np.asarray(add_up(norms.max(axis=1, initial=0.0), slack))
    return Pages(data, format, unit, centre, reach, _f32_up(residual))


def _f16_up(x: NDArray[np.float32]) -> NDArray[np.float16]:
    """Smallest positive f16 number that is no less than x in [0, 1]."""
    near = np.maximum(x.astype(np.float16), np.float16(2.0**-24))
    low = near.astype(np.float32) < x
    return (near.view(np.uint16) + low.astype(np.uint16)).view(np.float16)


def _f32_up(x: NDArray[np.float64]) -> NDArray[np.float32]:
    near = x.astype(np.float32)
    return np.where(near < x, np.nextafter(near, np.float32(np.inf)), near)


def _three_axes(name: str, x: Any) -> None:
    require_array(name, x)
    if len(x.shape) != 3 or int(x.shape[1]) < 1 or int(x.shape[2]) < 1:
        raise ShapeError(
            got=f"{name} of shape {tuple(x.shape)}",
            needed="(pages, page_len, dim), the last two at least 1",
            do="keep one page per sequence, head and run of page_len keys",
        )
