"""Compile and launch ``sm90_attn_fwd_f16`` on torch tensors, for checks and ladders.

Without the backend around it: any tile, any work records.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

from adaattn_cuda.jit.codegen import render
from adaattn_cuda.kernels.sm90_attn_fwd_f16 import DeviceMatrix, LaunchPlan, pack_params
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import Tile

KERNELS = Path(__file__).resolve().parents[1] / "kernels_cu" / "adaattn_kernels_cu"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def ok(result: tuple[Any, ...]) -> Any:
    """Unpack a driver or NVRTC result, raising on failure."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{status!r}")
    return values[0] if len(values) == 1 else values


def compile_cubin(job: tuple[Tile, str]) -> tuple[bytes, str]:
    """Cubin and compiler log of one specialisation."""
    program = ok(
        nvrtc.nvrtcCreateProgram(render(job[0].spec(job[1])).encode(), b"adaattn.cu", 0, [], [])
    )
    options = [
        b"--std=c++17",
        b"--gpu-architecture=sm_90a",
        b"-I" + str(KERNELS).encode(),
        b"--ptxas-options=-v",
    ]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    log = bytearray(ok(nvrtc.nvrtcGetProgramLogSize(program)))
    ok(nvrtc.nvrtcGetProgramLog(program, log))
    if int(status) != 0:
        raise RuntimeError(log.decode())
    cubin = bytearray(ok(nvrtc.nvrtcGetCUBINSize(program)))
    ok(nvrtc.nvrtcGetCUBIN(program, cubin))
    return bytes(cubin), log.decode()


def compile_all(
    jobs: list[tuple[Tile, str]], workers: int = 12
) -> dict[tuple[Tile, str], tuple[bytes, str]]:
    """Compile many specialisations side by side."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(compile_cubin, jobs), strict=True))


def matrix(tensor: torch.Tensor) -> DeviceMatrix:
    """Pointer, shape and strides of a (batch, heads, len, dim) tensor."""
    batch, heads, length, dim = tensor.shape
    return DeviceMatrix(tensor.data_ptr(), (batch, heads, length, dim), tensor.stride()[:3])


class Kernel:
    """A loaded specialisation."""

    def __init__(self, cubin: bytes, tile: Tile) -> None:
        self.tile = tile
        self.module = ok(driver.cuModuleLoadData(cubin))
        self.function = ok(driver.cuModuleGetFunction(self.module, b"adaattn_entry"))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        ok(driver.cuFuncSetAttribute(self.function, attribute, tile.smem_bytes))


@dataclass
class Launch:
    """A launch ready to be repeated: kernel, parameters, and everything that they point to."""

    kernel: Kernel
    plan: LaunchPlan
    out: torch.Tensor
    lse: torch.Tensor
    keep: list[Any]
    arguments: ctypes.Array[ctypes.c_void_p]

    @classmethod
    def prepare(
        cls,
        kernel: Kernel,
        plan: LaunchPlan,
        query: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        scale: float,
        bias: torch.Tensor | None = None,
    ) -> Launch:
        """Allocate poisoned outputs and pack the parameters."""
        batch, heads, len_q, _ = query.shape
        out = torch.full(
            (batch, heads, len_q, values[0].shape[3]),
            float("nan"),
            dtype=query.dtype,
            device="cuda",
        )
        lse = torch.full((batch, heads, len_q), float("nan"), device="cuda")
        records = torch.frombuffer(bytearray(plan.work.tobytes()), dtype=torch.uint8).cuda()
        block = pack_params(
            plan,
            matrix(query),
            [matrix(k) for k in keys],
            [matrix(v) for v in values],
            matrix(out),
            matrix(lse[..., None]),
            scale,
            records.data_ptr(),
            bias.data_ptr() if bias is not None else 0,
        )
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        return cls(
            kernel, plan, out, lse, [query, keys, values, records, block, bias], arguments
        )

    def __call__(self) -> torch.Tensor:
        """Enqueue on the current stream."""
        grid = self.plan.work.grid
        if grid:
            ok(
                driver.cuLaunchKernel(
                    self.kernel.function, grid, 1, 1, self.kernel.tile.threads, 1, 1,
                    self.kernel.tile.smem_bytes, torch.cuda.current_stream().cuda_stream,
                    ctypes.addressof(self.arguments), 0,
                )
            )  # fmt: skip
        return self.out
