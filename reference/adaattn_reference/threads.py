"""Running heads on threads, with single-threaded BLAS inside: no core is oversubscribed."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from adaattn_core.errors import ArgumentError

T = TypeVar("T")
R = TypeVar("R")

THREADS_VARIABLE = "ADAATTN_NUM_THREADS"
SMALL_SCORES = 1 << 18
"""Scores of a head below which it is not worth a thread: about a millisecond's work."""
SWITCH_SECONDS = 1e-5
"""Interpreter switch interval while heads run on several threads."""


def thread_count() -> int:
    """Return ``ADAATTN_NUM_THREADS``, or the cores that this process may use.

    Raises
    ------
    ArgumentError
        If the variable is set to anything but a positive whole number.
    """
    wanted = os.environ.get(THREADS_VARIABLE, "")
    if wanted:
        if not (wanted.isdecimal() and int(wanted) > 0):
            raise ArgumentError(
                got=f"{THREADS_VARIABLE}={wanted!r}",
                needed="a positive whole number of threads",
                do="unset it to use every core",
            )
        return int(wanted)
    return (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


def map_heads(work: Callable[[T], R], items: Iterable[T], scores: int) -> list[R]:
    """Apply `work` to every item, in order of results; exceptions propagate.

    Where the largest item has fewer `scores` than `SMALL_SCORES`, all run one after the other
    on this thread: handing them to others would take longer. Floating-point warnings are
    silenced inside: overflow and NaN are data here, and are reported in the certificate.
    """

    def quiet(item: T) -> R:
        with np.errstate(all="ignore"):
            return work(item)

    todo = list(items)
    workers = min(thread_count(), len(todo)) if scores >= SMALL_SCORES else 1
    with _blas("scipy.linalg" in sys.modules).limit(limits=1):
        if workers <= 1 or getattr(_LOCAL, "inside", False):
            return [quiet(item) for item in todo]
        with _prompt_switching():
            return _on_workers(quiet, todo, workers)


@lru_cache
def _blas(scipy_loaded: bool) -> ThreadpoolController:
    """Thread pools of the BLAS libraries: looking for them takes longer than a small call."""
    return ThreadpoolController()


_LOCAL = threading.local()
_pools: dict[int, ThreadPoolExecutor] = {}


def _on_workers(work: Callable[[T], R], todo: list[T], workers: int) -> list[R]:
    """Map over the worker threads, which outlive the call with their buffers.

    Threads of its own would make every call fault its megabytes of buffers in again. A worker
    never waits for other workers: a call from inside one runs right there.
    """
    with _switching:
        if workers not in _pools:
            _pools[workers] = ThreadPoolExecutor(workers, "adaattn", _mark_worker)
        pool = _pools[workers]
    futures = [pool.submit(work, item) for item in todo]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:  # after an exception: start no more, leave none running
            future.cancel()
        wait(futures)


def _mark_worker() -> None:
    _LOCAL.inside = True


def _forget_workers() -> None:
    """Start afresh in a forked child: it has no threads, and maybe a lock that one held."""
    global _switching
    _switching = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)

_switching = threading.Lock()
_switchers = 0
_interval = 0.0


@contextmanager
def _prompt_switching() -> Iterator[None]:
    """Let threads take the interpreter lock from each other at once.

    A thread that comes back from a NumPy call asks for the lock only after the switch
    interval, 5 ms by default, if the other thread keeps taking it again between short calls
    of its own: two threads then run hardly faster than one. The interval belongs to the
    interpreter, so the last call to leave restores it.
    """
    global _switchers, _interval
    with _switching:
        if _switchers == 0:
            _interval = sys.getswitchinterval()
            sys.setswitchinterval(min(SWITCH_SECONDS, _interval))
        _switchers += 1
    try:
        yield
    finally:
        with _switching:
            _switchers -= 1
            if _switchers == 0:
                sys.setswitchinterval(_interval)
