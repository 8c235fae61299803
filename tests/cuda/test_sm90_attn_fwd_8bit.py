"""The 8-bit kernel and its quantiser without a GPU: budgets, instructions, twins, lists."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import adaattn_kernels_cu as kernels
from adaattn_core.formats import SCALE_BLOCKS
from adaattn_core.problem import SequenceSpan
from adaattn_cuda.device.views import ArrayView, contiguous
from adaattn_cuda.jit.compile import Compiler
from adaattn_cuda.jit.resources import parse_budget
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels import sm90_attn_fwd_8bit as eight_bit
from adaattn_cuda.kernels import smxx_quantize as quantiser
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import (
    TILE_KEYS,
    TILE_SCALES,
    choose,
    is_legal,
    shipped,
)
from adaattn_cuda.work.geometry import UNLIMITED
from adaattn_cuda.work.records import work_list


@pytest.fixture(scope="module")
def compiler():
    with Compiler() as running:
        yield running


MIXED = [
    choose(qk, pv, dim, dim).spec("bf16")
    for qk, pv in (("i8", "bf16"), ("bf16", "e4m3"))
    for dim in (64, 128)
]
COMPILED = [s for s in (*shipped(), *quantiser.shipped()) if "bf16" in s.name] + MIXED


@pytest.mark.nvrtc
@pytest.mark.parametrize("spec", COMPILED, ids=[spec.name for spec in COMPILED])
def test_compiles_within_its_budget(compiler: Compiler, spec: KernelSpec) -> None:
    built = compiler.compile(spec)
    budget = parse_budget(kernels.source(spec.header))
    assert budget.terms
    assert budget.violations(built.resources, spec.smem_bytes) == []
    assert built.resources.stack_bytes == 0  # nothing in local memory


@pytest.mark.nvrtc
@pytest.mark.parametrize("dim", [64, 128])
def test_the_matrix_unit_multiplies_8_bits(
    compiler: Compiler, tmp_path: Path, dim: int
) -> None:
    """Read off the machine code, where the toolkit's disassembler is installed."""
    disassembler = shutil.which("nvdisasm")
    if disassembler is None:
        pytest.skip("no nvdisasm on this machine (it comes with the CUDA toolkit)")
    cubin = tmp_path / "kernel.cubin"
    for qk, pv, wanted in (
        ("i8", "e4m3", {"IGMMA", "QGMMA"}),
        ("i8", "bf16", {"IGMMA", "HGMMA"}),
        ("bf16", "e4m3", {"HGMMA", "QGMMA"}),
    ):
        cubin.write_bytes(compiler.compile(choose(qk, pv, dim, dim).spec("bf16")).cubin)
        text = subprocess.run(
            [disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        assert set(re.findall(r"\b[IQH]GMMA", text)) == wanted
        assert not re.search(r"\b(LDL|STL)\b", text)  # nothing in local memory


@pytest.mark.nvrtc
def test_layouts_match_the_headers(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A structure whose twin drifted does not compile."""
    lines = []
    for header, name, twin in (
        ("QuantisedParams", "adaattn::QuantisedParams", eight_bit.QuantisedParams),
        ("Params", "adaattn::smxx_quantize::Params", quantiser.Params),
    ):
        assert header in name
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(twin)});")
        lines += [
            f"static_assert(__builtin_offsetof({name}, {field}) =="
            f" {getattr(twin, field).offset});"
            for field, _ in twin._fields_
            if field not in ("attention", "reserved")
        ]
    for name, record in (("Tile", quantiser.TILE), ("Span", quantiser.SPAN)):
        assert record.fields is not None
        whole = f"adaattn::smxx_quantize::{name}"
        lines.append(f"static_assert(sizeof({whole}) == {record.itemsize});")
        lines += [
            f"static_assert(__builtin_offsetof({whole}, {field}) == {offset});"
            for field, (_, offset, *_) in record.fields.items()
            if field != "_"
        ]
    blocks = SCALE_BLOCKS["tile"]
    lines += [
        f"static_assert(adaattn::kTileKeys == {TILE_KEYS});",
        f"static_assert(adaattn::kTileKeys == {blocks.value_rows});",
        f"static_assert(adaattn::kScaleKeys == {blocks.key_rows});",
        f"static_assert(adaattn::kTileScales == {TILE_SCALES});",
    ]
    spec = shipped()[0]
    includes = [f'#include "{s.header}"' for s in (spec, quantiser.shipped()[0])]
    unit = "\n".join([*includes, *lines, 'extern "C" __global__ void f() {}'])
    monkeypatch.setattr("adaattn_cuda.jit.compile.render", lambda _: unit)
    assert compiler.compile(spec).cubin


def view(heads: int, length: int, dim: int, dtype: str = "bf16") -> ArrayView:
    return contiguous(256, (1, heads, length, dim), dtype, 0)


def task(
    spans: tuple[SequenceSpan, ...], len_q: int, len_kv: int, qk: str = "i8", pv: str = "e4m3",
    *, dim: int = 64, dtype: str = "bf16", left: int | None = None, right: int | None = None,
) -> Task:  # fmt: skip
    lse = contiguous(256, (1, 4, len_q), "f32", 0)
    return Task(
        view(4, len_q, dim, dtype), view(2, len_kv, dim, dtype), view(2, len_kv, dim, dtype),
        view(4, len_q, dim, dtype), lse, None, None, spans, left, right, True, 0.125, qk, pv,
    )  # fmt: skip


RAGGED = (
    SequenceSpan(0, 0, 0, 5, 0, 70),
    SequenceSpan(1, 0, 5, 305, 70, 370),
    SequenceSpan(2, 0, 305, 305, 370, 380),
    SequenceSpan(3, 0, 305, 562, 380, 892),
)


def test_every_key_has_a_place_on_whole_tiles() -> None:
    packed = task(RAGGED, 562, 892, right=0)
    places, rows = quantiser._places(packed)
    assert places == [0, 256, 768, 1024]
    assert rows == 1024 + 512
    spans, keys, queries = quantiser._tables(packed, places)
    written = np.zeros((2, rows), int)
    read = np.zeros((2, 892), int)
    for tile in keys:
        written[tile["head"], tile["place"] : tile["place"] + TILE_KEYS] += 1
        read[tile["head"], tile["first"] + tile["begin"] : tile["first"] + tile["end"]] += 1
    assert (written == 1).all()
    # Bottom-right causal: every key of a sequence with rows is seen, of one without rows none.
    assert (read[:, :370] == 1).all()
    assert (read[:, 370:380] == 0).all()
    assert (read[:, 380:] == 1).all()
    rows_q = np.zeros((4, 562), int)
    for tile in queries:
        rows_q[tile["head"], tile["first"] : tile["first"] + tile["end"]] += 1
    assert (rows_q == 1).all()
    assert spans["low"].tolist() == [0, 70, 370, 380]


def test_sources_begin_on_whole_tiles_of_their_sequence() -> None:
    windowed = task(RAGGED, 562, 892, left=90, right=3)
    places, _ = quantiser._places(windowed)
    listed = work_list(
        windowed.geometry, 128, TILE_KEYS, 132, key_step=TILE_KEYS, places=places
    )
    items = listed.items[listed.items["rows"] > 0]
    for item in items:
        source = listed.sources[item["first_source"]]
        if source["first_key"] == UNLIMITED:
            continue
        assert source["position"] % TILE_KEYS == 0
        assert (source["first_key"] + item["code_shift"]) % TILE_KEYS == 0
        assert item["tiles"] == -(-source["keys"] // TILE_KEYS)


def test_only_heads_that_are_computed_are_quantised() -> None:
    some = task((SequenceSpan(0, 0, 0, 100, 0, 200),), 100, 200)
    some = dataclasses.replace(some, heads=((0, 3),))
    _, keys, queries = quantiser._tables(some, [0])
    assert set(keys["head"].tolist()) == {1}
    assert set(queries["head"].tolist()) == {3}


SPAN = (SequenceSpan(0, 0, 0, 64, 0, 64),)


@pytest.mark.parametrize(
    ("made", "arch", "why"),
    [
        (task(SPAN, 64, 64), "sm_80", "sm_80"),
        (task(SPAN, 64, 64, dtype="f32"), "sm_90a", "f32"),
        (task(SPAN, 64, 64, "e4m3", "e4m3"), "sm_90a", "e4m3"),
        (task(SPAN, 64, 64, "i8", "i8"), "sm_90a", "i8"),
        (task(SPAN, 64, 64, "i8", "f16"), "sm_90a", "f16"),
        (task(SPAN, 64, 64, dim=136), "sm_90a", "136"),
        (task(SPAN, 64, 64, dim=36), "sm_90a", "36"),
    ],
)
def test_what_it_does_not_take_is_named(made: Task, arch: str, why: str) -> None:
    assert eight_bit.is_asked(made)
    reason = eight_bit.refusal(made, arch)
    assert reason is not None
    assert why in reason


@pytest.mark.parametrize(("qk", "pv"), [("i8", "e4m3"), ("i8", "bf16"), ("bf16", "e4m3")])
def test_every_pair_of_dims_has_a_tile_with_room(qk: str, pv: str) -> None:
    for dims in ((64, 64), (128, 128), (128, 64), (64, 128), (8, 72)):
        tile = choose(qk, pv, *dims)
        assert is_legal(tile)
        assert TILE_KEYS % tile.tile_n == 0
    assert eight_bit.refusal(task(SPAN, 64, 64, qk, pv), "sm_90a") is None
