"""The one kind of memory of this backend: the most recently used values, by key."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Recent"]

_Value = TypeVar("_Value")


class Recent(Generic[_Value]):
    """Values by key, of which those that nobody used lately are forgotten.

    Reading takes no lock, since it stands on the path of every call: an entry that was read is
    marked, and the oldest entry that was not read since it was last looked at is the next to go
    (a clock, or second chance).

    Parameters
    ----------
    limit : int
        Most values kept, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: dict[Hashable, list[object]] = {}  # value, whether it was read
        self._lock = threading.Lock()  # for writers: a dict is read safely without it

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> _Value | None:
        """Return the value under `key`, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry[1] = True
        return entry[0]  # type: ignore[return-value]

    def put(self, key: Hashable, value: _Value) -> None:
        """Keep a value; another one is forgotten where there are too many."""
        with self._lock:
            while len(self._entries) >= self._limit and key not in self._entries:
                self._forget_one()
            self._entries[key] = [value, False]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def _forget_one(self) -> None:
        while True:
            key = next(iter(self._entries))
            entry = self._entries.pop(key)
            if not entry[1]:
                return
            entry[1] = False
            self._entries[key] = entry  # a second chance, behind all others
