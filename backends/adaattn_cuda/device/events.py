"""Marks in a stream, and the time between them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

from adaattn_cuda.device import driver

__all__ = ["Event", "start_timed"]


class Event:
    """A mark on a device; recorded once, read later."""

    def __init__(self, device: int) -> None:
        self._cuda, self._device = driver.load_driver(), device
        with driver.OnDevice(device):
            self._handle = driver.check(self._cuda.cuEventCreate(0), "an event")
        weakref.finalize(self, self._cuda.cuEventDestroy, self._handle)

    def record(self, stream: int) -> None:
        """Put the mark behind everything that the stream holds by now."""
        with driver.OnDevice(self._device):
            driver.check(self._cuda.cuEventRecord(self._handle, stream), "recording an event")

    def hold(self, stream: int) -> None:
        """Have what is put into `stream` from now on wait for the mark."""
        with driver.OnDevice(self._device):
            found = self._cuda.cuStreamWaitEvent(stream, self._handle, 0)
            driver.check(found, "waiting for an event")

    def milliseconds_since(self, earlier: Event) -> float:
        """Wait for both marks; return the time between them."""
        with driver.OnDevice(self._device):
            driver.check(self._cuda.cuEventSynchronize(self._handle), "waiting for an event")
            found = self._cuda.cuEventElapsedTime(earlier._handle, self._handle)
        return float(driver.check(found, "reading an event"))


class Timed(Protocol):
    """A step of `adaattn_cuda.device.lanes`."""

    @property
    def name(self) -> str:
        """Of the stage that it belongs to."""
        ...

    @property
    def start(self) -> Callable[[int], None]:
        """Enqueues it on a stream."""
        ...


def start_timed(
    steps: Iterable[Timed], device: int, stream: int
) -> Callable[[], dict[str, float]]:
    """Start named steps on a stream, one after the other, with a mark after each.

    Returns
    -------
    callable
        Waits, and returns the milliseconds of each name, summed where a name comes again.
    """
    marks = [Event(device)]
    names = []
    marks[0].record(stream)
    for step in steps:
        step.start(stream)
        names.append(step.name)
        marks.append(Event(device))
        marks[-1].record(stream)

    def read() -> dict[str, float]:
        out: dict[str, float] = {}
        for name, before, after in zip(names, marks, marks[1:], strict=False):
            out[name] = out.get(name, 0.0) + after.milliseconds_since(before)
        return out

    return read
