"""An adaptive call is replayed as one graph from its second start on; no device needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from adaattn_cuda.device import driver
from adaattn_cuda.planner import launch


class _Recorder:
    """Stands for a graph: what was recorded, and the streams that it was started on."""

    made: list[_Recorder]

    def __init__(self, enqueue: object, device: int) -> None:
        enqueue(99)  # type: ignore[operator]
        self.device, self.started = device, list[int]()
        self.made.append(self)

    def start(self, stream: int) -> None:
        self.started.append(stream)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Streams that record a graph of the caller's."""
    streams: set[int] = set()
    _Recorder.made = []
    monkeypatch.setattr(launch, "Graph", _Recorder)
    monkeypatch.setattr(launch.driver, "is_capturing", lambda stream: stream in streams)
    return streams


def test_the_second_start_records_once_and_every_later_one_replays(capturing: set[int]) -> None:
    seen: list[tuple[str, int]] = []
    steps = [(name, lambda s, name=name: seen.append((name, s))) for name in ("a", "b")]
    replay = launch._Replay(steps, device=3)
    replay.start(1)
    assert seen == [("a", 1), ("b", 1)]
    assert not _Recorder.made
    for stream in (1, 2, 1):
        replay.start(stream)
    assert seen[2:] == [("a", 99), ("b", 99)]
    (graph,) = _Recorder.made
    assert graph.device == 3
    assert graph.started == [1, 2, 1]


def test_a_caller_that_records_gets_the_launches_themselves(capturing: set[int]) -> None:
    seen: list[int] = []
    replay = launch._Replay([("a", seen.append)], device=0)
    capturing.add(7)
    replay.start(7)
    replay.start(5)  # the first that runs: kernels are loaded by it, not by a recording
    assert seen == [7, 5]
    assert not _Recorder.made
    replay.start(5)
    replay.start(7)
    assert seen == [7, 5, 99, 7]
    assert [g.started for g in _Recorder.made] == [[5]]


def test_what_is_dropped_waits_for_a_moment_that_may_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recording of the caller's would be broken by a wait or by a free."""
    seen: list[object] = []

    class _Here:
        def __init__(self, device: int) -> None:
            seen.append(("on", device))

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def wait() -> tuple[int]:
        seen.append("waited")
        return (0,)

    monkeypatch.setattr(driver, "OnDevice", _Here)
    monkeypatch.setattr(driver, "load_driver", lambda: SimpleNamespace(cuCtxSynchronize=wait))

    class _Owner: ...

    owners = [_Owner(), _Owner()]
    for i, owner in enumerate(owners):
        driver.release_with(owner, 5, seen.append, i)
    del owner
    owners.clear()
    assert not seen
    driver.release_dropped()
    assert seen[:2] == [("on", 5), "waited"]
    assert {x for x in seen if isinstance(x, int)} == {0, 1}
    assert seen.count("waited") == 1
    driver.release_dropped()
    assert seen.count("waited") == 1
