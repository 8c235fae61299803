"""Checks of single values: whole numbers, real numbers, words; nothing is rounded or parsed."""

from __future__ import annotations

import math
import operator
from typing import Any

from adaattn_core.errors import AdaAttnError, ArgumentError, printable

INT32_MAX = 2**31 - 1
"""Largest size or position in a plan: products of two fit in 64 bits."""


def whole(
    name: str,
    value: Any,
    least: int = 0,
    most: int = INT32_MAX,
    error: type[AdaAttnError] = ArgumentError,
) -> int:
    """Return `value` as an int.

    Parameters
    ----------
    name : str
        What the value is, for the message.
    value : int or integer of another library
        Booleans, floats and text are refused.
    least, most : int
        Its range, both ends included.
    error : type
        What is raised.
    """
    if type(value) is int and least <= value <= most:
        return value
    number = _integer(value)
    if number is None or not least <= number <= most:
        raise error(
            got=f"{name}={shown(value)}",
            needed=f"a whole number from {least} to {most}",
            do=f"correct {name}",
        )
    return number


def real(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    open_ends: bool = False,
    error: type[AdaAttnError] = ArgumentError,
    do: str = "",
) -> float:
    """Return `value` as a float; NaN, booleans and text are refused.

    Parameters
    ----------
    name : str
        What the value is, for the message.
    value : float or number of another library
    least, most : float
        Its range; infinity is a number only where `most` is.
    open_ends : bool
        Whether the ends are outside.
    error : type
        What is raised.
    do : str
        Its last line, where there is more to say than to correct it.
    """
    if type(value) is float:
        number: float | None = value
    else:
        number = _float(value)
    inside = number is not None and (
        least < number < most if open_ends else least <= number <= most
    )
    if number is None or not inside:
        ends = "()" if open_ends else "[]"
        inside_what = f" in {ends[0]}{least:g}, {most:g}{ends[1]}"
        raise error(
            got=f"{name}={shown(value)}",
            needed="a number" + (inside_what if (least, most) != (-math.inf, math.inf) else ""),
            do=do or f"correct {name}",
        )
    return number


def word(
    name: str,
    value: Any,
    options: tuple[str, ...] | None = None,
    error: type[AdaAttnError] = ArgumentError,
) -> str:
    """Return `value`, which must be text (out of `options`, where they are given)."""
    if not isinstance(value, str) or (options is not None and value not in options):
        raise error(
            got=f"{name}={shown(value)}",
            needed="text" if options is None else f"one of {', '.join(options)}",
            do=f"correct {name}",
        )
    return value


def truth(name: str, value: Any, error: type[AdaAttnError] = ArgumentError) -> bool:
    """Return `value` as a bool; only booleans are taken."""
    if not is_truth(value):
        raise error(got=f"{name}={shown(value)}", needed="True or False", do=f"correct {name}")
    return bool(value)


def is_truth(value: Any) -> bool:
    """Whether it is a boolean, Python's own or NumPy's (``bool_`` before NumPy 2)."""
    return type(value).__name__ in ("bool", "bool_")


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object (an `object_pairs_hook`); names that come twice are a ValueError."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return fields


def _integer(value: Any) -> int | None:
    if is_truth(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _float(value: Any) -> float | None:
    if is_truth(value) or getattr(value, "ndim", 0) != 0:
        return None
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def shown(value: Any) -> str:
    """Short text of any value, on one line and without control characters."""
    try:
        text = repr(value)
    except Exception:  # whatever a caller's object does: its error must not hide ours
        text = f"a {type(value).__name__}"
    text = printable(text)
    return text if len(text) <= 60 else text[:57] + "..."
