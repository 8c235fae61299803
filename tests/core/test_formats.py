"""Formats: the table is consistent, and rounding is to the nearest number of the format."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.errors import ArgumentError
from adaattn_core.formats import (
    FORMATS,
    format_of_dtype,
    format_spacing,
    get_format,
    round_to_format,
    stochastic_round,
)

STORED = [n for n, f in FORMATS.items() if f.dtype is not None and f.is_float and f.bits <= 16]
NARROW = [*STORED, "tf32"]


def _numbers(name: str) -> NDArray[np.float64]:
    """Every finite number >= 0 of a format, increasing (tf32: near 1 and at the ends)."""
    if name == "tf32":
        steps = np.arange(1 << 10, 1 << 11) / 2.0**10
        exponents = [-126, -1, 0, 1, 126, 127]
        return np.concatenate([[0.0], *[steps * 2.0**e for e in exponents]])
    info = get_format(name)
    kind = np.uint16 if info.bits == 16 else np.uint8
    codes = np.arange(2 ** (info.bits - 1), dtype=kind)
    with np.errstate(invalid="ignore"):
        values = codes.view(info.dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize("name", list(FORMATS))
def test_table_is_consistent(name: str) -> None:
    info = get_format(name)
    assert info.name == name
    if info.dtype is not None:
        assert format_of_dtype(info.dtype) is info
        assert info.dtype.itemsize * 8 == info.bits
    assert info.is_quantised == (info.bits == 8)
    assert info.unit_roundoff == (2.0**-info.significand_bits if info.is_float else 0.5)


@pytest.mark.parametrize("name", NARROW)
def test_extremes_are_numbers_of_the_format(name: str) -> None:
    numbers, info = _numbers(name), get_format(name)
    assert numbers[-1] == info.max_finite
    assert info.smallest_normal in numbers


def test_unknown_name_says_what_is_known() -> None:
    with pytest.raises(ArgumentError, match="e4m3 \\(not fp8\\)"):
        get_format("fp8")
    assert format_of_dtype(np.dtype(np.int64)) is None


@pytest.mark.parametrize("name", NARROW)
def test_numbers_of_the_format_stay(name: str) -> None:
    numbers = _numbers(name)
    for x in (numbers, -numbers, numbers.astype(np.float32)):
        np.testing.assert_array_equal(round_to_format(x, name), x)


@pytest.mark.parametrize("name", NARROW)
def test_ties_and_their_neighbours(name: str) -> None:
    """Midpoints go to the even neighbour; one float64 step beside them, to the near one."""
    numbers = _numbers(name)
    low, high = numbers[:-1], numbers[1:]
    if name == "tf32":  # only neighbours within one binade
        near = high - low < 2.0**-9 * high
        low, high = low[near], high[near]
    middle = low + (high - low) / 2
    even = np.where(np.round(low / (high - low)) % 2 == 0, low, high)
    np.testing.assert_array_equal(round_to_format(middle, name), even)
    below, above = np.nextafter(middle, 0.0), np.nextafter(middle, np.inf)
    np.testing.assert_array_equal(round_to_format(below, name), low)
    np.testing.assert_array_equal(round_to_format(above, name), high)
    np.testing.assert_array_equal(round_to_format(-above, name), -high)


@pytest.mark.parametrize("name", [*NARROW, "i8"])
@given(x=st.floats(allow_nan=False, allow_infinity=False))
def test_error_is_at_most_the_unit_roundoff(name: str, x: float) -> None:
    info = get_format(name)
    rounded = float(round_to_format(np.array([x]), name)[0])
    if abs(x) >= info.max_finite:
        assert rounded == math.copysign(info.max_finite, x)
        return
    step = float(format_spacing(np.array([x]), name)[0])
    assert abs(rounded - x) <= step / 2
    if abs(x) >= info.smallest_normal and info.is_float:
        assert abs(rounded - x) <= info.unit_roundoff * abs(x)


@pytest.mark.parametrize("name", [*FORMATS])
def test_nonfinite_values_pass(name: str) -> None:
    for dtype in (np.float32, np.float64):
        x = np.array([np.nan, np.inf, -np.inf, 1.0], dtype)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(round_to_format(x, name), x)
    if name in ("i8", "e4m3", "e5m2", "bf16", "f16"):
        with np.errstate(invalid="ignore"):
            rounded = stochastic_round(x, name, np.random.default_rng(0))
        np.testing.assert_array_equal(rounded, x)


def test_wide_formats_are_casts() -> None:
    x = np.array([1 / 3, 2.0**-140])
    assert round_to_format(x, "f64").dtype == np.float64
    np.testing.assert_array_equal(round_to_format(x, "f64"), x)
    np.testing.assert_array_equal(round_to_format(x, "f32"), x.astype(np.float32))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "f16", "bf16"])
def test_spacing_is_the_gap_above(name: str) -> None:
    numbers = _numbers(name)
    np.testing.assert_array_equal(format_spacing(numbers[:-1], name), np.diff(numbers))
    below = np.nextafter(numbers[1:], 0.0)
    np.testing.assert_array_equal(format_spacing(below, name), np.diff(numbers))


def _draws(x: float, name: str, count: int) -> NDArray[Any]:
    return stochastic_round(np.full(count, x, np.float32), name, np.random.default_rng(1))


@pytest.mark.parametrize("name", ["i8", "e4m3", "e5m2", "bf16", "f16"])
@given(x=st.floats(-100.0, 100.0, width=32))
def test_stochastic_rounding_gives_a_neighbour(name: str, x: float) -> None:
    rounded = _draws(x, name, 64).astype(np.float64)
    step = float(format_spacing(np.array([x]), name)[0])
    np.testing.assert_array_equal(round_to_format(rounded, name), rounded)
    assert np.abs(rounded - x).max() < step or (rounded == x).all()


@pytest.mark.parametrize("name", ["i8", "e4m3"])
@pytest.mark.parametrize("x", [0.3, -5.7, 1e-3, 2.0**-12])
def test_stochastic_rounding_has_no_bias(name: str, x: float) -> None:
    """The mean of n draws is within 5 standard errors (false alarm below 1e-6)."""
    count = 200_000
    draws = _draws(x, name, count).astype(np.float64)
    step = float(format_spacing(np.array([x]), name)[0])
    share = (np.float32(x) / step) % 1.0
    error = step * math.sqrt(share * (1 - share) / count)
    assert abs(draws.mean() - float(np.float32(x))) <= 5 * error + 1e-12
