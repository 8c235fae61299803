"""What is said of many timings of one thing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Summary:
    """Timings of one contender.

    Attributes
    ----------
    median, low, high : float
        Middle, least and largest.
    first_quartile, third_quartile : float
    count : int
    """

    median: float
    low: float
    high: float
    first_quartile: float
    third_quartile: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one value."""
        ordered = sorted(values)
        return cls(
            statistics.median(ordered),
            ordered[0],
            ordered[-1],
            quantile(ordered, 0.25),
            quantile(ordered, 0.75),
            len(ordered),
        )

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the median."""
        width = self.third_quartile - self.first_quartile
        return width / self.median if self.median else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        body = {name: getattr(self, name) for name in self.__slots__}
        return body | {"spread": self.spread}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Value below which a share of sorted values lies, between neighbours by proportion."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def rounded(value: Any) -> Any:
    """Five digits of every float; None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, bool | int | float | str):
        return rounded(value.item())
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
