"""The Hopper kernel compiles within its budget; its tile choice and parameters are right."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

import adaattn_kernels_cu as kernels
from adaattn_core.errors import AdaAttnError, ArgumentError
from adaattn_core.problem import SequenceSpan
from adaattn_cuda.device.launch import DeviceWork, upload
from adaattn_cuda.device.views import ArrayView, contiguous
from adaattn_cuda.jit.compile import Compiler
from adaattn_cuda.jit.resources import parse_budget
from adaattn_cuda.jit.spec import SINKS, SOFTCAP
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import (
    Tile,
    candidates,
    choose,
    is_legal,
    padded_dim,
    shipped,
)
from adaattn_cuda.work.geometry import UNLIMITED, Geometry
from adaattn_cuda.work.records import (
    ITEM,
    MASK_INTERVAL,
    MASK_NONE,
    NO_BIAS,
    NO_PARTIAL,
    SOURCE,
    TENSORS,
    work_list,
)

BLOCKS = 132

# Every padded dim as dim_qk and as dim_v, both formats, and switches that no tuned tile has.
COMPILED = [
    *[(tile, "bf16") for dim in (64, 128, 256) for _, tile in candidates(dim, dim)],
    (candidates(192, 128)[0][1], "f16"),
    (candidates(64, 256)[0][1], "bf16"),
    (candidates(256, 192)[0][1], "f16"),
    *[(candidates(dim, dim, SOFTCAP | SINKS)[0][1], "bf16") for dim in (64, 128, 256)],
    (candidates(64, 64, SINKS)[0][1], "f16"),
    (Tile(128, 128, 2, 128, ping_pong=True), "f16"),
    (Tile(128, 128, 2, 128, role=1, max_sources=3), "bf16"),
    (Tile(64, 64, 2, 128, query_stages=2, role=1, max_sources=3, skip=True), "f16"),
]


@pytest.fixture(scope="module")
def compiler():
    with Compiler() as running:
        yield running


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("tile", "dtype"),
    COMPILED,
    ids=[f"{t.dim_qk}-{t.dim_v}-{t.consumers}x{t.tile_n}-{t.rule}-{d}" for t, d in COMPILED],
)
def test_compiles_within_its_budget(compiler: Compiler, tile: Tile, dtype: str) -> None:
    """Also holds the host's shared-memory arithmetic to the kernel's, by a static_assert."""
    spec = tile.spec(dtype)
    built = compiler.compile(spec)
    budget = parse_budget(kernels.source(spec.header))
    assert budget.terms
    assert budget.violations(built.resources, spec.smem_bytes) == []


@pytest.mark.nvrtc
def test_layouts_match_the_headers(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A structure whose twin drifted does not compile."""
    lines = [
        f"static_assert(__builtin_offsetof(adaattn::AttentionParams, {name}) =="
        f" {getattr(sm90.Params, name).offset});"
        for name, _ in sm90.Params._fields_
        if name != "padding"
    ]
    lines.append(
        f"static_assert(sizeof(adaattn::AttentionParams) == {ctypes.sizeof(sm90.Params)});"
    )
    lines += [
        f"static_assert(adaattn::softmax::kSlackLog2 == {sm90.SLACK_LOG2});",
        f"static_assert(adaattn::work::kUnlimited == {UNLIMITED});",
        f"static_assert(adaattn::work::kNoPartial == {NO_PARTIAL});",
        f"static_assert(adaattn::work::kNoBias == {NO_BIAS});",
        f"static_assert(adaattn::work::kMaskInterval == {MASK_INTERVAL});",
        f"static_assert(adaattn::work::kMaskNone == {MASK_NONE});",
        f"static_assert(adaattn::work::kTensors == {len(TENSORS)});",
    ]
    for name, twin in (("WorkItem", ITEM), ("Source", SOURCE)):
        assert twin.fields is not None
        lines.append(f"static_assert(sizeof(adaattn::work::{name}) == {twin.itemsize});")
        lines += [
            f"static_assert(__builtin_offsetof(adaattn::work::{name}, {field}) == {offset});"
            for field, (_, offset, *_) in twin.fields.items()
            if not field.startswith("reserved")
        ]
    for sources in (1, 2, 3):
        size = ITEM.itemsize + sources * SOURCE.itemsize
        lines.append(f"static_assert(sizeof(adaattn::work::WorkRecord<{sources}>) == {size});")
    spec = Tile(64, 64, 2, 64).spec("bf16")
    unit = "\n".join([f'#include "{spec.header}"', *lines, 'extern "C" __global__ void f() {}'])
    monkeypatch.setattr("adaattn_cuda.jit.compile.render", lambda _: unit)
    assert compiler.compile(spec).cubin
    broken = unit.replace("batch) == 0)", "batch) == 4)")
    assert broken != unit
    monkeypatch.setattr("adaattn_cuda.jit.compile.render", lambda _: broken)
    with pytest.raises(Exception, match="static assertion failed"):
        compiler.compile(spec)


