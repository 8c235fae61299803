"""The planning kernels' own source on a CPU: compiled once, and the sizes that it is told."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from units import library

from adaattn_cuda.planner import params as p
from adaattn_cuda.work.far_geometry import TILE

HEADS, HEADS_KV, DIM = 4, 2, 72
SLOT_ROWS = 128
PLACE = np.dtype([(name, "<i4") for name in ("head", "first", "beside", "rising")])
POISON = 7.0


def far_library(cxx: str, folder: Path) -> ctypes.CDLL:
    """Compile the kernels."""
    return library(cxx, folder, (Path(__file__).parent / "far_unit.cpp").read_text())


def rows_of(array: NDArray[Any]) -> Any:
    """(head, row, dim) of one batch entry, as ``far::Rows``."""
    head, row = (s // array.itemsize for s in array.strides[:2])
    return p.Rows(array.ctypes.data, row, head, 0)


def sizes(len_kv: int, **changed: int) -> Any:
    """Sizes of one sequence; only what the kernels read is set."""
    facts = {
        "batch": 1, "heads_q": HEADS, "heads_kv": HEADS_KV, "len_q": len_kv, "len_kv": len_kv,
        "causal": 1, "dim_qk": DIM, "dim_v": DIM, "tile": TILE, "tiles": -(-len_kv // TILE),
        "band": 256, "groups": 1, "samples": 16, "levels": 2, "judges": 1,
        "code_stride": -(-len_kv // TILE) * TILE,
    }  # fmt: skip
    made = p.Sizes()
    for name, value in (facts | changed).items():
        setattr(made, name, value)
    return made
