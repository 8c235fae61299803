"""Running heads on threads, with single-threaded BLAS inside: no core is oversubscribed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from adaattn_core.errors import ArgumentError

T = TypeVar("T")
R = TypeVar("R")

THREADS_VARIABLE = "ADAATTN_NUM_THREADS"


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


def map_heads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply `work` to every item, in order of results; exceptions propagate.

    Floating-point warnings are silenced inside: overflow and NaN are data here, and are
    reported in the certificate.
    """

    def quiet(item: T) -> R:
        with np.errstate(all="ignore"):
            return work(item)

    todo = list(items)
    workers = min(thread_count(), len(todo))
    with threadpool_limits(1):
        if workers <= 1:
            return [quiet(item) for item in todo]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(quiet, todo))