# --- tuning
# ------------------------------------------------------------------------------------
def geometry(length: int, dim: int, causal: bool, tokens: int = 16_384) -> Geometry:
    batch, heads = tokens // length, 2048 // dim
    spans = tuple(SequenceSpan(b, b, 0, length, 0, length) for b in range(batch))
    return Geometry(spans, heads, heads, dim, dim, right=0 if causal else None)


@pytest.mark.parametrize(
    ("length", "dim", "causal", "consumers", "tile_n"),
    [
        (1024, 64, True, 2, 128),
        (4096, 64, True, 3, 128),
        (16_384, 64, False, 3, 128),
        (1024, 128, False, 2, 128),
        (1024, 128, True, 2, 128),
        (4096, 128, True, 2, 128),
        (16_384, 128, False, 2, 160),
        (16_384, 256, True, 2, 80),
    ],
)
def test_measured_winners_are_chosen(length, dim, causal, consumers, tile_n) -> None:
    """What docs/kernels/sm90_attn_fwd_f16.md measured on an H200 is what the cost picks."""
    tile = choose(geometry(length, dim, causal), BLOCKS)
    assert (tile.consumers, tile.tile_n) == (consumers, tile_n)


def test_every_pair_of_dims_has_a_legal_tile() -> None:
    for dim_qk, dim_v in itertools.product((8, 64, 72, 128, 136, 192, 200, 256), repeat=2):
        for rate, tile in candidates(padded_dim(dim_qk), padded_dim(dim_v)):
            assert is_legal(tile)
            assert tile.dim_qk >= dim_qk
            assert tile.dim_v >= dim_v
            assert rate > 0
            assert tile.tile_n % 16 == 0
            assert tile.stages & (tile.stages - 1) == 0


def test_a_tile_without_room_is_illegal() -> None:
    assert not is_legal(Tile(256, 256, 2, 96))  # shared memory
    assert not is_legal(Tile(64, 64, 3, 192))  # registers


def test_shipped_are_distinct_and_for_hopper() -> None:
    specs = shipped()
    assert len(set(specs)) == len(specs)
    assert {spec.arch for spec in specs} == {"sm_90a"}


# --- what it takes
# -------------------------------------------------------------------------------
def view(
    heads=2, length=4, dim=64, dtype="f16", pointer=256, strides: tuple[int, ...] | None = None
) -> ArrayView:
    made = contiguous(pointer, (2, heads, length, dim), dtype, 0)
    return made if strides is None else made._replace(strides=strides)


def task(**changes) -> Task:
    spans = tuple(SequenceSpan(b, b, 0, 4, 0, 4) for b in range(2))
    lse = contiguous(256, (2, 2, 4), "f32", 0)
    base = Task(
        view(), view(), view(), view(), lse, None, None, spans,
        None, None, False, 0.5, "f16", "f16",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_takes_structural_masks_and_padded_dims() -> None:
    wide = {"value": view(dim=256), "out": view(dim=256)}
    narrow = {"query": view(dim=8), "key": view(dim=8)}
    for changes in ({}, {"right": 0, "bottom_right": True}, wide, narrow, {"heads": ((0, 1),)}):
        assert sm90.refusal(task(**changes), "sm_90a") is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({name: view(dtype="f32") for name in ("query", "key", "value", "out")}, "f32"),
        ({"qk": "f32"}, "formats f32, f16"),
        ({"query": view(dim=12), "key": view(dim=12)}, "dim_qk 12"),
        ({"value": view(dim=264)}, "dim_v 264"),
        ({"allowed": view(dtype="bool")}, "mask given as an array"),
        ({"key": view(length=0), "value": view(length=0)}, "no key"),
        ({"key": view(pointer=264)}, "key starts at an address"),
        ({"key": view(strides=(960, 320, 68, 1))}, "along len"),
        ({"out": view(strides=(960, 0, 64, 1))}, "out steps 0 bytes along heads"),
    ],
)
def test_refuses_with_a_reason(changes, reason) -> None:
    found = sm90.refusal(task(**changes), "sm_90a")
    assert found is not None
    assert reason in found


def test_other_layouts_and_architectures() -> None:
    bshd = task(key=view(strides=(512, 64, 128, 1)))
    assert sm90.refusal(bshd, "sm_90a") is None
    one = task(key=view(heads=1, strides=(256, 0, 64, 1)))
    assert sm90.refusal(one, "sm_90a") is None, "an axis of one is never stepped"
    assert "sm_80" in str(sm90.refusal(task(), "sm_80"))


# --- parameters
# -------------------------------------------------------------------------------
def matrix(pointer=256, shape=(2, 3, 5, 64), strides=(960, 320, 64)) -> sm90.DeviceMatrix:
    return sm90.DeviceMatrix(pointer, shape, strides)


