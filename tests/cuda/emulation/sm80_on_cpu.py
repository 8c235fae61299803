"""Compiles the sm80 kernel's own source for the CPU and runs it on host arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from units import library

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_cuda.device.views import ArrayView, broadcast
from adaattn_cuda.jit.spec import cpp
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.kernels.listed import RunHeads
from adaattn_cuda.kernels.task import BlockHeads, Task, addresses
from adaattn_cuda.tuning.sm80_attn_fwd import Specialisation

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype("f2"), "f32": np.dtype("f4")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(bool): "bool"}
_UNIT = """\
#include "cpu.h"
#include "adaattn/attn/sm80_attn_fwd.cuh"

using Traits = {traits};
using Params = adaattn::sm80_attn_fwd::{params};
static_assert(Traits::kSmemBytes == {smem_bytes}, "host and kernel disagree on smem");

namespace {{
Params shared_params;
}}

extern "C" int params_bytes() {{ return sizeof(Params); }}
extern "C" void run(const Params* params, int blocks) {{
    shared_params = *params;
    for (int block = 0; block < blocks; ++block) {{
        adaattn::ptx::emulation::run_block(
            block, Traits::kThreads, Traits::kSmemBytes,
            [] {{ adaattn::sm80_attn_fwd::run<Traits>(shared_params); }});
    }}
}}
"""
UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11, "tf32": 2.0**-11, "f32": 2.0**-22}
"""Relative error of one operand, the tensor core's three-product f32 included."""


class Emulator:
    """The kernel compiled for the CPU, one library per specialisation, kept in a folder."""

    def __init__(self, cxx: str, folder: Path) -> None:
        self._cxx, self._folder = cxx, folder

    def library(self, chosen: Specialisation) -> ctypes.CDLL:
        """Compile one specialisation, once."""
        arguments = ", ".join(cpp(t) for t in chosen.spec("sm_80").traits)
        traits, params = f"adaattn::sm80_attn_fwd::Traits<{arguments}>", "Params"
        if chosen.rule:
            traits = f"adaattn::softmax::Ruled<{traits}, {chosen.rule}>"
            params = "RuledParams"
        params = chosen.spec("sm_80").params or params
        unit = _UNIT.format(traits=traits, params=params, smem_bytes=chosen.smem_bytes)
        return library(self._cxx, self._folder, unit)

    def run(
        self,
        problem: AttentionProblem,
        qk: str,
        pv: str,
        *,
        arch: str = "sm_90a",
        heads: tuple[HeadIndex, ...] | None = None,
        softcap: float = 0.0,
        sinks: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32], Specialisation]:
        """Outputs (where nothing was written: the poison 7) and the specialisation that ran."""
        task, out, lse = task_of(problem, qk, pv, heads, softcap, sinks)
        chosen = sm80.specialisation(task, arch)
        library = self.library(chosen)
        arrays = (task.query, task.key, task.value, task.out, task.lse, task.allowed, task.bias)
        for params, blocks in sm80.launches(task, chosen.tile_m):
            assert library.params_bytes() == ctypes.sizeof(params)
            sm80.place(params, addresses(arrays, task.sinks))
            library.run(ctypes.byref(params), blocks)
        return out, lse, chosen

    def run_listed(
        self,
        problem: AttentionProblem,
        blocks: BlockHeads,
        qk: str,
        pv: str,
        *,
        arch: str = "sm_90a",
    ) -> tuple[NDArray[Any], NDArray[np.float32], RunHeads]:
        """Run heads with given blocks from tables of items and sources."""
        task, out, lse = task_of(problem, qk, pv, tuple(blocks.of))
        chosen = sm80.specialisation(task, arch, listed=True)
        library = self.library(chosen)
        heads = RunHeads(task, blocks, chosen.tile_m)
        work = heads.work(chosen.tile_n, None)
        params = sm80.listed_params(task, work.items.ctypes.data, work.sources.ctypes.data)
        assert library.params_bytes() == ctypes.sizeof(params)
        arrays = (task.query, task.key, task.value, task.out, task.lse, task.allowed, task.bias)
        sm80.place(params, addresses(arrays))
        library.run(ctypes.byref(params), work.grid)
        return out, lse, heads


def task_of(
    problem: AttentionProblem,
    qk: str,
    pv: str,
    heads: tuple[HeadIndex, ...] | None = None,
    softcap: float = 0.0,
    sinks: NDArray[np.float32] | None = None,
) -> tuple[Task, NDArray[Any], NDArray[np.float32]]:
    """Return a problem as a task, and its outputs, full of the poison 7."""
    rows = (problem.batch, problem.heads_q, problem.len_q)
    out = np.full((*rows, problem.dim_v), 7, problem.query.dtype)
    lse = np.full(rows, 7, np.float32)
    mask, shape = problem.mask, (*rows, problem.len_kv)
    task = Task(
        *(describe(x) for x in (problem.query, problem.key, problem.value, out, lse)),
        *(x if x is None else broadcast(describe(x), shape)
          for x in (mask.allowed, mask.bias)),
        problem.sequences, mask.left, mask.right, mask.alignment == "bottom_right",
        problem.scale, qk, pv, heads, softcap, None if sinks is None else describe(sinks),
    )  # fmt: skip
    return task, out, lse


def describe(x: NDArray[Any]) -> ArrayView:
    """View of a host array, as the kernel sees a device one."""
    strides = tuple(s // x.dtype.itemsize for s in x.strides)
    return ArrayView(x.ctypes.data, x.shape, strides, _NAMES[x.dtype], -1)


def aligned(x: NDArray[Any]) -> NDArray[Any]:
    """Copy that begins on a 16-byte boundary."""
    room = np.zeros(x.nbytes + 16, np.uint8)
    first = -room.ctypes.data % 16
    copy = room[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def problem(
    dtype: str,
    lens: tuple[int, int],
    dims: tuple[int, int] = (64, 64),
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    mask: Mask | None = None,
    seed: int = 0,
) -> AttentionProblem:
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, heads[0], lens[0], dims[0]),
        (batch, heads[1], lens[1], dims[0]),
        (batch, heads[1], lens[1], dims[1]),
    )
    arrays = [aligned(rng.standard_normal(s).astype(DTYPES[dtype])) for s in shapes]
    return AttentionProblem.from_arrays(*arrays, mask=mask)


def assert_close(out: NDArray[Any], exact: NDArray[np.float64], unit: float) -> None:
    got = out.astype(np.float64)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    error = np.linalg.norm(got[finite] - exact[finite])
    assert error <= unit * np.linalg.norm(exact[finite]), (error, unit)
