"""CUDA graphs: a sequence of launches recorded once, started with one call of the driver."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from adaattn_cuda.device.driver import OnDevice, check, load_driver, new_stream, release_with

__all__ = ["Graph"]


_recording = threading.Lock()
"""One recording at a time: all of a device's go through one stream."""


@cache
def _recording_stream(device: int) -> Any:
    """Return a stream of our own that nothing but recordings ever see."""
    return new_stream(device)


class Graph:
    """What a function enqueues on a stream, ready to be started on any stream.

    The recording launches nothing. Addresses and parameters are those of the recording; it
    does not keep alive what lies there. Recordings of several threads wait for one another;
    starts of one graph must not come from two threads at once.

    Parameters
    ----------
    enqueue : callable of a stream
        May launch kernels that ran before and fill memory; it allocates nothing. What it
        returns is held until the recording has ended.
    device : int

    Raises
    ------
    AdaAttnError
        If the driver refuses to record or to prepare it.
    """

    def __init__(self, enqueue: Callable[[int], object], device: int) -> None:
        cuda = load_driver()
        self._device, self._launch = device, cuda.cuGraphLaunch
        # Relaxed: what other threads and streams do meanwhile is no error, nor is this to them.
        relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        with _recording, OnDevice(device):
            stream = _recording_stream(device)
            before = check(cuda.cuThreadExchangeStreamCaptureMode(relaxed), "recording a graph")
            try:
                check(cuda.cuStreamBeginCapture(stream, relaxed), "recording a graph")
                try:
                    held = enqueue(int(stream))
                finally:
                    recorded = cuda.cuStreamEndCapture(stream)
                graph = check(recorded, "recording a graph")
                del held
                try:
                    self._graph = check(cuda.cuGraphInstantiate(graph, 0), "preparing a graph")
                finally:
                    cuda.cuGraphDestroy(graph)
            finally:
                cuda.cuThreadExchangeStreamCaptureMode(before)
        release_with(self, device, cuda.cuGraphExecDestroy, self._graph)

    def start(self, stream: int) -> None:
        """Enqueue it, in the order of `stream` and behind its own last start."""
        with OnDevice(self._device):
            check(self._launch(self._graph, stream), "starting a graph")
