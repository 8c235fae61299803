"""Many choices in one draw: what makes an example cheap.

Hypothesis spends tens of microseconds on every draw, and a hostile call has sixty parts. One
integer read in mixed radix stands for several of them; it shrinks towards the first option of
each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

MOST = 2**24
"""Products of options that Hypothesis still draws evenly: beyond, it prefers small numbers."""


def choices(**options: Sequence[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw one of each, evenly and independently, as a dictionary.

    Raises
    ------
    ValueError
        If there are more than `MOST` combinations.
    """
    count = math.prod(len(values) for values in options.values())
    if not 0 < count <= MOST:
        raise ValueError(f"{count} combinations of {', '.join(options)}, at most {MOST}")

    def decode(number: int) -> dict[str, Any]:
        chosen = {}
        for name, values in options.items():
            number, position = divmod(number, len(values))
            chosen[name] = values[position]
        return chosen

    return st.integers(0, count - 1).map(decode)


def mostly(usual: Any, hostile: Sequence[Any], share: int) -> list[Any]:
    """Options of which the usual one stands `share` times for each of the hostile ones."""
    return [usual] * (share * len(hostile)) + list(hostile)
