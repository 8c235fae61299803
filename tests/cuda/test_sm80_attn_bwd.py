"""Backward kernels compile within their budgets, and every problem has a tile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from adaattn_cuda.jit.compile import Compiler
from adaattn_cuda.jit.spec import SOFTCAP, KernelSpec
from adaattn_cuda.kernels import smxx_attn_bwd_sinks as sinks
from adaattn_cuda.kernels.shipped import budget
from adaattn_cuda.kernels.sm80_attn_bwd import DIM_LIMITS
from adaattn_cuda.tuning import sm80_attn_bwd as tuning
from adaattn_cuda.tuning import sm90_attn_bwd_f16 as sm90
from adaattn_cuda.tuning.sm80_attn_fwd import ARCHITECTURES

COMPILED = [
    tuning.specialise("sm_86", "bf16", "bf16", "query", 256, 256).spec("sm_86"),
    tuning.specialise("sm_80", "bf16", "bf16", "key_value", 128, 128).spec("sm_80"),
    tuning.specialise("sm_90a", "f32", "f32", "value", 192, 192).spec("sm_90a"),
    tuning.specialise("sm_90a", "bf16", "bf16", "query", 256, 256, rule=SOFTCAP).spec("sm_90a"),
    tuning.rows_spec("bf16", True, "sm_90a"),
    *sinks.shipped("sm_90a"),
    *(sm90.choose("bf16", dim, dim, in_order=dim == 128).spec for dim in (64, 128)),
    sm90.choose("bf16", 128, 128).finish,
]


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as running:
        yield running


@pytest.mark.nvrtc
@pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)
def test_compiles_within_its_budget(compiler: Compiler, spec: KernelSpec) -> None:
    built = compiler.compile(spec)
    assert budget(spec).violations(built.resources, spec.smem_bytes) == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_problem_has_a_legal_tile(arch: str) -> None:
    for name, most in DIM_LIMITS.items():
        dims = (40, 128, most)
        for dim_qk, dim_v in itertools.product(dims, dims):
            for array_mask, vectorised in itertools.product((False, True), repeat=2):
                for output in tuning.outputs(name, dim_qk, dim_v):
                    chosen = tuning.specialise(
                        arch, name, name, output, dim_qk, dim_v,
                        array_mask=array_mask, vectorised=vectorised,
                    )  # fmt: skip
                    assert chosen.smem_bytes <= ARCHITECTURES[arch][0] * 1024


def test_gradients_of_long_rows_take_a_launch_each() -> None:
    assert tuning.outputs("bf16", 128, 128) == ("statistics", "query", "key_value")
    assert tuning.outputs("bf16", 192, 128) == ("statistics", "query", "key", "value")
    assert tuning.outputs("f32", 128, 128) == ("statistics", "query", "key", "value")
