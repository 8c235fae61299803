"""Steps that need not wait for one another, recorded side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from adaattn_cuda.device.driver import new_stream
from adaattn_cuda.device.events import Event

__all__ = ["Step", "start_in_lanes"]


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is enqueued on a stream.

    Attributes
    ----------
    name : str
    start : callable of a stream
    lane : int
        Steps of one lane run in their order. Lane 0 is the stream that is given; where blocks
        of two lanes could begin, those of the lane with the larger number do.
    after : tuple of int
        Positions of earlier steps, of other lanes, that must be done before. Never empty for
        the first of a lane but 0.
    """

    name: str
    start: Callable[[int], None]
    lane: int = 0
    after: tuple[int, ...] = ()


@cache
def _lane_stream(device: int, lane: int) -> int:
    """Return a stream of our own that nothing but recordings ever see."""
    return int(new_stream(device, -lane))


def start_in_lanes(steps: Sequence[Step], device: int, stream: int) -> list[Event]:
    """Enqueue steps, each in its lane; `stream` waits for all lanes in the end.

    One call at a time for a device: lanes are streams that calls share.

    Returns
    -------
    list of Event
        To be held until the recording ends.
    """
    needed = {position for step in steps for position in step.after}
    last = {step.lane: position for position, step in enumerate(steps) if step.lane}
    needed.update(last.values())
    marks: dict[int, Event] = {}
    for position, step in enumerate(steps):
        own = _lane_stream(device, step.lane) if step.lane else stream
        for earlier in step.after:
            marks[earlier].hold(own)
        step.start(own)
        if position in needed:
            marks[position] = Event(device)
            marks[position].record(own)
    for position in last.values():
        marks[position].hold(stream)
    return list(marks.values())
