"""Compiles the decode kernel's own source for the CPU and runs it over host pages."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from units import library

from adaattn_core.paged import PagedKV
from adaattn_core.pages import Pages
from adaattn_core.testing.paged import PagedSpec
from adaattn_cuda.jit.spec import cpp
from adaattn_cuda.kernels.smxx_attn_decode import LOG2_E, Params
from adaattn_cuda.tuning.smxx_attn_decode import CHUNK_KEYS, COLUMNS, STATS, Specialisation

_UNIT = """\
#include "cuda_words.h"
#include "adaattn/attn/smxx_attn_decode.cuh"

using Traits = {traits};
using Params = adaattn::smxx_attn_decode::Params;
static_assert(Traits::kSmemBytes == {smem_bytes}, "host and kernel disagree on smem");

namespace {{
Params shared_params;
}}

extern "C" int params_bytes() {{ return sizeof(Params); }}
extern "C" void run(const Params* params, const int* order, int blocks) {{
    shared_params = *params;
    for (int i = 0; i < blocks; ++i) {{
        adaattn::ptx::emulation::run_block(
            order[i], Traits::kThreads, Traits::kSmemBytes,
            [] {{ adaattn::smxx_attn_decode::run<Traits>(shared_params); }});
    }}
}}
"""


class DecodeEmulator:
    """The kernel compiled for the CPU, one library per specialisation, kept in a folder."""

    def __init__(self, cxx: str, folder: Path) -> None:
        self._cxx, self._folder = cxx, folder

    def library(self, chosen: Specialisation) -> ctypes.CDLL:
        """Compile one specialisation, once."""
        arguments = ", ".join(cpp(t) for t in chosen.spec("sm_90a").traits)
        traits = f"adaattn::smxx_attn_decode::Traits<{arguments}>"
        unit = _UNIT.format(traits=traits, smem_bytes=chosen.smem_bytes)
        return library(self._cxx, self._folder, unit)

    def run(
        self, spec: PagedSpec, chosen: Specialisation, splits: int, lam: float = 0.0,
        left: int = -1, scale: float | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """Output, log-sum-exp, dropped shares (where nothing was written: 7)."""
        library = self.library(chosen)
        problem = spec.problem()
        kv: PagedKV = problem.paged
        query = np.ascontiguousarray(problem.query)
        batch, heads_q, len_q, dim = query.shape
        heads_kv = kv.table.shape[1]
        group = heads_q // heads_kv
        columns = chosen.tiles * COLUMNS
        row_tiles = -(-group * len_q // columns)
        units = batch * heads_kv * row_tiles
        out = np.full(query.shape, 7, query.dtype)
        lse = np.full(query.shape[:3], 7, np.float32)
        dropped = np.full(query.shape[:3], 7, np.float32)
        partials = np.full(units * splits * columns * (dim + STATS), np.nan, np.float32)
        arrivals = np.zeros(units, np.uint32)
        table, lengths, starts = (
            np.ascontiguousarray(x, np.int32) for x in (kv.table, kv.lengths, kv.starts)
        )
        keep = [query, partials, arrivals, table, lengths, starts]

        def address(x: Any) -> int:
            array = aligned(np.asarray(x))
            keep.append(array)
            return int(array.ctypes.data)

        p = Params(
            heads_kv=heads_kv, group=group, len_q=len_q, page_chunks=kv.page_len // CHUNK_KEYS,
            splits=splits, row_tiles=row_tiles, units=units, causal=spec.causal, left=left,
            scale_log2=(dim**-0.5 if scale is None else scale) * LOG2_E,
            skip_share=CHUNK_KEYS * lam,
        )  # fmt: skip
        p.query, p.out, p.lse = address(query), out.ctypes.data, lse.ctypes.data
        p.dropped, p.partials = dropped.ctypes.data, partials.ctypes.data
        p.arrivals = arrivals.ctypes.data
        p.key, p.value = address(kv.key.data), address(kv.value.data)
        for pool, pages in ((p.key_narrow, kv.key_narrow), (p.value_narrow, kv.value_narrow)):
            if isinstance(pages, Pages):
                pool.data, pool.unit = address(pages.data), address(pages.unit)
                pool.centre, pool.reach = address(pages.centre), address(pages.reach)
        p.table, p.lengths, p.starts = (
            table.ctypes.data,
            lengths.ctypes.data,
            starts.ctypes.data,
        )
        p.query_batch, p.query_head, p.query_row = heads_q * len_q * dim, len_q * dim, dim
        p.out_batch, p.out_head, p.out_row = heads_q * len_q * dim, len_q * dim, dim
        p.table_batch, p.table_head = heads_kv * table.shape[2], table.shape[2]
        assert library.params_bytes() == ctypes.sizeof(p)
        order = np.random.default_rng(spec.seed).permutation(units * splits).astype(np.int32)
        library.run(ctypes.byref(p), order.ctypes.data_as(ctypes.c_void_p), units * splits)
        assert not arrivals.any(), "counters are not left as they were found"
        return out, lse, dropped


def aligned(x: NDArray[Any]) -> NDArray[Any]:
    """Copy that begins on a 16-byte boundary."""
    room = np.zeros(x.nbytes + 16, np.uint8)
    first = -room.ctypes.data % 16
    copy = room[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy
