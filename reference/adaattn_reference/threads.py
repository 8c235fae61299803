"""Running heads on threads, with single-threaded BLAS inside: no core is oversubscribed.

The number of BLAS threads and the interpreter's switch interval belong to the process. Calls of
several threads may overlap, so the first one in sets them and the last one out restores them;
other NumPy code of the process meets single-threaded BLAS meanwhile. Since every product of a
call is computed by one BLAS thread, its bits depend neither on overlapping calls nor on how
many threads share the heads.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import OpenBLASController, ThreadpoolController

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
    with _one_blas_thread:
        if workers <= 1 or getattr(_LOCAL, "inside", False):
            return [quiet(item) for item in todo]
        with _prompt_switching:
            return _on_workers(quiet, todo, workers)


class _WhileAnyCall:
    """A setting of the process, held while any call is inside.

    Parameters
    ----------
    change : callable
        Makes the change and has the stack undo it. Called by every call that enters: only the
        first one finds something to do, as a rule.
    """

    def __init__(self, change: Callable[[ExitStack, bool], None]) -> None:
        self._change = change
        self._forget()

    def _forget(self) -> None:
        self._lock, self._inside, self._undo = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._change(self._undo, self._inside == 0)
            self._inside += 1

    def __exit__(self, *failure: Any) -> None:
        with self._lock:
            if self._inside:  # a child forked from inside a call has been reset
                self._inside -= 1
                if not self._inside:
                    self._undo.close()

    def reset(self) -> None:
        """Undo in a forked child what calls on the parent's other threads had changed."""
        undo = self._undo
        self._forget()
        undo.close()


@lru_cache
def _blas(scipy_loaded: bool) -> ThreadpoolController:
    """Thread pools of the BLAS libraries: looking for them takes longer than a small call."""
    return ThreadpoolController()


def _limit_blas(undo: ExitStack, first: bool) -> None:
    """Allow one thread; once more if SciPy has brought a BLAS of its own in the meantime."""
    global _limited
    controller = _blas("scipy.linalg" in sys.modules)
    if first or controller is not _limited:
        _take_control()
        limits = controller.limit(limits=1)  # not as a context: another thread may undo it
        undo.callback(_restore, limits)
        _limited = controller


def _restore(limits: Any) -> None:
    _take_control()
    limits.restore_original_limits()
    _take_control()


def _take_control() -> None:
    """Let this thread set the limits: newer threadpoolctl silently heeds one thread only."""
    clear = getattr(OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


def _shorten_interval(undo: ExitStack, first: bool) -> None:
    """Let threads take the interpreter lock from each other at once.

    A thread that comes back from a NumPy call asks for the lock only after the switch
    interval, 5 ms by default, if the other thread keeps taking it again between short calls
    of its own: two threads then run hardly faster than one.
    """
    if first:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, usual))
        undo.callback(sys.setswitchinterval, usual)


_limited: ThreadpoolController | None = None
_one_blas_thread = _WhileAnyCall(_limit_blas)
_prompt_switching = _WhileAnyCall(_shorten_interval)
_LOCAL = threading.local()
_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _on_workers(work: Callable[[T], R], todo: list[T], workers: int) -> list[R]:
    """Map over the worker threads, which outlive the call with their buffers.

    Threads of its own would make every call fault its megabytes of buffers in again. A worker
    never waits for other workers: a call from inside one runs right there.
    """
    with _pools_lock:
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
    global _pools_lock
    _pools_lock = threading.Lock()
    _pools.clear()
    _one_blas_thread.reset()
    _prompt_switching.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
