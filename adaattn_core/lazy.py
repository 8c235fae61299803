"""Figures that a device knows later: read when somebody looks, once, and then kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from adaattn_core.problem import HeadIndex

__all__ = ["Later", "LazyHeads", "LazyNotes"]

_Value = TypeVar("_Value")


class Later(Generic[_Value]):
    """A value that is made when it is first asked for.

    Parameters
    ----------
    make : callable
        Called without arguments, once; again only where threads ask at the same moment.
    """

    __slots__ = ("_make", "_value")

    def __init__(self, make: Callable[[], _Value]) -> None:
        self._make: Callable[[], _Value] | None = make
        self._value: _Value | None = None

    def __call__(self) -> _Value:
        """Return the value, waiting for it the first time."""
        make = self._make  # another thread may be done, and forget it, at any moment
        if make is not None:
            self._value = make()
            self._make = None
        return self._value  # type: ignore[return-value]


class LazyHeads(Mapping[HeadIndex, _Value]):
    """Something about every head, made when the first of them is looked at.

    Who does not look does not wait for the device.

    Parameters
    ----------
    make : callable
        Returns the values of all heads; see `Later`.
    """

    def __init__(self, make: Callable[[], Mapping[HeadIndex, _Value]]) -> None:
        self._heads = Later(make)

    def made(self) -> Mapping[HeadIndex, _Value]:
        """Return what was made, waiting for it the first time."""
        return self._heads()

    def __getitem__(self, index: HeadIndex) -> _Value:
        return self._heads()[index]

    def __iter__(self) -> Iterator[HeadIndex]:
        return iter(self._heads())

    def __len__(self) -> int:
        return len(self._heads())


class LazyNotes(Mapping[str, Any]):
    """A mapping of which some values are `Later`: resolved as they are read."""

    def __init__(self, notes: Mapping[str, Any]) -> None:
        self._notes = dict(notes)

    def __getitem__(self, name: str) -> Any:
        value = self._notes[name]
        return value() if isinstance(value, Later) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._notes)

    def __len__(self) -> int:
        return len(self._notes)

    def __repr__(self) -> str:
        return repr(dict(self))
