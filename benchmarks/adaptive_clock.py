"""Timing for gpu_adaptive.py: contenders take turns, medians are compared."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
Burst = Callable[[int], list[float]]
"""Runs a number of calls; returns milliseconds of each (or their mean)."""

COUNT_MAX = 40
"""Most calls of one burst."""


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def by_events(call: Call) -> Burst:
    """Time calls by CUDA events: from when the device reaches a call to when it is done."""

    def burst(count: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(count)]
        for start, stop in marks:
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in marks]

    return burst


def by_host(call: Call, wait: Callable[[Any], Any] = lambda _: synchronize()) -> Burst:
    """Time a burst by the host's clock: for other libraries' streams, and for CPUs."""

    def burst(count: int) -> list[float]:
        synchronize()
        started = time.perf_counter()
        for _ in range(count):
            last = call()
        wait(last)
        return [(time.perf_counter() - started) / count * 1e3]

    return burst


def side_by_side(
    bursts: dict[str, Burst], rounds: int, burst_ms: float
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Time contenders in turn, in random order.

    The first call of each (compiling, loading, allocating) is not counted, and each burst
    begins with uncounted calls, so that clocks and caches are those of its own work.

    Returns
    -------
    dict, dict
        Median, least and largest milliseconds of each; and what stopped the others.
    """
    single: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in bursts}
    failed: dict[str, str] = {}

    def run(name: str, count: int) -> list[float]:
        try:
            return bursts[name](count)
        except Exception as error:  # whoever fails leaves the field; the others go on
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            return [float("nan")]

    for name in bursts:
        run(name, 1)
        single[name] = run(name, 1)[0]
    for _ in range(rounds):
        for name in random.sample(sorted(bursts), len(bursts)):
            if name in failed:
                continue
            count = min(max(2, int(burst_ms / max(single[name], 1e-3))), COUNT_MAX)
            run(name, max(1, count // 3))
            times[name] += run(name, count)
    kept = {name: x for name, x in times.items() if name not in failed}
    medians = {
        name: {"median": statistics.median(x), "low": min(x), "high": max(x)}
        for name, x in kept.items()
    }
    return medians, failed


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
    return {name: statistics.median(x) * 1e3 for name, x in times.items()}


def replays(call: Call, count: int) -> float:
    """Median milliseconds of a CUDA graph of one call."""
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
