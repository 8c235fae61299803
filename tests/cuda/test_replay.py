"""An adaptive call is replayed as one graph from its second start on; no device needed."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from adaattn_core.errors import AdaAttnError, UnsupportedError
from adaattn_cuda.device import driver, graph, lanes
from adaattn_cuda.device.lanes import Step
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
    steps = [Step(name, lambda s, name=name: seen.append((name, s))) for name in ("a", "b")]
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
    replay = launch._Replay([Step("a", seen.append)], device=0)
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


def test_what_could_not_be_waited_for_is_kept_for_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is dropped after the wait is not given back behind it."""
    seen: list[object] = []
    status = [901]

    class _Owner: ...

    late = [_Owner()]

    def wait() -> tuple[int]:
        if status[0] == 0:
            late.clear()
        return (status[0],)

    fake = SimpleNamespace(
        cuCtxSynchronize=wait,
        cuCtxGetDevice=lambda: (0, 5),
        cuGetErrorString=lambda number: (0, b"a recording elsewhere"),
    )
    monkeypatch.setattr(driver, "load_driver", lambda: fake)
    driver.release_with(late[0], 5, seen.append, "late")
    owner = _Owner()
    driver.release_with(owner, 5, seen.append, "first")
    del owner
    with pytest.raises(AdaAttnError, match="recording elsewhere"):
        driver.release_dropped()
    assert not seen
    status[0] = 0
    driver.release_dropped()
    assert seen == ["first"]
    driver.release_dropped()
    assert seen == ["first", "late"]


def test_threads_record_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of recordings is one: a second recording on it would be refused."""
    recording: list[bool] = []

    def begin(stream: int, mode: int) -> tuple[int]:
        status = 901 if recording else 0
        recording.append(True)
        return (status,)

    def end(stream: int) -> tuple[int, str]:
        recording.clear()
        return 0, "recorded"

    fake: Any = SimpleNamespace(
        CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2),
        CUstream_flags=SimpleNamespace(CU_STREAM_NON_BLOCKING=1),
        cuStreamCreateWithPriority=lambda flag, priority: (0, 11),
        cuCtxGetDevice=lambda: (0, 5),
        cuGetErrorString=lambda number: (0, b"already recording"),
        cuThreadExchangeStreamCaptureMode=lambda mode: (0, 0),
        cuStreamBeginCapture=begin,
        cuStreamEndCapture=end,
        cuGraphInstantiate=lambda recorded, flags: (0, "ready"),
        cuGraphDestroy=lambda recorded: (0,),
        cuGraphLaunch=lambda ready, stream: (0,),
        cuGraphExecDestroy=lambda ready: (0,),
    )
    for module in (driver, graph):
        monkeypatch.setattr(module, "load_driver", lambda: fake)
    monkeypatch.setattr(graph, "_recording_stream", lambda device: 11)
    monkeypatch.setattr(graph, "release_with", lambda *_: None)
    made: list[graph.Graph] = []

    def work() -> None:
        made.append(graph.Graph(lambda stream: time.sleep(0.01), 5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4


def test_tables_are_not_made_while_the_caller_records(
    monkeypatch: pytest.MonkeyPatch, capturing: set[int]
) -> None:
    capturing.add(7)
    nothing: Any = None
    with pytest.raises(UnsupportedError, match="CUDA-graph capture"):
        launch.FarLaunch(nothing, "bf16", 1.0, nothing, nothing, 0, 0, 7)


def test_what_a_caller_records_keeps_the_tables(
    capturing: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's graph reads them after every cache has forgotten the launch."""
    held: set[launch.FarLaunch] = set()
    monkeypatch.setattr(launch, "_RECORDED", held)
    far = object.__new__(launch.FarLaunch)
    replay = launch._Replay([Step("a", lambda stream: None)], device=0)
    monkeypatch.setattr(launch.FarLaunch, "_replay", lambda *_: replay)
    arrays = SimpleNamespace()
    far.start(arrays, 0, 0, 5)  # type: ignore[arg-type]
    assert not held
    capturing.add(7)
    far.start(arrays, 0, 0, 7)  # type: ignore[arg-type]
    assert held == {far}


def test_lanes_wait_for_what_they_need_and_the_main_one_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []

    class _Mark:
        def __init__(self, device: int) -> None:
            assert device == 4

        def record(self, stream: int) -> None:
            self.at = len(seen) - 1

        def hold(self, stream: int) -> None:
            seen.append((stream, "waits for", seen[self.at]))

    monkeypatch.setattr(lanes, "Event", _Mark)
    monkeypatch.setattr(lanes, "_lane_stream", lambda device, lane: 100 + lane)

    def step(name: str, lane: int = 0, *after: int) -> Step:
        return Step(name, lambda stream: seen.append((stream, name)), lane, after)

    steps = [step("a"), step("b", 2, 0), step("c"), step("d", 2), step("e", 1, 2)]
    held = lanes.start_in_lanes([*steps, step("f", 0, 3)], 4, 9)
    assert seen == [
        (9, "a"), (102, "waits for", (9, "a")), (102, "b"), (9, "c"), (102, "d"),
        (101, "waits for", (9, "c")), (101, "e"), (9, "waits for", (102, "d")), (9, "f"),
        (9, "waits for", (102, "d")), (9, "waits for", (101, "e")),
    ]  # fmt: skip
    assert len(held) == 4
