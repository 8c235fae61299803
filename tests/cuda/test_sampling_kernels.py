"""Kernels of plans that the host drives: within their budgets, and with their twins' sizes."""

from __future__ import annotations

import pytest

from adaattn_cuda.jit.compile import Compiler
from adaattn_cuda.kernels import smxx_exact_rows, smxx_probe
from adaattn_cuda.kernels.shipped import budget
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import FROM_TABLE, is_legal, listed, padded_dim

SPECS = [
    *smxx_probe.shipped("sm_90a"),
    *smxx_exact_rows.shipped("sm_80"),
    *(tile.spec("bf16") for dim in (64, 128, 256) for _, tile in listed(dim, dim)),
]


@pytest.fixture(scope="module")
def compiler():
    with Compiler() as running:
        yield running


@pytest.mark.nvrtc
@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_compiles_within_its_budget(compiler: Compiler, spec) -> None:
    built = compiler.compile(spec)
    assert budget(spec).violations(built.resources, spec.smem_bytes) == []


def test_every_pair_of_dims_has_a_tile_for_runs() -> None:
    for dim_qk in (8, 64, 96, 128, 192, 256):
        for dim_v in (8, 64, 128, 256):
            tiles = listed(padded_dim(dim_qk), padded_dim(dim_v))
            assert tiles
            for _, tile in tiles:
                assert is_legal(tile)
                assert tile.max_sources == FROM_TABLE
                assert tile.record_bytes == 96  # the item and its first source