class FakeMaps:
    """Records the tensor maps that are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.maps: list[tuple[object, ...]] = []
        self.status = 0

        def encode(place, kind, rank, address, sizes, strides, box, *_) -> int:  # type: ignore[no-untyped-def]
            assert place % 64 == 0
            ctypes.c_ubyte.from_address(place).value = 42
            self.maps.append((kind, rank, address, list(sizes), list(strides), list(box)))
            return self.status

        def replace(place: int, address: int) -> int:
            assert place % 64 == 0
            assert ctypes.c_ubyte.from_address(place).value == 42, "encoded before"
            self.maps.append(("moved", address))
            return self.status

        monkeypatch.setattr(sm90.tensor_maps, "_functions", lambda: (encode, replace))


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> FakeMaps:
    return FakeMaps(monkeypatch)


TILE = candidates(64, 64)[0][1]
WORK = DeviceWork(77, 99, 3, 6, 1, 4096)


def packed() -> sm90.Params:
    lse = matrix(shape=(2, 3, 5, 1), strides=(15, 5, 1))
    return sm90.pack_params(
        TILE, "bf16", matrix(), [matrix(512)], [matrix(1024)], matrix(2048), lse, 0.5, WORK
    )


def test_parameters(maps: FakeMaps) -> None:
    params = packed()
    assert (params.items, params.sources, params.rounds) == (77, 99, 3)
    assert params.scale_log2 == pytest.approx(0.5 / np.log(2), rel=1e-6)
    assert params.slack * params.scale_log2 == pytest.approx(sm90.SLACK_LOG2, rel=1e-6)
    assert params.inverse_scale == 2.0
    assert (params.dim_qk, params.dim_v) == (64, 64)
    assert params.key[0].data == 512
    assert (params.out.stride_row, params.out.stride_head, params.out.stride_batch) == (
        64,
        320,
        960,
    )
    sizes, steps = [64, 5, 3, 2], [128, 640, 1920]
    assert maps.maps == [
        (9, 4, 256, sizes, steps, [64, TILE.tile_m, 1, 1]),
        (9, 4, 512, sizes, steps, [64, TILE.tile_n, 1, 1]),
        (9, 4, 1024, sizes, steps, [64, TILE.tile_n, 1, 1]),
    ]


def test_parameters_are_moved_to_other_addresses(maps: FakeMaps) -> None:
    params = packed()
    before = bytes(params)
    moved = sm90.move_params(params, (16, 32, 48, 64, 80, 0, 0))
    assert bytes(params) == before
    assert maps.maps[3:] == [("moved", 16), ("moved", 32), ("moved", 48)]
    matrices = (moved.query, moved.key[0], moved.value[0], moved.out, moved.lse)
    assert [m.data for m in matrices] == [16, 32, 48, 64, 80]
    for place, address in zip(matrices, (256, 512, 1024, 2048, 256), strict=True):
        place.data = address
    assert bytes(moved) == before, "nothing else has changed"
    maps.status = 1
    with pytest.raises(AdaAttnError, match="error 1 for an array at 0x10"):
        sm90.move_params(params, (16, 32, 48, 64, 80))


def test_a_refused_tensor_map_is_an_error(maps: FakeMaps) -> None:
    maps.status = 1
    with pytest.raises(AdaAttnError, match="error 1 for sizes"):
        packed()


# --- launches
# -------------------------------------------------------------------------------
class Call:
    """Records what would be launched."""

    started: ClassVar[list[tuple[int, int, int, int]]] = []

    def __init__(self, kernel, params, grid, stream) -> None:
        self.facts = params, grid, stream

    def start(self, device: int) -> None:
        params, grid, stream = self.facts
        Call.started.append((params.query.data, params.key[1].data, grid, stream))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, maps: FakeMaps) -> None:
    Call.started.clear()
    kernel = SimpleNamespace(prepare=lambda device: None)
    monkeypatch.setattr(sm90, "kernel_of", lambda spec, threads, stream: kernel)
    monkeypatch.setattr(sm90.driver, "Call", Call)


ARRAYS = (view(), view(), view(), view(), contiguous(256, (2, 2, 4), "f32", 0))


@pytest.mark.usefixtures("loaded")
def test_a_launch_takes_any_work_list_and_further_keys() -> None:
    """One that a kernel writes too: only addresses and the table's shape are known."""
    tile = dataclasses.replace(TILE, max_sources=3)
    work = dataclasses.replace(WORK, max_sources=3)
    pooled = (matrix(4096), matrix(8192))
    launch = sm90.Sm90Launch(tile, ARRAYS, 0.5, work, 7, further=[pooled])
    assert launch.workspace_bytes == 4096
    for base in (16, 1 << 20, 16):
        launch.start((base, 32, 48, 64, 80, 0, 0), 0, 7)
    assert Call.started == [(base, 4096, 6, 7) for base in (16, 1 << 20, 16)]


@pytest.mark.usefixtures("loaded")
def test_an_empty_work_list_starts_nothing() -> None:
    nothing = upload(work_list(Geometry((), 2, 2, 64, 64), 128, 128, 132), 0, 7)
    sm90.Sm90Launch(TILE, ARRAYS, 0.5, nothing, 7).start((0,) * 7, 0, 7)
    assert Call.started == []


def test_too_many_sources_are_refused() -> None:
    work = dataclasses.replace(WORK, max_sources=2)
    with pytest.raises(ArgumentError, match="up to 2 sources"):
        sm90.Sm90Launch(TILE, ARRAYS, 0.5, work, 7)
