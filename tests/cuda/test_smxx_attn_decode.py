"""Decoding over pages, what can be held without a device: sizes, splits, resources."""

from __future__ import annotations

import ctypes
import math

import pytest

from adaattn_cuda.jit.compile import build
from adaattn_cuda.kernels import smxx_attn_decode as decode
from adaattn_cuda.kernels.shipped import budget
from adaattn_cuda.kernels.smxx_attn_decode import _ADDRESSES, Params, shipped
from adaattn_cuda.tuning.sm80_attn_fwd import ARCHITECTURES
from adaattn_cuda.tuning.smxx_attn_decode import (
    COLUMNS,
    has_copy_engine,
    specialise,
    splits_for,
)


def test_what_a_start_changes_is_the_first_of_the_parameters() -> None:
    assert _ADDRESSES.size == Params.query_batch.offset


def test_starts_on_a_stream_share_room_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        def __init__(self, data: bytes, device: int) -> None:
            self.size_bytes = len(data)

    monkeypatch.setattr(decode.driver, "DeviceTable", Table)
    monkeypatch.setattr(decode, "_partials", {})
    first = decode._partials_of(0, 7, 100)
    assert decode._partials_of(0, 7, 60) is first
    larger = decode._partials_of(0, 7, 120)
    assert larger.size_bytes == 200
    assert decode._partials_of(0, 7, 190) is larger
    assert decode._partials_of(0, 8, 60) not in (first, larger), "another stream's"


def test_parameters_have_the_kernels_size() -> None:
    assert ctypes.sizeof(Params) == 264  # decode_params.cuh asserts the same


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("packed", [1, 4, 8, 9, 64])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_specialisations_are_legal(arch: str, dim: int, packed: int, skip: bool) -> None:
    most = 1024 * ARCHITECTURES[arch][0]
    s = specialise("bf16", "i8", "i8", dim, packed, skip, most, has_copy_engine(arch))
    assert s.bulk <= has_copy_engine(arch)
    if arch in ("sm_90a", "sm_100"):
        assert s.bulk
    assert s.stages >= (1 if skip else dim // 64) + s.bulk, "a ring with too few slots"
    assert s.smem_bytes <= most
    assert s.tiles * COLUMNS >= min(packed, COLUMNS)


@pytest.mark.parametrize("units", [1, 8, 128, 1000])
@pytest.mark.parametrize("chunks", [0, 1, 7, 128, 2048])
def test_splits_share_the_keys(units: int, chunks: int) -> None:
    splits = splits_for(units, chunks, 132)
    assert 1 <= splits <= max(chunks, 1)
    if units * chunks >= 132:
        busy = units * splits / (132 * math.ceil(units * splits / 132))
        assert busy > 0.5, "half of the device is idle"


def test_shipped_are_distinct() -> None:
    specs = shipped("sm_90a")
    assert len(set(specs)) == len(specs) >= 4


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_budget_is_kept(arch: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ADAATTN_QUIET", "1")
    spec = specialise("bf16", "i8", "i8", 64, 1, False, 99 * 1024, has_copy_engine(arch)).spec(
        arch
    )
    built = build(spec)
    assert budget(spec).violations(built.resources, spec.smem_bytes) == []
