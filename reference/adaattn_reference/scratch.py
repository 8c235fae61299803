"""Reusable buffers: one per thread, so that tiles do not allocate.

Fresh megabyte-sized arrays cost page faults, and page faults of several threads wait for each
other: without this the executor runs no faster on two threads than on one.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOCAL = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return an uninitialised array of this thread's buffer `name`.

    The next call with the same name in the same thread returns the same memory.
    """
    buffers = _LOCAL.__dict__.setdefault("buffers", {})
    size = math.prod(shape)
    key = (name, np.dtype(dtype))
    if key not in buffers or buffers[key].size < size:
        buffers[key] = np.empty(max(size, 1 << 18), dtype)
    flat: NDArray[Any] = buffers[key]
    return flat[:size].reshape(shape)
