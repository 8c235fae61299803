"""Clocks: contenders take turns in random order, cold calls apart from warm ones."""

from __future__ import annotations

import itertools
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from adaattn_bench.devices import torch_module
from adaattn_bench.statistics import Summary

Call = Callable[[], Any]
Burst = Callable[[int], list[float]]
"""Runs a number of calls; returns milliseconds of each, or their mean if no more is known."""

EXIT_SIGNAL = 128
"""Plus a signal's number: how a command that it ended exits."""
COUNT_MAX = 40
"""Most calls of one burst, unless asked for more."""


def synchronize() -> None:
    """Wait for the GPU, where there is one that torch knows."""
    torch = torch_module()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def by_events(call: Call) -> Burst:
    """Time calls by CUDA events: from when the device reaches a call to when it is done."""
    torch: Any = torch_module()

    def burst(count: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(count)]
        for start, stop in marks:
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in marks]

    return burst


def in_turn(calls: Sequence[Call]) -> Call:
    """Call each after the other: no contender finds its inputs in a cache."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def by_host(call: Call) -> Burst:
    """Time calls by the host's clock: for CPUs."""

    def burst(count: int) -> list[float]:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            call()
            synchronize()
            times.append(1e3 * (time.perf_counter() - started))
        return times

    return burst


def by_host_together(call: Call, wait: Callable[[Any], Any]) -> Burst:
    """Time a burst as one by the host's clock: for devices that other libraries drive."""

    def burst(count: int) -> list[float]:
        synchronize()
        started = time.perf_counter()
        for _ in range(count):
            last = call()
        wait(last)
        return [1e3 * (time.perf_counter() - started) / count]

    return burst


def until_return(
    calls: Mapping[str, Call], rounds: int, repeats: int, *, drain: int = 20
) -> dict[str, float]:
    """Median microseconds until each call returns; a device works behind it.

    Parameters
    ----------
    calls : mapping of str to Call
        They take turns, since a host's own pace varies.
    rounds, repeats : int
        Turns of each, and calls of a turn, of which the first fifth is not counted.
    drain : int
        Calls after which the device is waited for, so that no launch queue fills.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for i in range(repeats):
                if i % drain == 0:
                    synchronize()
                started = time.perf_counter()
                call()
                if i >= repeats // 5:
                    times[name].append(time.perf_counter() - started)
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def whole_calls(call: Call, look: Callable[[Any], Any], repeats: int) -> dict[str, float]:
    """Milliseconds by the host's clock of single calls on an idle device.

    Returns
    -------
    dict
        ``returned``: until the call returns; ``done``: until the device is done; ``looked``:
        until `look` has read what it wants of the result (a certificate, say).
    """
    times: dict[str, list[float]] = {"returned": [], "done": [], "looked": []}
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        result = call()
        times["returned"].append(time.perf_counter() - started)
        synchronize()
        times["done"].append(time.perf_counter() - started)
        look(result)
        synchronize()
        times["looked"].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(x) for name, x in times.items()}


def replays(call: Call, count: int) -> float:
    """Median milliseconds of a CUDA graph of one call."""
    torch: Any = torch_module()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()
    burst = by_events(graph.replay)
    burst(2)
    median = statistics.median(burst(count))
    del kept
    return median


@dataclass(slots=True)
class Timings:
    """Milliseconds of every contender so far; grows round by round, so it can be cut short.

    Attributes
    ----------
    cold : dict of str to float
        First call: compiling, loading, allocating.
    warm : dict of str to list of float
    failed : dict of str to str
        What stopped others.
    """

    cold: dict[str, float] = field(default_factory=dict)
    warm: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def summaries(self) -> dict[str, Summary]:
        """Median and spread of everybody who was timed warm."""
        return {name: Summary.of(x) for name, x in self.warm.items() if x}


@contextmanager
def kept_when_interrupted(report: dict[str, Any]) -> Iterator[None]:
    """End early, with what there is: ``report["interrupted"]`` becomes the signal's number."""
    report["interrupted"] = 0
    try:
        yield
    except KeyboardInterrupt:
        report["interrupted"] = int(signal.SIGINT)
    except SystemExit as stop:  # how the command line lets other signals unwind
        code = stop.code if isinstance(stop.code, int) else 0
        if code <= EXIT_SIGNAL:
            raise
        report["interrupted"] = code - EXIT_SIGNAL


def reason(error: BaseException) -> str:
    """Say in one line why a contender left: what is missing, or its error's first sentence."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    first = " ".join(str(error).split()).partition(". ")[0]
    return f"{type(error).__name__}: {first}"[:200]


def take_turns(
    bursts: Mapping[str, Burst],
    rounds: int,
    burst_ms: float,
    *,
    timings: Timings | None = None,
    seed: int = 17,
    most: int = COUNT_MAX,
) -> Timings:
    """Time contenders in turn, in random order.

    Each burst begins with uncounted calls, so that clocks and caches are those of its own work.

    Parameters
    ----------
    bursts : mapping of str to Burst
    rounds : int
        Turns that each contender takes.
    burst_ms : float
        Aimed length of a burst; at least two calls are counted.
    timings : Timings, optional
        Filled as the rounds go on: who holds it has what there is when a run is interrupted.
        Who has a cold call there was called before; else the first call here is the cold one.
    seed : int
        Of the order of turns.
    most : int
        Most calls of one burst.
    """
    found = Timings() if timings is None else timings
    draw = random.Random(seed)
    single: dict[str, float] = {}

    def run(name: str, count: int) -> list[float]:
        try:
            return bursts[name](count)
        except Exception as error:  # whoever fails leaves the field; the others go on
            found.failed[name] = reason(error)
            found.warm.pop(name, None)
            return []

    for name in bursts:
        if name not in found.cold:
            found.cold.update((name, ms) for ms in run(name, 1)[:1])
        if name not in found.failed:
            single.update((name, ms) for ms in run(name, 1)[:1])
    for _ in range(rounds):
        for name in draw.sample(sorted(bursts), len(bursts)):
            if name in found.failed:
                continue
            count = min(max(2, int(burst_ms / max(single[name], 1e-3))), most)
            run(name, max(1, count // 3))
            found.warm.setdefault(name, []).extend(run(name, count))
    return found
