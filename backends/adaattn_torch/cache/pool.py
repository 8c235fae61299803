"""Pools of pages on a device: who has which page, and room that grows by doubling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray


class Pool:
    """Pages of one kind: several tensors whose first axis is the page.

    Parameters
    ----------
    make : callable
        Returns the tensors for a number of pages.
    room : int
        Pages to begin with.
    """

    def __init__(self, make: Callable[[int], tuple[torch.Tensor, ...]], room: int) -> None:
        self._make = make
        self.parts = make(max(room, 1))
        self._free = list(range(self.count - 1, -1, -1))

    @property
    def count(self) -> int:
        """Pages that there is room for."""
        return int(self.parts[0].shape[0])

    @property
    def used(self) -> int:
        """Pages that somebody has."""
        return self.count - len(self._free)

    def take(self, pages: int) -> NDArray[np.int64]:
        """Return numbers of pages that nobody has; what is on them is old."""
        if pages > len(self._free):
            self._grow(max(self.count, pages - len(self._free)))
        taken = [self._free.pop() for _ in range(pages)]
        return np.array(taken, np.int64)

    def keep(self, pages: NDArray[np.int64]) -> None:
        """Give back every page but these."""
        kept = np.zeros(self.count, bool)
        kept[pages] = True
        self._free = np.flatnonzero(~kept)[::-1].tolist()

    def _grow(self, more: int) -> None:
        old, count = self.parts, self.count
        self.parts = self._make(count + more)
        for new, kept in zip(self.parts, old, strict=True):
            new[:count] = kept
        self._free = list(range(self.count - 1, count - 1, -1)) + self._free

    def page_bytes(self) -> int:
        """Bytes of a page."""
        return sum(x[0].numel() * x.element_size() for x in self.parts)
