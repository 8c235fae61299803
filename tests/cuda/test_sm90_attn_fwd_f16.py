"""The Hopper kernel compiles within its budget; its tile choice and parameters are right."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

import adaattn_kernels_cu as kernels
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem, SequenceSpan
from adaattn_cuda.jit.compile import Compiler
from adaattn_cuda.jit.resources import parse_budget
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
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
)

BLOCKS = 132

# Every padded dim as dim_qk and as dim_v, both formats, and switches that no tuned tile has.
COMPILED = [
    *[(tile, "bf16") for dim in (64, 128, 256) for _, tile in candidates(dim, dim)],
    (candidates(192, 128)[0][1], "f16"),
    (candidates(64, 256)[0][1], "bf16"),
    (candidates(256, 192)[0][1], "f16"),
    (Tile(128, 128, 2, 128, ping_pong=True), "f16"),
    (Tile(128, 128, 2, 128, role=1, max_sources=3), "bf16"),
]


@pytest.fixture(scope="module")
def compiler():
    with Compiler() as running:
        yield running


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("tile", "dtype"),
    COMPILED,
    ids=[f"{t.dim_qk}-{t.dim_v}-{t.consumers}x{t.tile_n}-{d}" for t, d in COMPILED],
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
def problem(
    dtype=np.float16, dim_qk=64, dim_v=64, mask: Mask | None = None
) -> AttentionProblem:
    q, k = (np.zeros((1, 2, 4, dim_qk), dtype) for _ in range(2))
    return AttentionProblem.from_arrays(q, k, np.zeros((1, 2, 4, dim_v), dtype), mask=mask)


def test_takes_structural_masks_and_padded_dims() -> None:
    assert sm90.supports(problem()) is None
    assert sm90.supports(problem(dim_qk=8, dim_v=256, mask=Mask.causal())) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": np.float32}, "f32"),
        ({"dim_qk": 12}, "dim_qk 12"),
        ({"dim_v": 264}, "dim_v 264"),
        ({"mask": Mask.boolean(np.ones((4, 4), bool))}, "boolean"),
    ],
)
def test_refuses_with_a_reason(changes, reason) -> None:
    found = sm90.supports(problem(**changes))
    assert found is not None
    assert reason in found


def matrix(pointer=256, shape=(2, 3, 5, 64), strides=(960, 320, 64)) -> sm90.DeviceMatrix:
    return sm90.DeviceMatrix(pointer, shape, strides)


def test_layouts() -> None:
    assert sm90.layout_reason("key", matrix()) is None
    assert sm90.layout_reason("key", matrix(strides=(960, 64, 192))) is None  # bshd
    assert sm90.layout_reason("key", matrix(shape=(1, 3, 5, 64), strides=(0, 320, 64))) is None
    assert "address" in str(sm90.layout_reason("key", matrix(pointer=264)))
    assert "len" in str(sm90.layout_reason("key", matrix(strides=(960, 320, 68))))
    assert "heads" in str(sm90.layout_reason("key", matrix(strides=(960, 0, 64))))


class FakeDriver:
    """Records the tensor maps that it is asked for."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.maps: list[tuple[object, ...]] = []

    def cuTensorMapEncodeTiled(self, place, kind, rank, address, *rest):  # noqa: N802
        sizes, strides, box, *_ = rest
        self.maps.append((kind, rank, address.value, list(sizes), list(strides), list(box)))
        assert ctypes.addressof(place._obj) % 64 == 0
        place._obj[0] = 42
        return self.status

    def cuTensorMapReplaceAddress(self, place, address):  # noqa: N802
        assert ctypes.addressof(place._obj) % 64 == 0
        assert place._obj[0] == 42, "a map that was encoded before"
        self.maps.append(("moved", address.value))
        return self.status


def packed(monkeypatch: pytest.MonkeyPatch, fake: FakeDriver) -> sm90.Params:
    monkeypatch.setattr("adaattn_cuda.device.driver.load_driver", lambda: fake)
    spans = (SequenceSpan(0, 0, 0, 5, 0, 5), SequenceSpan(1, 1, 0, 5, 0, 5))
    plan = sm90.plan_launch(Geometry(spans, 3, 3, 64, 64), "bf16", BLOCKS)
    lse = matrix(shape=(2, 3, 5, 1), strides=(15, 5, 1))
    return sm90.pack_params(
        plan, matrix(), [matrix(512)], [matrix(1024)], matrix(2048), lse, 0.5, 77
    )


def test_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver()
    params = packed(monkeypatch, fake)
    assert (params.items, params.sources) == (77, 77 + 64 * 6)
    assert params.scale_log2 == pytest.approx(0.5 / np.log(2), rel=1e-6)
    assert params.slack * params.scale_log2 == pytest.approx(sm90.SLACK_LOG2, rel=1e-6)
    assert params.inverse_scale == 2.0
    assert (params.dim_qk, params.dim_v, params.rounds) == (64, 64, 1)
    assert params.key[0].data == 512
    assert (params.out.stride_row, params.out.stride_head, params.out.stride_batch) == (
        64,
        320,
        960,
    )
    tile = choose(Geometry((SequenceSpan(0, 0, 0, 5, 0, 5),), 3, 3, 64, 64), BLOCKS)
    sizes, steps = [64, 5, 3, 2], [128, 640, 1920]
    assert fake.maps == [
        (9, 4, 256, sizes, steps, [64, tile.tile_m, 1, 1]),
        (9, 4, 512, sizes, steps, [64, tile.tile_n, 1, 1]),
        (9, 4, 1024, sizes, steps, [64, tile.tile_n, 1, 1]),
    ]


def test_parameters_are_moved_to_other_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver()
    params = packed(monkeypatch, fake)
    before = bytes(params)
    moved = sm90.move_params(params, (16, 32, 48, 64, 80, 0, 0))
    assert bytes(params) == before
    assert fake.maps[3:] == [("moved", 16), ("moved", 32), ("moved", 48)]
    matrices = (moved.query, moved.key[0], moved.value[0], moved.out, moved.lse)
    assert [m.data for m in matrices] == [16, 32, 48, 64, 80]
    for matrix, address in zip(matrices, (256, 512, 1024, 2048, 256), strict=True):
        matrix.data = address
    assert bytes(moved) == before, "nothing else has changed"
    fake.status = 1
    with pytest.raises(sm90.AdaAttnError, match="error 1 for an array at 0x10"):
        sm90.move_params(params, (16, 32, 48, 64, 80))


def test_a_refused_tensor_map_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sm90.AdaAttnError, match="error 1 for shape"):
        packed(monkeypatch, FakeDriver(status=1))
